"""The last steps of a trace: the cache's part in the graph is put in, and the graph written out anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from ...errors import VerificationError
from ...passes.graphs import ancestors
from .runtime import attribute, item, update_cache

Place = tuple[int, int]
"""An axis: index of the tensor among the inputs, and of the axis in it."""


class TraceError(VerificationError):
    """No graph of the owner can be had; the message says at which step."""


def flat_outputs(graph: Graph) -> list[Any]:
    (values,) = graph.output_node().args
    return list(values) if isinstance(values, (tuple, list)) else [values]


def fill_hole(graph: Graph, call: Node, index: int | None, equal: Sequence[Sequence[Place]]) -> None:
    """The placeholders of keys and values become the results of updating the live cache with the new ones."""
    output = graph.output_node()
    *values, new_keys, new_values = flat_outputs(graph)
    inputs = [node for node in graph.find_nodes(op="placeholder") if "val" in node.meta]
    keys, old_values = inputs[-2:]
    _read_sizes_elsewhere(graph, inputs, equal)
    with graph.inserting_before(output):
        updated = graph.call_function(update_cache, (call, new_keys, new_values, index))
        parts = [graph.call_function(item, (updated, position)) for position in (0, 1)]
    for placeholder, part in zip((keys, old_values), parts, strict=True):
        part.meta["val"] = placeholder.meta["val"]
        placeholder.replace_all_uses_with(part)
        graph.erase_node(placeholder)
    output.args = (tuple(values),)


def _read_sizes_elsewhere(graph: Graph, inputs: Sequence[Node], equal: Sequence[Sequence[Place]]) -> None:
    """Sizes that export reads from keys or values are needed before these exist: read them elsewhere."""
    holes = (len(inputs) - 2, len(inputs) - 1)
    instead = {
        place: next((other for other in group if other[0] not in holes), None)
        for group in equal
        for place in group
    }
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        source, axis = node.args
        if source in inputs:
            other = instead.get((inputs.index(source), axis))
            if other is not None:
                node.args = (inputs[other[0]], other[1])


def rebuilt(gm: GraphModule, call: Node) -> GraphModule:
    """A fresh graph in dependency order, with plain arguments, the owner's tensors looked up at call time."""
    graph = Graph()
    root = nn.Module()
    made: dict[Node, Any] = {}
    open_nodes: set[Node] = set()

    def emit(node: Node) -> None:
        if node in made:
            return
        if node in open_nodes:
            raise TraceError("keys and values are used before the cache is updated")
        open_nodes.add(node)
        for argument in node.all_input_nodes:
            emit(argument)
        if node.op == "get_attr" and str(node.target).startswith("owner."):
            made[node] = graph.call_function(attribute, (made[call], str(node.target).removeprefix("owner.")))
            return
        if node.op == "get_attr":
            name = f"constant_{len(root._buffers)}"
            root.register_buffer(name, torch.fx.graph_module._get_attr(gm, str(node.target)))
            made[node] = graph.get_attr(name)
            return
        made[node] = graph.node_copy(node, lambda argument: made[argument])
        made[node].meta = {}

    # What the result depends on; the cache is written by what attention reads.
    live_nodes = ancestors([gm.graph.output_node()])
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            emit(node)
    for node in gm.graph.nodes:
        if node in live_nodes:
            emit(node)
    graph.lint()
    return GraphModule(root, graph)
