"""The operators of `schema.py` written in standard ONNX operators, one function each.

No shape that depends on data, no contraction over an empty axis (onnxruntime 1.31.1's fused transpose and
product leaves its output unset there), no operator that a provider lacks for float32. No control flow, but
one `Scan` over the blocks of a call where what a block keeps depends on the block before it. Sums are float32
whatever the type of the tokens.

The causal families in blocks of queries (`blocks.py`):

    out     = P span_v + alpha q (recurrent + sum of k^T v over the rows before the span)
    P       = act or linear by group, band of the convolution; the group border lies at the same place in
            every block of a row of the batch, so the masks have no block axis

A mechanism's own operator brings its formula along (`mechanisms/onnx_form.py`).

Decoding is many small operators, so their number is its time. What a node reads of `mask`, `past_length` and
constants alone is the same for every layer, and onnxruntime computes it once. Sizes are such constants where
`function` is told them, so that every index and mask is found once a call instead of once a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import onnx_ir as ir
from onnxscript import build_function

from ..mechanisms.onnx_form import StateOperator, WholeForm
from .blocks import (
    ATTRIBUTES,
    FLOAT,
    INT64,
    LEAST_BLOCK,
    Builder,
    Heads,
    Recent,
    StateCall,
    Tokens,
    WholeCall,
)
from .blocks import Sizes as Sizes
from .schema import DOMAIN, FAMILIES, OPERATORS, OWN

Value = ir.Value
_TYPES = {"float": FLOAT, "int64": INT64, "bool": ir.DataType.BOOL}


def function(name: str, opset: int, sizes: Sizes | None = None) -> ir.Function:
    """The body of operator `name` in operators of ONNX opset `opset`.

    sizes: those of every node in the file; without them the body holds for all sizes and asks its inputs,
    which is slower.
    """
    operator = OPERATORS[name]
    inputs = [
        ir.Value(name=given, type=ir.TensorType(_TYPES[kind]) if kind in _TYPES else None)
        for given, kind in operator.inputs
    ]
    attributes = [ir.Attr(given, ATTRIBUTES[kind], None) for given, kind in operator.attributes]
    return build_function(
        lambda op, *given: _bodies()[name](Builder(op), sizes, *given),
        inputs,
        domain=DOMAIN,
        name=name,
        attributes=attributes,
        opset_imports={"": opset},
    )


def _bodies() -> dict[str, Callable[..., Any]]:
    bodies: dict[str, Callable[..., Any]] = {}
    for activation, name in FAMILIES.items():
        act = _ACTIVATIONS[activation]
        bodies[name] = partial(_causal, act)
        bodies[f"Bidirectional{name}"] = partial(_bidirectional, act)
        bodies[f"Cross{name}"] = partial(_cross, act)
    for name, operator in OWN.items():
        bodies[name] = partial(_after_state, operator)
        if operator.whole is not None:
            bodies[f"Bidirectional{name}"] = partial(_whole, operator.whole)
    return bodies


Act = Callable[["Builder", Value, Value, Value | None], Value]


def _relu2(op: Builder, score: Value, own: Value, other: Value | None) -> Value:
    factor = op.Mul(own, op.Relu(score))  # s relu(s) is relu(s)^2
    return op.Mul(score, factor if other is None else op.Add(factor, other))


def _linear(op: Builder, score: Value, own: Value, other: Value | None) -> Value:
    return op.Mul(score, own if other is None else op.Add(own, other))


def _laplace(op: Builder, score: Value, own: Value, other: Value | None) -> Value:
    error = op.Erf(op.Mul(op.Sub(score, math.sqrt(0.5)), math.sqrt(2 * math.pi)))
    return _joined(op, score, own, op.Mul(op.Add(error, 1.0), 0.5), other)


def _collision(op: Builder, score: Value, own: Value, other: Value | None) -> Value:
    act = op.Sub(1.0, op.Mul(op.Acos(op.Mul(score, 0.98)), 1 / math.pi))
    for _ in range(3):
        act = op.Mul(act, act)
    return _joined(op, score, own, act, other)


def _joined(op: Builder, score: Value, own: Value, act: Value, other: Value | None) -> Value:
    weights = op.Mul(own, act)
    return weights if other is None else op.Add(weights, op.Mul(other, score))


_ACTIVATIONS: dict[str, Act] = {
    "relu2": _relu2,
    "linear": _linear,
    "laplace": _laplace,
    "yoso": _collision,
}
"""own * act(score) + other * score"""


def _block(op: Builder, group: Value) -> Value:
    """A multiple of the group that makes products worth their call."""
    return op.Mul(group, op.ceil_div(op.ints(LEAST_BLOCK), group))


def _causal(
    act: Act,
    op: Builder,
    sizes: Sizes | None,
    query: Value,
    key: Value,
    value: Value,
    mask: Value,
    past_recurrent: Value,
    past_window: Value,
    past_length: Value,
    alpha: Value,
    local_scale: Value,
    conv_weight: Value,
) -> Sequence[Value]:
    group, heads = op.attribute("group_size", "int"), Heads(op, sizes, query, key, value, conv_weight)
    window = op.Sub(op.Max(group, heads.taps, op.ints(2)), op.ints(1))  # schema.window_rows
    unit_query, unit_key = op.unit(query), op.unit(key)
    recent = Recent(
        op, heads, mask, _block(op, group), window, unit_query, unit_key, op.float(value), past_window
    )

    # Counted from a multiple of the group before the first row of the window, which may lie before token 0.
    begin = op.reshape(op.Add(past_length, op.Mul(window, op.Sub(group, op.ints(1)))), -1, 1, 1)
    of_key = op.Div(op.Add(begin, op.arange(recent.span)), group)  # [B, 1, span]
    asked = op.column(op.Add(op.arange(recent.tokens.block), window))
    of_query = op.Div(op.Add(begin, asked), group)  # [B, block, 1]
    own = op.And(op.Equal(of_key, of_query), op.GreaterOrEqual(recent.lag, op.ints(0)))
    own, other = (_met(op, op.float(keep)) for keep in (own, op.Less(of_key, of_query)))

    scores = op.MatMul(recent.queries, op.transposed(recent.keys))
    alpha = heads.table(op, alpha)
    weights = act(op, scores, op.Mul(own, heads.table(op, local_scale)), op.Mul(other, alpha))
    out = op.MatMul(op.Add(weights, _band(op, conv_weight, recent.lag, heads)), recent.values)

    old = op.rows(recent.joined, recent.leaving(), heads.width)
    before, present_recurrent = op.running_sum(past_recurrent, *op.split(old, heads.dim, heads.value_dim))
    out = op.Add(out, op.MatMul(op.Mul(recent.queries, alpha), before))
    return recent.outputs(out, present_recurrent, query)


def _met(op: Builder, x: Value) -> Value:
    """[B, block, span] in the shape in which it meets scores."""
    return op.Unsqueeze(x, op.ints(1, 2, 3))


def _band(op: Builder, conv_weight: Value, tap: Value, heads: Heads) -> Value:
    """The convolution as weights: conv_weight [H, K] at `tap` [block, span] -> [Hkv, repeats, 1, block,
    span]."""
    padded = op.Concat(conv_weight, op.ConstantOfShape(op.shape(heads.heads, 1)), axis=1)
    padded = op.reshape(padded, heads.kv_heads, heads.repeats, 1, -1)
    inside = op.And(op.GreaterOrEqual(tap, op.ints(0)), op.Less(tap, heads.taps))
    return op.Gather(padded, op.Where(inside, tap, heads.taps), axis=3)


def _bidirectional(
    act: Act,
    op: Builder,
    sizes: Sizes | None,
    query: Value,
    key: Value,
    value: Value,
    mask: Value,
    alpha: Value,
    local_scale: Value,
    conv_weight: Value,
) -> Value:
    group, heads = op.attribute("group_size", "int"), Heads(op, sizes, query, key, value, conv_weight)
    tokens = Tokens(op, heads, mask, _block(op, group), op.ints(0))
    block = tokens.block

    source = tokens.source(tokens.places(block))
    index = tokens.row_of(source)
    keys = op.rows(tokens.with_nothing(op.unit(key), width=heads.dim), index, heads.dim)
    by_rank = tokens.with_nothing(op.float(value), width=heads.value_dim)
    values = op.rows(by_rank, index, heads.value_dim)
    queries = tokens.queries(op.unit(query), source)

    scores = op.MatMul(queries, op.transposed(keys))
    place = op.Div(op.arange(block), group)
    same = op.float(op.Equal(op.column(place), place))  # [block, block]
    out = op.MatMul(act(op, scores, op.Mul(same, heads.table(op, local_scale)), None), values)

    # Taps reach over the block's ends; a place before the first token is nothing, as one after the last is.
    reach = op.Div(heads.taps, op.ints(2))
    both = op.Mul(reach, op.ints(2))
    around = op.Add(block, both)
    places = op.Sub(tokens.places(around), reach)
    places = op.Where(op.Less(places, op.ints(0)), tokens.nothing, places)
    around_values = op.rows(by_rank, tokens.row_of(tokens.source(places)), heads.value_dim)
    band = _band(op, conv_weight, op.lags(block, around, both), heads)
    out = op.Add(out, op.MatMul(band, around_values))

    keys, values = (
        op.Reshape(x, op.shape(0, 0, 1, 1, -1, width))
        for x, width in ((keys, heads.dim), (values, heads.value_dim))
    )
    total = op.MatMul(op.transposed(keys), values)
    out = op.Add(out, op.MatMul(op.Mul(queries, heads.table(op, alpha)), total))
    return op.CastLike(tokens.columns(out, heads.value_dim), query)


def _cross(
    act: Act,
    op: Builder,
    sizes: Sizes | None,
    query: Value,
    key: Value,
    value: Value,
    mask: Value,
    start: Value,
    alpha: Value,
    local_scale: Value,
) -> Value:
    group, heads = op.attribute("group_size", "int"), Heads(op, sizes, query, key, value)
    tokens = Tokens(op, heads, mask, group, op.ints(0))  # of the keys
    length = op.size(query, 2)

    # Queries in blocks that begin where groups do; the first one is `ahead` rows into its block.
    ahead = op.Mod(start, group)
    blocks = op.ceil_div(op.Add(ahead, length), group)
    frame = op.arange(op.Mul(blocks, group))
    asked = op.Max(op.Min(op.Sub(frame, ahead), op.Sub(length, op.ints(1))), op.ints(0))
    queries = op.Gather(op.unit(query), asked, axis=2)
    queries = op.reshape(queries, -1, heads.kv_heads, heads.repeats, blocks, group, heads.dim)

    there = op.Unsqueeze(mask, op.ints(1, 3))
    keys = op.unit(op.Where(there, op.float(key), 0.0))
    values = op.Where(there, op.float(value), 0.0)
    own = op.Add(frame, op.Mul(op.Div(start, group), group))
    index = tokens.row_of(tokens.source(op.reshape(own, blocks, group)))
    near_keys = op.rows(tokens.with_nothing(keys, width=heads.dim), index, heads.dim)
    near_values = op.rows(tokens.with_nothing(values, width=heads.value_dim), index, heads.value_dim)

    scores = op.MatMul(queries, op.transposed(near_keys))
    out = op.MatMul(act(op, scores, heads.table(op, local_scale), None), near_values)
    total = op.Unsqueeze(op.MatMul(op.Transpose(keys, perm=[0, 1, 3, 2]), values), op.ints(2, 3))
    out = op.Add(out, op.MatMul(op.Mul(queries, heads.table(op, alpha)), total))
    out = op.reshape(out, -1, heads.heads, op.Mul(blocks, group), heads.value_dim)
    return op.CastLike(op.cut(out, ahead, op.Add(ahead, length), 2), query)


def _after_state(
    operator: StateOperator,
    op: Builder,
    sizes: Sizes | None,
    query: Value,
    key: Value,
    value: Value,
    mask: Value,
    past_recurrent: Value,
    past_window: Value,
    past_length: Value,
    *own: Value,
) -> Sequence[Value]:
    """A mechanism's own operator."""
    heads = Heads(op, sizes, query, key, value)
    call = StateCall(op, heads, query, key, value, mask, past_recurrent, past_window, past_length)
    return operator.body(op, call, *own)


def _whole(
    form: WholeForm, op: Builder, sizes: Sizes | None, query: Value, key: Value, value: Value, mask: Value
) -> Value:
    """A mechanism's own operator on a whole sequence."""
    return form.bidirectional(op, WholeCall(op, Heads(op, sizes, query, key, value), query, key, value, mask))
