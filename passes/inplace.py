"""In-place operators on fresh tensors as their out-of-place twins, so that a value is one node."""

from __future__ import annotations

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from .axes import view_source

aten = torch.ops.aten


def _twin(node: Node) -> OpOverload | None:
    """The out-of-place overload of `aten.add_.Tensor`: `aten.add.Tensor`."""
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    name, _, overload = str(target).removeprefix("aten.").partition(".")
    if not name.endswith("_") or name.startswith("_"):
        return None
    packet = getattr(aten, name[:-1], None)
    return getattr(packet, overload, None) if packet is not None else None


def _is_private(written: Node, writer: Node) -> bool:
    """Whether nothing but `written` itself can see the write.

    It is a computed tensor, no view, and no view of it is used later.
    """
    if written.op != "call_function" or view_source(written) is not None:
        return False
    schema = getattr(written.target, "_schema", None)
    if schema is None or any(result.alias_info is not None for result in schema.returns):
        return False
    return not any(
        view_source(user) is written for user in written.users if user is not writer and user < writer
    )


def functionalise(graph: Graph) -> int:
    """Replace the private writes of a graph, in the graph itself; returns how many.

    A write that something else could see (a cache, a slice of a tensor) stays, and refuses the site it
    touches.
    """
    count = 0
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        functional = _twin(node)
        if functional is None:
            continue
        written = node.args[0]
        assert isinstance(written, Node)
        if not _is_private(written, node):
            continue
        node.target = functional
        later = [user for user in written.users if position[user] > position[node]]
        for user in later:
            user.replace_input_with(written, node)
        count += 1
    return count
