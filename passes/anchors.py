"""Where a walk starts: a softmax in any spelling, and the exception that ends a walk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from .axes import overloads
from .site import Reason
from .steps import Effect

aten = torch.ops.aten

SOFTMAX = {
    target: safe
    for names, safe in (
        (("softmax.int", "_softmax.default", "special_softmax.default"), False),
        (("_safe_softmax.default",), True),
    )
    for target in overloads(*names)
}


class Refused(Exception):
    """Ends the walk from one anchor; turned into a `Refusal` value by the caller."""

    def __init__(self, reason: Reason, node: Node, message: str, reached: str) -> None:
        super().__init__(message)
        self.reason, self.node, self.message, self.reached = reason, node, message, reached


@dataclass(frozen=True)
class Anchor:
    """A softmax, however it is spelled: its input, its axis, the nodes that make it up."""

    node: Node
    scores: Node
    dim: int
    effect: Effect
    inner: tuple[Node, ...] = ()


def find_anchors(graph: Graph) -> Iterator[Anchor]:
    """Every decomposed softmax of the graph, in order."""
    for node in graph.nodes:
        if (
            node.op == "call_function"
            and (anchor := _read_softmax(node) or _read_manual_softmax(node)) is not None
        ):
            yield anchor


def _read_softmax(node: Node) -> Anchor | None:
    if node.target not in SOFTMAX:
        return None
    scores, dim = node.args[0], node.args[1]
    assert isinstance(scores, Node) and isinstance(dim, int)
    kind = "safe_softmax" if SOFTMAX[node.target] else "softmax"
    before, after = scores.meta["val"], node.meta["val"]
    dtype = str(after.dtype).removeprefix("torch.") if before.dtype != after.dtype else None
    return Anchor(node, scores, dim % before.ndim, Effect(kind, dtype))


def _read_manual_softmax(node: Node) -> Anchor | None:
    """`exp(s) / exp(s).sum(dim, keepdim=True)`; a shift inside exp is left to the score steps."""
    if node.target is not aten.div.Tensor or not all(isinstance(a, Node) for a in node.args[:2]):
        return None
    exponential, total = node.args[0], node.args[1]
    assert isinstance(exponential, Node) and isinstance(total, Node)
    if exponential.target is not aten.exp.default or total.target is not aten.sum.dim_IntList:
        return None
    dims = total.args[1]
    keep = total.args[2] if len(total.args) > 2 else total.kwargs.get("keepdim", False)
    if total.args[0] is not exponential or not keep or not isinstance(dims, (list, tuple)) or len(dims) != 1:
        return None
    scores, dim = exponential.args[0], dims[0]
    assert isinstance(scores, Node) and isinstance(dim, int)
    return Anchor(node, scores, dim % node.meta["val"].ndim, Effect("softmax", None), (exponential, total))
