"""The table of score steps: what may stand between `q @ k^T` and softmax, one rule per spelling.

A rule says which argument carries the scores and what the operator does to them. The walk tries every
carrying argument, so `a + b` finds the scores on either side. To teach the matcher a spelling of your own,
pass `find_attention(graph, score_steps=(*SCORE_STEPS, StepRule(...)))`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .axes import CASTS, VIEWS, overloads
from .evaluate import constant

aten = torch.ops.aten

GUARD = -1e30
"""A lower clamp at or below this only keeps -inf out; it changes no visible score."""


@dataclass(frozen=True)
class Effect:
    """What one node does to the scores.

    Attributes:
        kind: As in `site.Step`; `shift` besides, a row maximum that is subtracted.
        value: As in `site.Step`.
        term: The tensor that takes part, as it stands in the graph.
    """

    kind: str
    value: Any = None
    term: Node | None = None


Reader = Callable[[Node, Node], list[Effect] | str]
"""(node, scores argument) -> effects in order, or a sentence saying why the spelling is not understood."""


@dataclass(frozen=True)
class StepRule:
    """How to read one spelling of a step.

    Attributes:
        targets: Operator overloads.
        carriers: Positions of the arguments that may hold the scores.
        read: From a node and the scores that it reads, to its effects in order, or to a sentence that says
            why the spelling is not understood.
    """

    targets: tuple[Any, ...]
    carriers: tuple[int, ...]
    read: Reader


def _other(node: Node, scores: Node) -> Any:
    return node.args[1] if node.args[0] is scores else node.args[0]


def _number(value: Any) -> float | None:
    """A Python number or the value of a constant one-element tensor."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor):
        tensor = constant(value)
        if tensor is not None and tensor.numel() == 1:
            return float(tensor)
    return None


def _cast(node: Node, scores: Node) -> list[Effect] | str:
    before, after = scores.meta["val"].dtype, node.meta["val"].dtype
    return [] if before == after else [Effect("cast", str(after).removeprefix("torch."))]


def _view(node: Node, scores: Node) -> list[Effect] | str:
    return []


def _multiply(kind: str) -> Reader:
    def read(node: Node, scores: Node) -> list[Effect] | str:
        if node.kwargs.get("rounding_mode") is not None:
            return "a rounded division of the scores is not a scale"
        other = _other(node, scores)
        if (value := _number(other)) is not None:
            return [Effect(kind, value)]
        return (
            [Effect(kind, None, other)] if isinstance(other, Node) else f"scores are multiplied by {other!r}"
        )

    return read


def _add(sign: float) -> Reader:
    def read(node: Node, scores: Node) -> list[Effect] | str:
        other = _other(node, scores)
        alpha = node.kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)):
            return "the alpha of an add on the scores is not a number"
        if isinstance(other, (int, float)):
            return [Effect("offset", sign * float(alpha) * float(other))]
        if not isinstance(other, Node):
            return f"{other!r} is added to the scores"
        if sign < 0 and _is_row_maximum(other, scores):
            return [Effect("shift", None, other)]  # softmax does not see a shift of the whole row
        return [Effect("add", sign * float(alpha), other)]

    return read


def _is_row_maximum(node: Node, scores: Node) -> bool:
    """`node` is `scores.amax(-1, keepdim=True)` in one of its spellings (then possibly detached)."""
    while node.target in (aten.detach.default, aten.alias.default, aten.clone.default) and isinstance(
        node.args[0], Node
    ):
        node = node.args[0]
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem" and node.args[1] == 0:
        inner = node.args[0]
        if not (isinstance(inner, Node) and inner.target is aten.max.dim):
            return False
        node = inner
    elif node.target is not aten.amax.default:
        return False
    dims = node.args[1] if len(node.args) > 1 else None
    dims = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    rank = scores.meta["val"].ndim
    return (
        node.args[0] is scores and bool(keep) and [d % rank for d in dims if isinstance(d, int)] == [rank - 1]
    )


