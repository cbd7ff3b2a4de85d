"""Copying a graph without copying what it computes with."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node


def clone(graph_module: GraphModule) -> GraphModule:
    """A graph of its own over the same parameters and buffers, with the same calling convention and metadata."""
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
