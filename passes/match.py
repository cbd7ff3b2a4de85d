"""Find attention: anchor at softmax or a fused node, walk forward to the product with v and backward to q @
k^T.

Nothing is rewritten here. The walk reads each node through the step tables (`steps.py`) and follows axes
through
views (`axes.py`); `verify.py` then decides. What cannot be explained becomes a `Refusal` that names the node.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from .anchors import Anchor, Refused
from .axes import (
    VIEWS,
    Axis,
    Layout,
    apply_view,
    is_one,
    leaves,
    overloads,
    pair,
    provenance,
    resolve,
    shape_of,
)
from .cone import SECOND_SHAPE_ONLY, SHAPE_ONLY
from .contraction import Contraction, Label, read_contraction
from .mask import MASKED
from .site import Reason
from .steps import SCORE_STEPS, WEIGHT_STEPS, Effect, Row

aten = torch.ops.aten

MAX_WALK = 40
"""Longest walk from softmax to a contraction, in nodes."""


@dataclass
class Traced:
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
    trace: list[Traced]
    body: list[Node]
    spelling: list[str] = field(default_factory=list)
    contractions: tuple[Node, ...] = ()


def short_name(node: Node) -> str:
    """`matmul` for `aten.matmul.default`."""
    return str(node.target).removeprefix("aten.").split(".")[0] if node.op == "call_function" else node.op


def reads_shape_only(user: Node, node: Node) -> bool:
    """`user` reads the size or dtype of `node` and none of its values."""
    places = [i for i, argument in enumerate(user.args) if argument is node]
    return (user.target in SHAPE_ONLY and places == [0]) or (
        user.target in SECOND_SHAPE_ONLY and places == [1]
    )


def real_users(node: Node) -> list[Node]:
    """Users that read values: not metadata asserts, not size reads, not dead nodes, not the test of a NaN
    guard.
    """
    users = [u for u in node.users if (u.users or u.op == "output") and not reads_shape_only(u, node)]
    return [u for u in users if not _tests_for_nan(u, users)]


def _tests_for_nan(user: Node, others: list[Node]) -> bool:
    """`user` is the isnan of a tensor whose only reader replaces the NaNs of the same tensor."""
    return user.target is aten.isnan.default and all(reader in others for reader in user.users)


# --- backward: from softmax to the scores -------------------------------------------------------------------


def _score_paths(
    node: Node, rows: dict[Any, Row], depth: int = 0
) -> Iterator[tuple[Contraction, list[Node]]]:
    """Contractions the scores may come from, nearest first, each with the nodes between it and `node`."""
    contraction = read_contraction(node)
    if contraction is not None:
        yield contraction, []
        return
    if depth >= MAX_WALK or node.op != "call_function":
        return
    for source in _carriers(node, rows):
        for found, path in _score_paths(source, rows, depth + 1):
            yield found, [*path, node]


def _carriers(node: Node, rows: dict[Any, Row]) -> list[Node]:
    """The arguments of `node` that may carry the scores."""
    if node.target is aten.cat.default:
        tensors = node.args[0]
        assert isinstance(tensors, (list, tuple))
        return [t for t in tensors if isinstance(t, Node)] if len(tensors) == 2 else []
    row = rows.get(node.target)
    if row is None:
        return []
    found = []
    for position in row.carriers:
        argument = node.args[position] if position < len(node.args) else None
        if not isinstance(argument, Node) or argument in found:
            continue
        if node.target in VIEWS or shape_of(argument) == shape_of(node):
            found.append(argument)
    return found


def _furthest(node: Node, rows: dict[Any, Row]) -> Node:
    """The first node behind `node` that no row explains, along the first carrier."""
    for _ in range(MAX_WALK):
        carriers = _carriers(node, rows)
        if not carriers:
            return node
        node = carriers[0]
    return node


def _read_step(node: Node, scores: Node, layout: Layout, rows: dict[Any, Row]) -> tuple[list[Effect], Layout]:
    """Effects of one node and the layout after it."""
    if node.target is aten.cat.default:
        return [_read_sink(node, scores)], layout
    effects = rows[node.target].read(node, scores)
    if isinstance(effects, str):
        raise Refused(Reason.SCORE_STEP, node, effects, short_name(node))
    if node.target in VIEWS:
        after = apply_view(node, layout)
        if after is None and shape_of(node) != shape_of(scores):
            raise Refused(
                Reason.AXES,
                node,
                "a view regroups the axes of the scores in a way that cannot be followed",
                "axes",
            )
        layout = layout if after is None else after
    return effects, resolve(layout)


def _read_sink(node: Node, scores: Node) -> Effect:
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


# --- forward: from softmax to the product with v -----------------------------------------------------------


def _walk_weights(anchor: Anchor, rows: dict[Any, Row]) -> tuple[list[Node], Node]:
    """The nodes between softmax and the product with v, and that product."""
    path: list[Node] = []
    current = anchor.node
    for _ in range(MAX_WALK):
        users = real_users(current)
        if len(users) != 1:
            raise _not_one_user(current, users, rows)
        user = users[0]
        if read_contraction(user) is not None:
            return path, user
        if user.op == "output":
            raise Refused(
                Reason.NOT_ATTENTION,
                current,
                "the softmax is an output of the graph and multiplies no value",
                "weights",
            )
        if not (user.target in rows and current in _weight_carriers(user, rows)) and not _is_sink_slice(user):
            raise _unexplained_weights(current, user)
        path.append(user)
        current = user
    raise Refused(
        Reason.NOT_ATTENTION, current, f"no product with a value within {MAX_WALK} nodes", "weights"
    )


def _weight_carriers(node: Node, rows: dict[Any, Row]) -> list[Node]:
    return [
        a for i in rows[node.target].carriers if i < len(node.args) and isinstance(a := node.args[i], Node)
    ]


def _is_sink_slice(node: Node) -> bool:
    return node.target in (aten.slice.Tensor, aten.narrow.default)


def _reaches_contraction(node: Node, rows: dict[Any, Row], depth: int = 8, skip_self: bool = False) -> bool:
    if read_contraction(node) is not None:
        return True
    if depth == 0 or (node.target not in rows and not _is_sink_slice(node) and not skip_self):
        return False
    return any(_reaches_contraction(user, rows, depth - 1) for user in real_users(node))


def _not_one_user(current: Node, users: list[Node], rows: dict[Any, Row]) -> Refused:
    if not users:
        return Refused(Reason.NOT_ATTENTION, current, "the result of the softmax is not used", "weights")
    if any(_reaches_contraction(user, rows) for user in users):
        names = ", ".join(sorted(str(user) for user in users))
        return Refused(
            Reason.WEIGHTS_ESCAPE,
            current,
            f"the attention weights are used {len(users)} times ({names})",
            "weights",
        )
    return Refused(Reason.NOT_ATTENTION, current, "the result of the softmax multiplies no value", "weights")


MIXERS = frozenset(
    overloads("linear.default", "conv2d.default", "convolution.default", "conv1d.default", "conv2d.padding")
)


def _unexplained_weights(current: Node, user: Node) -> Refused:
    if user.target in MIXERS:
        return Refused(
            Reason.HEAD_MIXING, user, "the weights of different heads are mixed by a projection", "weights"
        )
    if user.target in (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor):
        return Refused(
            Reason.VALUE_STEP,
            user,
            f"the attention weights go through {short_name(user)} before the values",
            "weights",
        )
    return Refused(
        Reason.NOT_ATTENTION,
        user,
        f"after the softmax comes {short_name(user)}, not a product with a value",
        "weights",
    )


# --- the walk -----------------------------------------------------------------------------------------------


def walk(
    anchor: Anchor, score_steps: Sequence[Row] = SCORE_STEPS, weight_steps: Sequence[Row] = WEIGHT_STEPS
) -> Walk:
    """Explain everything between q, k, v and the output of the attention at `anchor`, or raise Refused."""
    score_rows = {target: row for row in score_steps for target in row.targets}
    weight_rows = {target: row for row in weight_steps for target in row.targets}
    try:
        weight_path, output = _walk_weights(anchor, weight_rows)
    except Refused as refused:
        # What follows the softmax of a router or a classifier says nothing about attention.
        raise (
            refused if _has_scores(anchor, score_rows) else _unexplained_scores(anchor, score_rows)
        ) from None
    refusal: Refused | None = None
    for contraction, path in _score_paths(anchor.scores, score_rows):
        try:
            return _explain(anchor, contraction, path, weight_path, output, score_rows, weight_rows)
        except Refused as candidate:
            refusal = refusal or candidate
    if refusal is not None:
        raise refusal
    raise _unexplained_scores(anchor, score_rows)


def _has_scores(anchor: Anchor, rows: dict[Any, Row]) -> bool:
    return next(_score_paths(anchor.scores, rows), None) is not None


def _unexplained_scores(anchor: Anchor, rows: dict[Any, Row]) -> Refused:
    """Why no product of queries and keys was found behind the softmax."""
    culprit = _furthest(anchor.scores, rows)
    if _mixes_scores(culprit, rows):
        if culprit.target in MIXERS:
            message = "the scores of different heads are mixed by a projection"
            return Refused(Reason.HEAD_MIXING, culprit, message, "scores")
        message = f"{short_name(culprit)} on the scores is not understood"
        return Refused(Reason.SCORE_STEP, culprit, message, "scores")
    message = f"the softmax reads {short_name(culprit)}, not a product of queries and keys"
    return Refused(Reason.NOT_ATTENTION, culprit, message, "scores")


def _mixes_scores(culprit: Node, rows: dict[Any, Row]) -> bool:
    """The first argument of `culprit` comes from a contraction through score steps."""
    argument = culprit.args[0] if culprit.op == "call_function" and culprit.args else None
    return isinstance(argument, Node) and next(_score_paths(argument, rows), None) is not None


def find_lookalikes(graph: Graph, score_steps: Sequence[Row] = SCORE_STEPS) -> Iterator[Node]:
    """Sigmoids that stand where attention has its softmax: between a product of two tensors and one with
    values.
    """
    score_rows = {target: row for row in score_steps for target in row.targets}
    weight_rows = {target: row for row in WEIGHT_STEPS for target in row.targets}
    for node in graph.nodes:
        if node.target is aten.sigmoid.default and _reaches_contraction(node, weight_rows, skip_self=True):
            if next(_score_paths(node.args[0], score_rows), None) is not None:
                yield node


def _explain(
    anchor: Anchor,
    scores: Contraction,
    path: list[Node],
    weight_path: list[Node],
    output: Node,
    score_rows: dict[Any, Row],
    weight_rows: dict[Any, Row],
) -> Walk:
    left_chain, right_chain = provenance(scores.left), provenance(scores.right)
    left = _axes_by_label(scores.left_labels, left_chain, scores.left)
    right = _axes_by_label(scores.right_labels, right_chain, scores.right)
    batch: list[tuple[Axis, Axis]] = []
    layout = _output_layout(scores, left, right, batch)

    trace, spelling = _start(scores, layout)
    inner = list(anchor.inner)
    shifted = False
    current = scores.node
    for node in path:
        effects, layout = _read_step(node, current, layout, score_rows)
        for effect in effects:
            shifted = shifted or effect.kind == "shift"
            inner += _between(effect.term, current) if effect.kind == "shift" else []
            if shifted and not _ignores_shift(effect):
                message = f"{short_name(node)} after the row maximum was subtracted is not understood"
                raise Refused(Reason.SCORE_STEP, node, message, "shift")
        trace += [Traced(effect, layout) for effect in effects if effect.kind != "shift"]
        spelling += [] if node.target in VIEWS and not effects else [short_name(node)]
        current = node
    key_axis = leaves(layout[anchor.dim])
    trace.append(Traced(anchor.effect, layout))
    spelling.append("softmax")

    left_only = [leaves(left[label]) for label in scores.left_labels if label not in scores.right_labels]
    right_only = [leaves(right[label]) for label in scores.right_labels if label not in scores.left_labels]
    if key_axis in right_only:
        key_on_right = True
    elif key_axis in left_only:
        key_on_right = False
    else:
        mixing = (
            not right_only
            or not left_only
            or any(set(key_axis) <= set(axis) for axis in left_only + right_only)
        )
        reason = Reason.HEAD_MIXING if mixing and _is_parameter(scores.right) else Reason.SOFTMAX_AXIS
        raise Refused(
            reason, anchor.node, "the softmax does not run over the keys of the product it reads", "softmax"
        )

    current = anchor.node
    for node in weight_path:
        if _is_sink_slice(node) and node.target not in weight_rows or _drops_sink(node, current, trace):
            trace.append(Traced(_read_sink_slice(node, current, layout, key_axis, trace), layout))
            spelling.append("slice")
        else:
            effects, layout = _read_step(node, current, layout, weight_rows)
            trace += [Traced(effect, layout) for effect in effects]
            spelling += [] if node.target in VIEWS and not effects else [short_name(node)]
        current = node
    spelling.append(short_name(output))

    values = read_contraction(output)
    assert values is not None
    if values.addend is not None or values.alpha != 1.0:
        raise Refused(Reason.VALUE_STEP, output, "the product with the values also adds or scales", "value")
    weights_left = values.left is current
    weight_labels, value_labels = (
        (values.left_labels, values.right_labels)
        if weights_left
        else (values.right_labels, values.left_labels)
    )
    value = values.right if weights_left else values.left
    if value is current:
        raise Refused(Reason.NOT_ATTENTION, output, "the weights are multiplied by themselves", "value")
    value_chain = provenance(value)
    value_axes = _axes_by_label(value_labels, value_chain, value)
    weight_axes: dict[Label, Axis] = dict(zip(weight_labels, resolve(layout), strict=True))
    if leaves(weight_axes[values.contracted]) != leaves(key_axis):
        mixing = _is_parameter(value)
        raise Refused(
            Reason.HEAD_MIXING if mixing else Reason.SOFTMAX_AXIS,
            output,
            "the product after the softmax does not sum over the axis that the softmax normalises",
            "value",
        )
    value_batch: list[tuple[Axis, Axis]] = []
    sides = (weight_axes, value_axes) if weights_left else (value_axes, weight_axes)
    output_layout = _output_layout(values, *sides, value_batch, weights_left)
    features = [label for label in value_labels if label not in weight_labels]
    if len(features) != 1:
        raise Refused(Reason.AXES, output, "the values have no single feature axis", "value")

    key, query = (scores.right, scores.left) if key_on_right else (scores.left, scores.right)
    if _is_parameter(key):
        raise Refused(
            Reason.NOT_ATTENTION,
            scores.node,
            "the keys are a parameter: a router or a codebook, not a sequence",
            "keys",
        )
    key_axes, query_axes = (right, left) if key_on_right else (left, right)
    return Walk(
        anchor=anchor.node,
        query=query,
        key=key,
        value=value,
        output=output,
        query_chain=left_chain if key_on_right else right_chain,
        key_chain=right_chain if key_on_right else left_chain,
        value_chain=value_chain,
        batch=batch,
        query_leads=key_on_right,
        value_batch=value_batch,
        query_own=left_only if key_on_right else right_only,
        key_axis=key_axis,
        value_key_axis=value_axes[values.contracted],
        query_feature=query_axes[scores.contracted],
        key_feature=key_axes[scores.contracted],
        value_feature=value_axes[features[0]],
        output_layout=output_layout,
        trace=trace,
        body=[scores.node, *path, *inner, anchor.node, *weight_path, *_nan_tests(weight_path)],
        spelling=spelling,
        contractions=(scores.node, output),
    )


def _ignores_shift(effect: Effect) -> bool:
    """Softmax after this step still does not see that whole rows were shifted before it."""
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


def _nan_tests(path: list[Node]) -> list[Node]:
    return [test for node in path for test in node.all_input_nodes if test.target is aten.isnan.default]


def _is_parameter(node: Node) -> bool:
    source = provenance(node)[0][0]
    leaf = source.meta.get("leaf")
    if leaf is not None:
        return bool(leaf.kind == "parameter")
    if source.op != "get_attr" or source.graph.owning_module is None:
        return False
    value = operator.attrgetter(str(source.target))(source.graph.owning_module)
    return isinstance(value, torch.nn.Parameter)


def _axes_by_label(
    labels: tuple[Label, ...], chain: list[tuple[Node, Layout]], node: Node
) -> dict[Label, Axis]:
    if not chain:
        raise Refused(Reason.SHAPE_UNKNOWN, node, f"{node} was traced without a shape", "axes")
    return dict(zip(labels, resolve(chain[-1][1]), strict=True))


def _output_layout(
    contraction: Contraction,
    left: dict[Label, Axis],
    right: dict[Label, Axis],
    batch: list[tuple[Axis, Axis]],
    left_leads: bool = True,
) -> Layout:
    """Axes of a contraction's result; batch axes take the leading operand's atoms, and the pairs go into
    `batch`.
    """
    lead, follow = (left, right) if left_leads else (right, left)
    layout = []
    for label in contraction.out_labels:
        if label in lead and label in follow:
            first, second = leaves(lead[label]), leaves(follow[label])
            if first and second and pair(first, second) is None:
                raise Refused(
                    Reason.AXES,
                    contraction.node,
                    "the batch and head axes of the operands do not line up",
                    "axes",
                )
            batch.append((first, second))
            layout.append(leaves(first) or second)
        else:
            layout.append(leaves(lead[label] if label in lead else follow[label]))
    if pair(left[contraction.contracted], right[contraction.contracted]) is None:
        raise Refused(Reason.AXES, contraction.node, "the summed axes of the operands do not line up", "axes")
    return tuple(layout)


def _start(scores: Contraction, layout: Layout) -> tuple[list[Traced], list[str]]:
    trace = []
    if scores.alpha != 1.0:
        trace.append(Traced(Effect("scale", scores.alpha), layout))
    if scores.addend is not None:
        trace.append(Traced(Effect("add", scores.beta, scores.addend), layout))
    return trace, [short_name(scores.node)]


def _drops_sink(node: Node, weights: Node, trace: list[Traced]) -> bool:
    """`node` is a slice that really cuts, after a sink column was added."""
    return (
        _is_sink_slice(node)
        and shape_of(node) != shape_of(weights)
        and any(t.effect.kind == "sink" for t in trace)
    )


def _read_sink_slice(
    node: Node, weights: Node, layout: Layout, key_axis: Axis, trace: list[Traced]
) -> Effect:
    if not any(t.effect.kind == "sink" for t in trace):
        raise Refused(Reason.VALUE_STEP, node, "part of the attention weights is cut off", "weights")
    _, dim, start = (*node.args, None, None)[:3]
    side = next(t.effect.value for t in trace if t.effect.kind == "sink")
    before, after = shape_of(weights), shape_of(node)
    assert before is not None and after is not None
    # Without its sink column a row has the keys again.
    fits = (
        dim in (-1, len(layout) - 1)
        and leaves(layout[-1]) == leaves(key_axis)
        and after[-1] + 1 == before[-1]
        and (start in (None, 0) if side == "last" else start == 1)
    )
    if not fits:
        raise Refused(
            Reason.VALUE_STEP, node, "the slice after the softmax does not remove the sink column", "weights"
        )
    return Effect("drop_sink")


def term_layout(node: Node, term: Node, layout: Layout) -> Layout:
    """The layout of a tensor that broadcasts against scores laid out as `layout`."""
    shape = shape_of(term)
    if shape is None or len(shape) > len(layout):
        raise Refused(Reason.AXES, node, f"{term} does not broadcast to the scores", "axes")
    aligned = resolve(layout)[len(layout) - len(shape) :]
    # Broadcasting leaves two cases, one long or whole, even where two inputs name one batch size differently.
    return tuple(() if is_one(size) else axis for size, axis in zip(shape, aligned, strict=True))