def _fill(node: Node, scores: Node) -> list[Effect] | str:
    mask, value = node.args[1], _number(node.args[2])
    if _is_nan_of(mask, scores) and value == 0:
        return [Effect("nan_to_num")]
    if value is None or not isinstance(mask, Node):
        return "the value that masked_fill writes into the scores is not a constant"
    return [Effect("fill", value, mask)]


def _where(node: Node, scores: Node) -> list[Effect] | str:
    condition = node.args[0]
    position = 1 if node.args[1] is scores else 2
    value = _number(node.args[3 - position])
    if value is None:
        filler = node.args[3 - position]
        value = _filled_with(filler) if isinstance(filler, Node) else None
    if position == 2 and value == 0 and _is_nan_of(condition, scores):
        return [Effect("nan_to_num")]
    if value is None or not isinstance(condition, Node):
        return "the value that where writes into the scores is not a constant"
    return [Effect("keep" if position == 1 else "fill", value, condition)]


def _is_nan_of(node: Any, tensor: Node) -> bool:
    return isinstance(node, Node) and node.target is aten.isnan.default and node.args[0] is tensor


def _filled_with(node: Node) -> float | None:
    """The number a tensor is filled with (`full_like`, `zeros_like`, `full`), looking through views."""
    while node.target in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    for target, position in ((aten.full_like.default, 1), (aten.full.default, 1), (aten.new_full.default, 2)):
        if node.target is target:
            return _number(node.args[position])
    return 0.0 if node.target is aten.zeros_like.default else None


def _lower_clamp(node: Node, scores: Node) -> list[Effect] | str:
    low = _number(node.args[1] if len(node.args) > 1 else node.kwargs.get("min"))
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    if low is not None and low <= GUARD and high is None:
        return []
    return "the scores are clamped, which no linear attention can express"


def _maximum(node: Node, scores: Node) -> list[Effect] | str:
    other = _other(node, scores)
    low = _number(other)
    if low is not None and low <= GUARD:
        return []
    return "an element-wise maximum of the scores and another tensor is not understood"


def _tanh(node: Node, scores: Node) -> list[Effect] | str:
    return [Effect("tanh")]


_MOVES = (
    StepRule(CASTS, (0,), _cast),
    StepRule(tuple(target for target in VIEWS if target not in CASTS), (0,), _view),
)
_FILLS = (
    StepRule(tuple(overloads("masked_fill.Scalar", "masked_fill.Tensor")), (0,), _fill),
    StepRule(
        tuple(overloads("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")),
        (1, 2),
        _where,
    ),
)

SCORE_STEPS: tuple[StepRule, ...] = (
    *_MOVES,
    StepRule(tuple(overloads("mul.Tensor", "mul.Scalar")), (0, 1), _multiply("scale")),
    StepRule(tuple(overloads("div.Tensor", "div.Scalar", "true_divide.Tensor")), (0,), _multiply("div")),
    StepRule(tuple(overloads("tanh.default")), (0,), _tanh),
    StepRule(tuple(overloads("add.Tensor", "add.Scalar")), (0, 1), _add(1.0)),
    StepRule(tuple(overloads("sub.Tensor", "sub.Scalar")), (0,), _add(-1.0)),
    *_FILLS,
    StepRule(tuple(overloads("clamp.default", "clamp_min.default")), (0,), _lower_clamp),
    StepRule(tuple(overloads("maximum.default", "max.other")), (0, 1), _maximum),
)
"""What may stand between `q @ k^T` and softmax."""


def _dropout(node: Node, weights: Node) -> list[Effect] | str:
    p, train = node.args[1], node.args[2]
    return [Effect("dropout", float(p))] if train and p else []  # type: ignore[arg-type]


def _nan_to_num(node: Node, weights: Node) -> list[Effect] | str:
    nan = node.args[1] if len(node.args) > 1 else node.kwargs.get("nan")
    return [Effect("nan_to_num")] if nan in (None, 0, 0.0) else "nan_to_num writes a number other than zero"


WEIGHT_STEPS: tuple[StepRule, ...] = (
    *_MOVES,
    StepRule(tuple(overloads("dropout.default")), (0,), _dropout),
    StepRule(tuple(overloads("nan_to_num.default")), (0,), _nan_to_num),
    *_FILLS,
)
"""What may stand between softmax and the product with v."""
