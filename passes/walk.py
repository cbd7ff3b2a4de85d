"""The record of a walk: what was found between the softmax, the product of q and k, and the values.

`match.py` makes it from operators, `fused.py` from a fused node; `heads.py` and `verify.py` read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from .anchors import Refused
from .axes import Axis, Layout, is_one, leaves, pair, resolve, shape_of
from .evaluate import SECOND_SHAPE_ONLY, SHAPE_ONLY
from .site import Reason
from .steps import SCORE_STEPS, WEIGHT_STEPS, Effect, StepRule

aten = torch.ops.aten

MAX_WALK = 40
"""Longest walk from the softmax to a contraction, in nodes."""


@dataclass(frozen=True)
class PlacedEffect:
    """One step of the walk with the layout of the scores at that point."""

    effect: Effect
    layout: Layout


@dataclass
class Walk:
    """Everything the walk from one anchor found, in the atoms of its operands.

    batch, value_batch: pairs of axes of (leading, other operand) and (weights, value) that hold the same
    pieces; query_leads: the query is the leading operand of the score product.
    """

    anchor: Node
    query: Node
    key: Node
    value: Node
    output: Node
    query_chain: list[tuple[Node, Layout]]
    key_chain: list[tuple[Node, Layout]]
    value_chain: list[tuple[Node, Layout]]
    batch: list[tuple[Axis, Axis]]
    query_leads: bool
    value_batch: list[tuple[Axis, Axis]]
    query_own: list[Axis]
    key_axis: Axis
    value_key_axis: Axis
    query_feature: Axis
    key_feature: Axis
    value_feature: Axis
    output_layout: Layout
    effects: list[PlacedEffect]
    body: list[Node]
    spelling: list[str] = field(default_factory=list)
    contractions: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Rules:
    """The step tables by operator: what may stand before the softmax, and what behind it."""

    scores: dict[Any, StepRule]
    weights: dict[Any, StepRule]

    @classmethod
    def of(
        cls, score_steps: Iterable[StepRule] = SCORE_STEPS, weight_steps: Iterable[StepRule] = WEIGHT_STEPS
    ) -> Rules:
        by_target = [
            {target: rule for rule in table for target in rule.targets}
            for table in (score_steps, weight_steps)
        ]
        return cls(*by_target)


def short_name(node: Node) -> str:
    """`matmul` for `aten.matmul.default`."""
    return str(node.target).removeprefix("aten.").split(".")[0] if node.op == "call_function" else node.op


def reads_shape_only(user: Node, node: Node) -> bool:
    """Whether `user` reads the size or dtype of `node` and none of its values."""
    places = [i for i, argument in enumerate(user.args) if argument is node]
    return (user.target in SHAPE_ONLY and places == [0]) or (
        user.target in SECOND_SHAPE_ONLY and places == [1]
    )


def value_users(node: Node) -> list[Node]:
    """Users that read values of `node`.

    Left out are metadata asserts, size reads, dead nodes, and the test of a NaN guard.
    """
    users = [u for u in node.users if (u.users or u.op == "output") and not reads_shape_only(u, node)]
    return [u for u in users if not _tests_for_nan(u, users)]


def _tests_for_nan(user: Node, others: list[Node]) -> bool:
    """Whether `user` is the isnan of a tensor whose only reader replaces the NaNs of the same tensor."""
    return user.target is aten.isnan.default and all(reader in others for reader in user.users)


def join_axes(node: Node, first: Axis, second: Axis) -> tuple[tuple[Axis, Axis], Axis]:
    """Two batch axes that `node` joins, as a pair in the same pieces, and the axis of its result."""
    if leaves(first) and leaves(second) and pair(first, second) is None:
        message = "the batch and head axes of the operands do not line up"
        raise Refused(Reason.AXES, node, message, "axes")
    return (leaves(first), leaves(second)), leaves(first) or leaves(second)


def term_layout(node: Node, term: Node, layout: Layout) -> Layout:
    """The layout of a tensor that broadcasts against scores laid out as `layout`."""
    shape = shape_of(term)
    if shape is None or len(shape) > len(layout):
        raise Refused(Reason.AXES, node, f"{term} does not broadcast to the scores", "axes")
    aligned = resolve(layout)[len(layout) - len(shape) :]
    # Broadcasting leaves two cases, one long or whole, even where two inputs name one batch size differently.
    return tuple(() if is_one(size) else axis for size, axis in zip(shape, aligned, strict=True))
