"""Read a walk whose ends are known, node by node: the axes of both products and every step between them.

In this order, so that the first thing that does not hold is what a refusal names: the score product, the
steps up to the softmax, the side of the keys, the steps behind the softmax, the product with the values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from .anchors import Anchor, Refused
from .axes import VIEWS, Axis, Layout, apply_view, leaves, pair, provenance, resolve, shape_of
from .contraction import Contraction, Label, Labels, read_contraction
from .graphs import attribute
from .mask import MASKED
from .scores import read_sink
from .site import Reason
from .steps import Effect, StepRule
from .walk import PlacedEffect, Rules, Walk, join_axes, short_name
from .weights import drops_sink, is_slice, read_sink_slice

aten = torch.ops.aten

AxisPairs = list[tuple[Axis, Axis]]


@dataclass(frozen=True)
class _Operand:
    """One side of a product: the views it came through, and its axes by their label in the product."""

    node: Node
    labels: Labels
    chain: list[tuple[Node, Layout]]
    axes: dict[Label, Axis]

    def only(self, other: _Operand) -> list[Axis]:
        """The axes that the other side does not have."""
        return [leaves(self.axes[label]) for label in self.labels if label not in other.labels]


@dataclass
class _Reading:
    """What has been read so far: up to which node, and how the scores are laid out there."""

    node: Node
    layout: Layout
    effects: list[PlacedEffect] = field(default_factory=list)
    spelling: list[str] = field(default_factory=list)

    def note(self, node: Node, effects: list[Effect], layout: Layout, name: str = "") -> None:
        """Go on to `node`; views that have no effect are not part of the spelling."""
        self.effects += [PlacedEffect(effect, layout) for effect in effects if effect.kind != "shift"]
        self.spelling += [] if node.target in VIEWS and not effects else [name or short_name(node)]
        self.node, self.layout = node, layout


@dataclass(frozen=True)
class _Values:
    """The product with the values: its operand, its feature axis, and the layout of its result."""

    operand: _Operand
    key_axis: Axis
    feature: Axis
    batch: AxisPairs
    layout: Layout


def explain(
    anchor: Anchor,
    scores: Contraction,
    score_path: list[Node],
    weight_path: list[Node],
    output: Node,
    rules: Rules,
) -> Walk:
    """The walk from `scores` through the softmax at `anchor` to `output`, or Refused.

    score_path, weight_path: the nodes between the softmax and the two products.
    """
    left = _operand(scores.left, scores.left_labels)
    right = _operand(scores.right, scores.right_labels)
    batch: AxisPairs = []
    reading = _start(scores, _product_layout(scores, left.axes, right.axes, batch))
    shifts = _read_scores(reading, score_path, rules.scores)
    key_axis = leaves(reading.layout[anchor.dim])
    reading.effects.append(PlacedEffect(anchor.effect, reading.layout))
    reading.spelling.append("softmax")
    key_on_right = _keys_are_right(anchor, left, right, key_axis)
    reading.node = anchor.node
    _read_weights(reading, weight_path, key_axis, rules.weights)
    reading.spelling.append(short_name(output))
    values = _read_values(reading, output, key_axis)
    query, key = (left, right) if key_on_right else (right, left)
    if _is_parameter(key.node):
        message = "the keys are a parameter: a router or a codebook, not a sequence"
        raise Refused(Reason.NOT_ATTENTION, scores.node, message, "keys")
    inner = [*anchor.inner, *shifts]
    return Walk(
        anchor=anchor.node,
        query=query.node,
        key=key.node,
        value=values.operand.node,
        output=output,
        query_chain=query.chain,
        key_chain=key.chain,
        value_chain=values.operand.chain,
        batch=batch,
        query_leads=key_on_right,
        value_batch=values.batch,
        query_own=query.only(key),
        key_axis=key_axis,
        value_key_axis=values.key_axis,
        query_feature=query.axes[scores.contracted],
        key_feature=key.axes[scores.contracted],
        value_feature=values.feature,
        output_layout=values.layout,
        effects=reading.effects,
        body=[scores.node, *score_path, *inner, anchor.node, *weight_path, *_nan_tests(weight_path)],
        spelling=reading.spelling,
        contractions=(scores.node, output),
    )


# --- the score product --------------------------------------------------------------------------------------


def _operand(node: Node, labels: Labels) -> _Operand:
    chain = provenance(node)
    if not chain:
        raise Refused(Reason.SHAPE_UNKNOWN, node, f"{node} was traced without a shape", "axes")
    return _Operand(node, labels, chain, dict(zip(labels, resolve(chain[-1][1]), strict=True)))


def _product_layout(
    product: Contraction,
    left: dict[Label, Axis],
    right: dict[Label, Axis],
    batch: AxisPairs,
    left_leads: bool = True,
) -> Layout:
    """Axes of a product's result; batch axes take the leading side's atoms, and the pairs go into `batch`."""
    lead, follow = (left, right) if left_leads else (right, left)
    layout = []
    for label in product.out_labels:
        if label in lead and label in follow:
            both, joined = join_axes(product.node, lead[label], follow[label])
            batch.append(both)
            layout.append(joined)
        else:
            layout.append(leaves(lead[label] if label in lead else follow[label]))
    if pair(left[product.contracted], right[product.contracted]) is None:
        raise Refused(Reason.AXES, product.node, "the summed axes of the operands do not line up", "axes")
    return tuple(layout)


def _start(scores: Contraction, layout: Layout) -> _Reading:
    """The reading at the score product, which may scale and add by itself (`baddbmm`)."""
    effects = []
    if scores.alpha != 1.0:
        effects.append(PlacedEffect(Effect("scale", scores.alpha), layout))
    if scores.addend is not None:
        effects.append(PlacedEffect(Effect("add", scores.beta, scores.addend), layout))
    return _Reading(scores.node, layout, effects, [short_name(scores.node)])


# --- the steps ----------------------------------------------------------------------------------------------


def _read_step(
    node: Node, scores: Node, layout: Layout, rules: dict[Any, StepRule]
) -> tuple[list[Effect], Layout]:
    """Effects of one node and the layout after it."""
    if node.target is aten.cat.default:
        return [read_sink(node, scores)], layout
    effects = rules[node.target].read(node, scores)
    if isinstance(effects, str):
        raise Refused(Reason.SCORE_STEP, node, effects, short_name(node))
    if node.target in VIEWS:
        after = apply_view(node, layout)
        if after is None and shape_of(node) != shape_of(scores):
            message = "a view regroups the axes of the scores in a way that cannot be followed"
            raise Refused(Reason.AXES, node, message, "axes")
        layout = layout if after is None else after
    return effects, resolve(layout)


def _read_scores(reading: _Reading, path: list[Node], rules: dict[Any, StepRule]) -> list[Node]:
    """Read the steps before the softmax; returns the nodes that compute row maxima which are subtracted."""
    shifts: list[Node] = []
    shifted = False
    for node in path:
        effects, layout = _read_step(node, reading.node, reading.layout, rules)
        for effect in effects:
            if effect.kind == "shift":
                shifted = True
                shifts += _between(effect.term, reading.node)
            if shifted and not _ignores_shift(effect):
                message = f"{short_name(node)} after the row maximum was subtracted is not understood"
                raise Refused(Reason.SCORE_STEP, node, message, "shift")
        reading.note(node, effects, layout)
    return shifts


def _ignores_shift(effect: Effect) -> bool:
    """Whether softmax after this step still does not see that whole rows were shifted before it."""
    if effect.kind in ("scale", "div", "fill", "keep"):
        constant = effect.value is not None
        return constant and (effect.kind in ("scale", "div") or effect.value <= MASKED)
    return effect.kind in ("shift", "add", "offset", "cast")


def _between(node: Node | None, source: Node) -> list[Node]:
    """`node` and what it is computed through from `source`, along first arguments."""
    found = []
    while isinstance(node, Node) and node is not source:
        found.append(node)
        first = node.args[0]
        node = first if isinstance(first, Node) else None
    return found


def _keys_are_right(anchor: Anchor, left: _Operand, right: _Operand, key_axis: Axis) -> bool:
    """Whether the axis of the softmax belongs to the right operand alone (the keys), or to the left one."""
    left_only, right_only = left.only(right), right.only(left)
    if key_axis in right_only:
        return True
    if key_axis in left_only:
        return False
    mixing = (
        not right_only or not left_only or any(set(key_axis) <= set(axis) for axis in left_only + right_only)
    )
    reason = Reason.HEAD_MIXING if mixing and _is_parameter(right.node) else Reason.SOFTMAX_AXIS
    message = "the softmax does not run over the keys of the product it reads"
    raise Refused(reason, anchor.node, message, "softmax")


def _read_weights(reading: _Reading, path: list[Node], key_axis: Axis, rules: dict[Any, StepRule]) -> None:
    """Read the steps between the softmax and the product with the values."""
    for node in path:
        if is_slice(node) and node.target not in rules or drops_sink(node, reading.node, reading.effects):
            effects = [read_sink_slice(node, reading.node, reading.layout, key_axis, reading.effects)]
            reading.note(node, effects, reading.layout, "slice")
        else:
            reading.note(node, *_read_step(node, reading.node, reading.layout, rules))


# --- the product with the values ----------------------------------------------------------------------------


def _read_values(reading: _Reading, output: Node, key_axis: Axis) -> _Values:
    """The product of the weights, as read, with the values."""
    product = read_contraction(output)
    assert product is not None
    if product.addend is not None or product.alpha != 1.0:
        raise Refused(Reason.VALUE_STEP, output, "the product with the values also adds or scales", "value")
    sides = ((product.left, product.left_labels), (product.right, product.right_labels))
    weights_left = product.left is reading.node
    (_, weight_labels), (value, value_labels) = sides if weights_left else sides[::-1]
    if value is reading.node:
        raise Refused(Reason.NOT_ATTENTION, output, "the weights are multiplied by themselves", "value")
    operand = _operand(value, value_labels)
    weight_axes: dict[Label, Axis] = dict(zip(weight_labels, resolve(reading.layout), strict=True))
    if leaves(weight_axes[product.contracted]) != leaves(key_axis):
        reason = Reason.HEAD_MIXING if _is_parameter(value) else Reason.SOFTMAX_AXIS
        message = "the product after the softmax does not sum over the axis that the softmax normalises"
        raise Refused(reason, output, message, "value")
    batch: AxisPairs = []
    axes = (weight_axes, operand.axes) if weights_left else (operand.axes, weight_axes)
    layout = _product_layout(product, *axes, batch, weights_left)
    features = [label for label in value_labels if label not in weight_labels]
    if len(features) != 1:
        raise Refused(Reason.AXES, output, "the values have no single feature axis", "value")
    return _Values(operand, operand.axes[product.contracted], operand.axes[features[0]], batch, layout)


def _nan_tests(path: list[Node]) -> list[Node]:
    """The isnan nodes of NaN guards on the path."""
    return [test for node in path for test in node.all_input_nodes if test.target is aten.isnan.default]


def _is_parameter(node: Node) -> bool:
    """Whether `node` is a parameter, or views of one."""
    source = provenance(node)[0][0]
    leaf = source.meta.get("leaf")
    if leaf is not None:
        return bool(leaf.kind == "parameter")
    if source.op != "get_attr" or source.graph.owning_module is None:
        return False
    return isinstance(attribute(source), torch.nn.Parameter)
