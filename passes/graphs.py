"""Copying a graph without copying what it computes with, and removing what a rewrite made useless."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node


def clone(graph_module: GraphModule) -> GraphModule:
    """A copy of the graph over the same parameters and buffers, with the same signature and metadata."""
    graph = Graph(tracer_cls=graph_module.graph._tracer_cls)
    copies: dict[Node, Node] = {}
    output = graph.graph_copy(graph_module.graph, copies, return_output_node=True)
    assert isinstance(output, tuple)
    value, original = output
    graph.output(value, type_expr=original.type).meta = dict(original.meta)
    graph.set_codegen(graph_module.graph._codegen)
    twin = GraphModule(graph_module, graph)
    twin.meta.update(graph_module.meta)
    return twin


def ancestors(nodes: Iterable[Node], inputs_of: Callable[[Node], Iterable[Node]] | None = None) -> set[Node]:
    """The nodes and everything that they are computed from.

    inputs_of: the inputs that count of a node; all of them by default.
    """
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes if inputs_of is None else inputs_of(node)
    return found


def attribute(node: Node) -> Any:
    """The object that a `get_attr` node of an owned graph reads."""
    return operator.attrgetter(str(node.target))(node.graph.owning_module)


def written_arguments(node: Node) -> list[Node]:
    """Arguments that `node` writes to in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    written: list[Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            written += [
                a for a in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(a, Node)
            ]
    return written


def aliased(node: Node) -> Node | None:
    """The argument whose memory the result of `node` shares by its schema, as of a slice or a write."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    schema = getattr(node.target, "_schema", None)
    shares = schema is not None and any(result.alias_info is not None for result in schema.returns)
    return source if isinstance(source, Node) and (shares or node.target is operator.getitem) else None


def remove_dead(graph: Graph, seeds: Iterable[Node]) -> None:
    """Erase `seeds` that nothing uses, and what only they used.

    Only what a rewrite made useless is looked at: general dead-code elimination would also drop calls that a
    traced region needs for their effect, and would keep fused attention, which it takes for impure.
    """
    waiting = list(dict.fromkeys(seeds))
    erased: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node in erased or node.op in ("placeholder", "output"):
            continue
        users = list(node.users)
        if has_effect(node) or not all(_only_serves(user, node) for user in users):
            continue
        for user in users:
            graph.erase_node(user)
            erased.add(user)
        inputs = node.all_input_nodes
        graph.erase_node(node)
        erased.add(node)
        waiting += inputs


def has_effect(node: Node) -> bool:
    """`node` writes in place, asserts, or is no plain operator, so it matters although nothing uses it."""
    if node.op != "call_function":
        return node.op != "get_attr"
    name = str(node.target)
    return bool(written_arguments(node)) or "assert" in name or "sym_constrain" in name


def prune(graph: Graph) -> int:
    """Erase operators whose results nobody uses; returns how many nodes went.

    A trace keeps, for example, averaged weights that the caller threw away.
    """
    before = len(graph.nodes)
    plain = [n for n in graph.nodes if isinstance(n.target, OpOverload) or n.target is operator.getitem]
    remove_dead(graph, [n for n in plain if not n.users and not has_effect(n)])
    return before - len(graph.nodes)


def _only_serves(user: Node, node: Node) -> bool:
    """`user` does nothing but assert about `node` or write into it."""
    if user.users:
        return False
    asserts = str(user.target) == "aten._assert_tensor_metadata.default"
    return user.args[:1] == (node,) and (
        asserts or (node.op == "call_function" and written_arguments(user) == [node])
    )
