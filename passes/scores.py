"""Backward from the softmax: the products its input may come from, and why none was found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from .anchors import Refused
from .axes import VIEWS, overloads, shape_of
from .contraction import Contraction, read_contraction
from .site import Reason
from .steps import Effect, StepRule
from .walk import MAX_WALK, short_name

aten = torch.ops.aten

MIXERS = frozenset(
    overloads("linear.default", "conv2d.default", "convolution.default", "conv1d.default", "conv2d.padding")
)
"""Projections that, where they stand beside the softmax, mix the scores or weights of different heads."""


def score_paths(
    node: Node, rules: dict[Any, StepRule], depth: int = 0
) -> Iterator[tuple[Contraction, list[Node]]]:
    """Contractions the scores may come from, nearest first, each with the nodes between it and `node`."""
    contraction = read_contraction(node)
    if contraction is not None:
        yield contraction, []
        return
    if depth >= MAX_WALK or node.op != "call_function":
        return
    for source in _carriers(node, rules):
        for found, path in score_paths(source, rules, depth + 1):
            yield found, [*path, node]


def come_from_a_product(node: Any, rules: dict[Any, StepRule]) -> bool:
    """Whether `node` is a tensor that some contraction leads to through steps that have a rule."""
    return isinstance(node, Node) and next(score_paths(node, rules), None) is not None


def _carriers(node: Node, rules: dict[Any, StepRule]) -> list[Node]:
    """The arguments of `node` that may carry the scores."""
    if node.target is aten.cat.default:
        tensors = node.args[0]
        assert isinstance(tensors, (list, tuple))
        return [t for t in tensors if isinstance(t, Node)] if len(tensors) == 2 else []
    rule = rules.get(node.target)
    if rule is None:
        return []
    found = []
    for position in rule.carriers:
        argument = node.args[position] if position < len(node.args) else None
        if not isinstance(argument, Node) or argument in found:
            continue
        if node.target in VIEWS or shape_of(argument) == shape_of(node):
            found.append(argument)
    return found


def _furthest(node: Node, rules: dict[Any, StepRule]) -> Node:
    """The first node behind `node` that no rule explains, along the first carrier."""
    for _ in range(MAX_WALK):
        carriers = _carriers(node, rules)
        if not carriers:
            return node
        node = carriers[0]
    return node


def unexplained_scores(scores: Node, rules: dict[Any, StepRule]) -> Refused:
    """Why no product of queries and keys was found behind a softmax that reads `scores`."""
    culprit = _furthest(scores, rules)
    mixed = culprit.args[0] if culprit.op == "call_function" and culprit.args else None
    if come_from_a_product(mixed, rules):
        if culprit.target in MIXERS:
            message = "the scores of different heads are mixed by a projection"
            return Refused(Reason.HEAD_MIXING, culprit, message, "scores")
        message = f"{short_name(culprit)} on the scores is not understood"
        return Refused(Reason.SCORE_STEP, culprit, message, "scores")
    message = f"the softmax reads {short_name(culprit)}, not a product of queries and keys"
    return Refused(Reason.NOT_ATTENTION, culprit, message, "scores")


def read_sink(node: Node, scores: Node) -> Effect:
    """A `cat` that puts one column of sink logits before or behind the scores."""
    tensors = node.args[0]
    assert isinstance(tensors, (list, tuple))
    position = list(tensors).index(scores)
    sink = tensors[1 - position]
    shape, sink_shape = shape_of(scores), shape_of(sink) if isinstance(sink, Node) else None
    dim = node.args[1] if len(node.args) > 1 else 0
    column = (
        shape is not None and sink_shape is not None and sink_shape[-1] == 1 and dim in (-1, len(shape) - 1)
    )
    if not column or not isinstance(sink, Node):
        raise Refused(
            Reason.SCORE_STEP, node, "the scores are concatenated with more than one sink column", "sink"
        )
    return Effect("sink", "last" if position == 0 else "first", sink)
