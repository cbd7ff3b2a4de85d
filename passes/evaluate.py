"""What the value of a node depends on, and the values of those that are constant.

Reads of a tensor's shape are answered from its traced shape, so an activation whose size a mask copies is
neither a dependency nor computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .axes import expr, overloads, shape_of
from .graphs import ancestors, attribute

aten = torch.ops.aten

SHAPE_ONLY = frozenset(
    overloads(
        "sym_size.int",
        "sym_numel.default",
        "new_ones.default",
        "new_zeros.default",
        "new_full.default",
        "new_empty.default",
        "zeros_like.default",
        "ones_like.default",
        "full_like.default",
        "empty_like.default",
        "_assert_tensor_metadata.default",
        "new_tensor.default",
        "rand_like.default",
        "randn_like.default",
    )
)
"""Operators that read the shape, dtype or device of their first argument and never its values."""

SECOND_SHAPE_ONLY = frozenset(
    overloads("expand_as.default", "view_as.default", "type_as.default", "reshape_as.default", "to.other")
)
"""Operators that read only the shape or dtype of their second argument."""


def value_inputs(node: Node) -> list[Node]:
    """The tensors (and computed numbers) whose values `node` depends on."""
    if node.op in ("placeholder", "get_attr"):
        return []
    if node.target in SHAPE_ONLY:
        return [n for n in node.all_input_nodes if n is not node.args[0]]
    if node.target in SECOND_SHAPE_ONLY:
        return [n for n in node.all_input_nodes if n is not node.args[1]]
    return node.all_input_nodes


def is_size(node: Node) -> bool:
    """`node` is a number known from the traced symbolic shapes."""
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt)) and node.op != "get_attr"


def value_ancestors(node: Node) -> list[Node]:
    """`node` and every ancestor whose value it depends on, in graph order; sizes are not followed."""
    found = ancestors([node], lambda current: [] if is_size(current) else value_inputs(current))
    return [n for n in node.graph.nodes if n in found]


def value_leaves(node: Node) -> list[Node]:
    """Placeholders and attributes whose values `node` depends on."""
    return [n for n in value_ancestors(node) if n.op in ("placeholder", "get_attr") and not is_size(n)]


def constant(node: Node, limit: int = 64) -> torch.Tensor | None:
    """The value of `node` when it depends on no input, parameter or symbolic size; None otherwise.

    `limit` bounds how many nodes are run.
    """
    needed = value_ancestors(node)
    if len(needed) > limit or node.graph.owning_module is None:
        return None
    for ancestor in needed:
        if ancestor.op == "placeholder" or isinstance(ancestor.meta.get("val"), torch.SymInt):
            return None
        if ancestor.op == "get_attr" and isinstance(attribute(ancestor), torch.nn.Parameter):
            return None
    try:
        value = _run(needed)[node]
    except (ValueError, TypeError, RuntimeError, KeyError):
        return None
    return value if isinstance(value, torch.Tensor) else None


def on_inputs(nodes: Sequence[Node], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The values of nodes of one graph in a call.

    Args:
        nodes: Tensors of the graph.
        inputs: Of the call, by the names of the placeholders.

    Returns:
        Their values.

    Raises:
        ValueError: They depend on an input that is not given, or on a size that no input has. Whatever else
            an operator raises.
    """
    graph = nodes[0].graph
    given = {n: inputs[str(n.target)] for n in graph.find_nodes(op="placeholder") if n.target in inputs}
    sizes = {
        size: found
        for node, tensor in given.items()
        for size, found in zip(shape_of(node) or (), tensor.shape, strict=True)
        if size.is_Symbol
    }
    wanted = {node for one in nodes for node in value_ancestors(one)}
    if any(node.op == "placeholder" and node not in given and not is_size(node) for node in wanted):
        raise ValueError("it depends on an input that is not given")
    copies = {node: tensor.clone() for node, tensor in given.items() if node in wanted}
    values = _run([node for node in graph.nodes if node in wanted], copies, sizes)
    return [values[node] for node in nodes]


def _run(
    nodes: Sequence[Node],
    given: Mapping[Node, Tensor] = MappingProxyType({}),
    sizes: Mapping[Any, int] = MappingProxyType({}),
) -> dict[Node, Any]:
    """The values of nodes in graph order, which hold all that they depend on.

    given: values of inputs. sizes: of a call, by the symbols that the trace has for them.
    Raises whatever an operator raises, and ValueError for a size that is a symbol without a value.
    """
    values: dict[Node, Any] = dict(given)

    def lookup(argument: Node) -> Any:
        if argument in values:
            return values[argument]
        traced = argument.meta["val"]  # only its shape or dtype is read
        if not isinstance(traced, torch.Tensor):
            return _number(traced, sizes)
        shape = [_number(size, sizes) for size in traced.shape]
        return torch.empty(shape, dtype=traced.dtype, device=traced.device)

    with torch.no_grad():
        for node in nodes:
            if node in given:
                continue
            if is_size(node):
                values[node] = _number(node.meta["val"], sizes)
            elif node.op == "get_attr":
                values[node] = attribute(node)
            else:
                assert callable(node.target)
                values[node] = node.target(*map_arg(node.args, lookup), **map_arg(node.kwargs, lookup))
    return values


def _number(size: Any, sizes: Mapping[Any, int]) -> Any:
    """A traced size as a Python number."""
    if isinstance(size, (bool, float)):
        return size
    found = expr(size).subs(sizes)
    if not found.is_number:
        raise ValueError(f"size {size} has unknown symbols")
    return int(found)
