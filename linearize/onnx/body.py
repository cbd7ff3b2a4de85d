"""The operators of `schema.py` written in standard ONNX operators, one function each.

No control flow, no shape that depends on data, no contraction over an empty axis (onnxruntime 1.31.1's fused
transpose and product leaves its output unset there), no operator that a provider lacks for float32. Sums are
float32 whatever the type of the tokens.

The causal families in blocks of L queries (L a multiple of the group, or all tokens of a short call):

    rows    the window's R rows, then the call's real tokens, then nothing: a row is found by its rank, so
            padding costs an index and no branch
    span    of block n: the R rows before its first query and its own L, read by index
    out     = P span_v + alpha q (recurrent + sum of k^T v over the rows before the span)
    P       = act or linear by group, band of the convolution; the group border lies at the same place in
            every block of a row of the batch, so the masks have no block axis

What a node reads of `mask` and `past_length` is the same for every layer: onnxruntime computes it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import build_function

from .schema import DOMAIN, FAMILIES, OPERATORS, WINDOW_SOFTMAX

Value = ir.Value
_FLOAT = ir.DataType.FLOAT
_TYPES = {"float": _FLOAT, "int64": ir.DataType.INT64, "bool": ir.DataType.BOOL}
_ATTRIBUTES = {"int": ir.AttributeType.INT, "float": ir.AttributeType.FLOAT}
_END = 2**63 - 1
_LEAST_BLOCK = 64
"""Smaller groups share a block: a product of few rows is all overhead."""


def function(name: str, opset: int) -> ir.Function:
    """The body of operator `name` in operators of ONNX opset `opset`."""
    operator = OPERATORS[name]
    inputs = [
        ir.Value(name=given, type=ir.TensorType(_TYPES[kind]) if kind in _TYPES else None)
        for given, kind in operator.inputs
    ]
    attributes = [ir.Attr(given, _ATTRIBUTES[kind], None) for given, kind in operator.attributes]
    return build_function(
        _bodies()[name],
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
        bodies[name] = _with(_causal, act)
        bodies[f"Bidirectional{name}"] = _with(_bidirectional, act)
        bodies[f"Cross{name}"] = _with(_cross, act)
    bodies[WINDOW_SOFTMAX] = lambda op, *inputs: _window_softmax(_Ops(op), *inputs)
    return bodies


def _with(body: Callable[..., Any], act: Callable[..., Value]) -> Callable[..., Any]:
    return lambda op, *inputs: body(_Ops(op), act, *inputs)


class _Ops:
    """onnxscript's builder with the few idioms that the bodies repeat."""

    def __init__(self, op: Any) -> None:
        self._op = op
        self._constants: dict[tuple[int, ...], Value] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)

    def ints(self, *values: int) -> Value:
        if values not in self._constants:
            self._constants[values] = self._op.Constant(value_ints=list(values))
        return self._constants[values]

    def attribute(self, name: str, kind: str) -> Value:
        """An attribute of the node as a tensor [1]."""
        reference = ir.RefAttr(f"value_{kind}", name, _ATTRIBUTES[kind])
        return self._op.Reshape(self._op.Constant(**{f"value_{kind}": reference}), self.ints(1))

    def size(self, x: Value, axis: int) -> Value:
        """[1]"""
        return self._op.Shape(x, start=axis, end=axis + 1)

    def shape(self, *sizes: Value | int) -> Value:
        return self._op.Concat(*(self.ints(s) if isinstance(s, int) else s for s in sizes), axis=0)

    def reshape(self, x: Value, *sizes: Value | int) -> Value:
        return self._op.Reshape(x, self.shape(*sizes))

    def arange(self, count: Value) -> Value:
        """0 .. count - 1 for count [1]."""
        zero, one = self._op.Constant(value_int=0), self._op.Constant(value_int=1)
        return self._op.Range(zero, self._op.Squeeze(count), one)

    def column(self, x: Value) -> Value:
        return self._op.Unsqueeze(x, self.ints(1))

    def float(self, x: Value) -> Value:
        return self._op.Cast(x, to=int(_FLOAT))

    def cut(self, x: Value, start: Value, end: Value, axis: int) -> Value:
        return self._op.Slice(x, start, end, self.ints(axis))

    def zeros(self, *sizes: Value | int) -> Value:
        return self._op.ConstantOfShape(self.shape(*sizes))

    def ceil_div(self, x: Value, by: Value) -> Value:
        return self._op.Div(self._op.Sub(self._op.Add(x, by), self.ints(1)), by)

    def unit(self, x: Value, normalize: Value) -> Value:
        """x divided by its norm where `normalize`, float [1], is 1; unchanged where it is 0."""
        norm = self._op.ReduceL2(x, self.ints(-1), keepdims=1)
        some = self._op.Greater(norm, 0.0)
        return self._op.Div(x, self._op.Pow(self._op.Where(some, norm, 1.0), normalize))

    def rows(self, x: Value, index: Value, *sizes: Value | int) -> Value:
        """Rows of x [B, n, N, D] seen as [B n N, D] at `index` [...] -> [..., D], in the shape given."""
        flat = self._op.Reshape(x, self.shape(-1, self.size(x, 3)))
        return self.reshape(self._op.Gather(flat, index, axis=0), *sizes, self.size(x, 3))


Act = Callable[["_Ops", Value, Value, Value | None], Value]


def _relu2(op: _Ops, score: Value, own: Value, other: Value | None) -> Value:
    factor = op.Mul(own, op.Relu(score))  # s relu(s) is relu(s)^2
    return op.Mul(score, factor if other is None else op.Add(factor, other))


def _linear(op: _Ops, score: Value, own: Value, other: Value | None) -> Value:
    return op.Mul(score, own if other is None else op.Add(own, other))


def _laplace(op: _Ops, score: Value, own: Value, other: Value | None) -> Value:
    error = op.Erf(op.Mul(op.Sub(score, math.sqrt(0.5)), math.sqrt(2 * math.pi)))
    return _joined(op, score, own, op.Mul(op.Add(error, 1.0), 0.5), other)


def _collision(op: _Ops, score: Value, own: Value, other: Value | None) -> Value:
    act = op.Sub(1.0, op.Mul(op.Acos(op.Mul(score, 0.98)), 1 / math.pi))
    for _ in range(3):
        act = op.Mul(act, act)
    return _joined(op, score, own, act, other)


def _joined(op: _Ops, score: Value, own: Value, act: Value, other: Value | None) -> Value:
    weights = op.Mul(own, act)
    return weights if other is None else op.Add(weights, op.Mul(other, score))


_ACTIVATIONS: dict[str, Act] = {
    "relu2": _relu2,
    "linear": _linear,
    "laplace": _laplace,
    "yoso": _collision,
}
"""own * act(score) + other * score"""


class _Tokens:
    """The call's tokens by rank: which row of [window | call | one row of zeros] comes at which place.

    block: queries that are computed together, at most all of them. window: rows before the call.
    """

    def __init__(self, op: _Ops, mask: Value, block: Value, window: Value) -> None:
        self.op, self.mask, self.window = op, mask, window
        self.batch, self.length = op.size(mask, 0), op.size(mask, 1)
        seen = op.CumSum(op.Cast(mask, to=int(ir.DataType.INT64)), op.Constant(value_int=1))
        self.rank = op.Sub(seen, op.ints(1))  # [B, T]
        self.count = op.ReduceMax(seen, op.ints(1), keepdims=1)  # [B, 1]
        self.block = op.Min(block, self.length)
        self.blocks = op.ceil_div(self.length, self.block)
        self.padded = op.Mul(self.blocks, self.block)
        self.nothing = op.Add(window, self.length)
        # Columns that hold no token are all written to one place past the end, which is cut off.
        places = op.Expand(self.nothing, op.shape(self.batch, op.Add(self.padded, op.ints(1))))
        columns = op.Unsqueeze(op.Add(op.arange(self.length), window), op.ints(0))
        columns = op.Expand(columns, op.Shape(mask))
        target = op.Where(mask, self.rank, self.padded)
        order = op.ScatterElements(places, target, columns, axis=1)
        held = op.Expand(op.arange(window), op.shape(self.batch, window))
        self.order = op.Concat(held, op.cut(order, op.ints(0), self.padded, 1), axis=1)
        """[B, window + padded]"""

    def row_of(self, head: Value, source: Value, *axes: int) -> Value:
        """Rows in [B Hkv (window + T + 1)]: head [Hkv] and source [B, ...] -> [B, Hkv, ...]."""
        op = self.op
        first = op.Mul(op.arange(op.Mul(self.batch, head)), op.Add(self.nothing, op.ints(1)))
        first = op.reshape(first, self.batch, head, *axes)
        return op.Add(first, op.Unsqueeze(source, op.ints(1)))

    def queries(self, query: Value, kv_heads: Value, repeats: Value) -> Value:
        """float [B, H, T, D] -> [B, Hkv, blocks, R block, D], R query heads of a key/value head stacked."""
        op = self.op
        heads, dim = op.size(query, 1), op.size(query, 3)
        rows = op.Concat(query, op.zeros(self.batch, heads, 1, dim), axis=2)
        first = op.Mul(op.arange(op.Mul(self.batch, heads)), op.Add(self.length, op.ints(1)))
        first = op.reshape(first, self.batch, kv_heads, 1, repeats, 1)
        asked = op.Sub(op.cut(self.order, self.window, op.ints(_END), 1), self.window)
        asked = op.reshape(asked, self.batch, 1, self.blocks, 1, self.block)
        stacked = op.Mul(repeats, self.block)
        return op.rows(rows, op.Add(first, asked), self.batch, kv_heads, self.blocks, stacked)

    def columns(self, out: Value, kv_heads: Value, repeats: Value) -> Value:
        """Inverse of `queries`, [B, Hkv, blocks, R block, Dv] -> [B, H, T, Dv]; zero for no token."""
        out = _unstacked(self.op, out, self.op.Max(self.rank, self.op.ints(0)), self.block, kv_heads, repeats)
        keep = self.op.reshape(self.mask, self.batch, 1, self.length, 1)
        return self.op.Where(keep, out, 0.0)


def _unstacked(op: _Ops, out: Value, place: Value, block: Value, kv_heads: Value, repeats: Value) -> Value:
    """out [B, Hkv, blocks, R block, Dv] at `place` [B or 1, T], counted over the blocks -> [B, H, T, Dv]."""
    batch, features = op.size(out, 0), op.size(out, 4)
    of_block = op.Div(place, block)
    stacked = op.Mul(repeats, block)
    inside = op.Add(op.Mul(of_block, stacked), op.Sub(place, op.Mul(of_block, block)))
    first = op.Mul(op.arange(op.Mul(batch, kv_heads)), op.Mul(op.size(out, 2), stacked))
    first = op.Add(op.reshape(first, batch, kv_heads, 1, 1), op.column(op.Mul(op.arange(repeats), block)))
    index = op.Add(first, op.Unsqueeze(inside, op.ints(1, 2)))
    flat = op.Gather(op.Reshape(out, op.shape(-1, features)), index, axis=0)
    return op.reshape(flat, batch, op.Mul(kv_heads, repeats), op.size(place, 1), features)


class _Heads:
    """Sizes that every body needs, [1] each."""

    def __init__(self, op: _Ops, query: Value, key: Value, value: Value) -> None:
        self.heads, self.kv_heads = op.size(query, 1), op.size(key, 1)
        self.repeats = op.Div(self.heads, self.kv_heads)
        self.dim, self.value_dim = op.size(key, 3), op.size(value, 3)
        self.table = op.shape(1, self.kv_heads, 1, self.repeats, 1, 1)
        """Shape in which a table [H] meets [B, Hkv, blocks, R, block, ...]."""

    def split(self, op: _Ops, x: Value, block: Value) -> Value:
        """[B, Hkv, blocks, R block, n] -> [B, Hkv, blocks, R, block, n]"""
        return op.Reshape(x, op.shape(0, 0, 0, self.repeats, block, -1))

    def merge(self, op: _Ops, x: Value) -> Value:
        """Inverse of `split`."""
        shape = op.Concat(
            op.Shape(x, start=0, end=3), op.Mul(op.size(x, 3), op.size(x, 4)), op.size(x, 5), axis=0
        )
        return op.Reshape(x, shape)


def _block(op: _Ops, group: Value) -> Value:
    """A multiple of the group that makes products worth their call."""
    return op.Mul(group, op.ceil_div(op.ints(_LEAST_BLOCK), group))


def _transposed(op: _Ops, x: Value) -> Value:
    return op.Transpose(x, perm=[0, 1, 2, 4, 3])


def _causal(
    op: _Ops,
    act: Act,
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
    group, normalize = op.attribute("group_size", "int"), op.float(op.attribute("normalize", "int"))
    sizes, window = _Heads(op, query, key, value), op.size(past_window, 2)
    kv_heads = sizes.kv_heads
    tokens = _Tokens(op, mask, _block(op, group), window)
    batch, block, blocks = tokens.batch, tokens.block, tokens.blocks
    span = op.Add(window, block)

    new = op.Concat(op.unit(op.float(key), normalize), op.float(value), axis=3)
    joined = _with_zero_row(op, op.Concat(op.float(past_window), new, axis=2))
    keys = op.cut(joined, op.ints(0), sizes.dim, 3)
    values = op.cut(joined, sizes.dim, op.ints(_END), 3)
    near = _spans(op, tokens, kv_heads, span)
    near_keys = op.rows(keys, near, batch, kv_heads, blocks, span)
    near_values = op.rows(values, near, batch, kv_heads, blocks, span)
    queries = tokens.queries(op.unit(op.float(query), normalize), kv_heads, sizes.repeats)

    lag = _lags(op, block, span, window)
    visible = op.GreaterOrEqual(lag, op.ints(0))
    # Counted from a multiple of the group before the first row of the window, which may lie before token 0.
    begin = op.reshape(op.Add(past_length, op.Mul(window, op.Sub(group, op.ints(1)))), -1, 1, 1)
    row, column = op.column(op.arange(block)), op.arange(span)
    of_key = op.Div(op.Add(begin, column), group)  # [B, 1, span]
    of_query = op.Div(op.Add(begin, op.Add(row, window)), group)  # [B, block, 1]

    def weigh(keep: Value, table: Value) -> Value:
        """[B, Hkv, 1, R, block, span]"""
        return op.Mul(op.Unsqueeze(op.float(keep), op.ints(1, 2, 3)), op.Reshape(table, sizes.table))

    scores = sizes.split(op, op.MatMul(queries, _transposed(op, near_keys)), block)
    own = weigh(op.And(op.Equal(of_key, of_query), visible), local_scale)
    weights = act(op, scores, own, weigh(op.Less(of_key, of_query), alpha))
    weights = op.Add(weights, op.Unsqueeze(_band(op, conv_weight, lag, sizes), op.ints(0)))
    out = op.MatMul(sizes.merge(op, weights), near_values)

    leaving = _leaving(op, tokens, kv_heads)
    old_keys = op.rows(keys, leaving, batch, kv_heads, blocks, block)
    old_values = op.cut(near_values, op.ints(0), block, 3)
    before, present_recurrent = _running_sum(op, past_recurrent, old_keys, old_values, blocks)
    scaled = op.Mul(sizes.split(op, queries, block), op.Reshape(alpha, sizes.table))
    out = op.Add(out, op.MatMul(sizes.merge(op, scaled), before))
    output = tokens.columns(out, kv_heads, sizes.repeats)
    present_window = _last_rows(op, tokens, joined, kv_heads, window)
    return op.CastLike(output, query), present_recurrent, op.CastLike(present_window, past_window)


def _with_zero_row(op: _Ops, x: Value) -> Value:
    """[B, n, N, D] -> [B, n, N + 1, D]"""
    return op.Concat(x, op.zeros(op.size(x, 0), op.size(x, 1), 1, op.size(x, 3)), axis=2)


def _spans(op: _Ops, tokens: _Tokens, kv_heads: Value, span: Value) -> Value:
    """Rows of every block's span, [B, Hkv, blocks, span]."""
    first = op.column(op.Mul(op.arange(tokens.blocks), tokens.block))
    source = op.Gather(tokens.order, op.Add(first, op.arange(span)), axis=1)
    return tokens.row_of(kv_heads, source, 1, 1)


def _lags(op: _Ops, block: Value, span: Value, window: Value) -> Value:
    """Distance from a key of the span back from a query of its block, [block, span]."""
    return op.Sub(op.Add(op.column(op.arange(block)), window), op.arange(span))


def _band(op: _Ops, conv_weight: Value, tap: Value, sizes: _Heads) -> Value:
    """The convolution as weights: conv_weight [H, K] at `tap` [block, span] -> [Hkv, 1, R, block, span]."""
    taps = op.size(conv_weight, 1)
    padded = op.Concat(conv_weight, op.zeros(sizes.heads, 1), axis=1)
    inside = op.And(op.GreaterOrEqual(tap, op.ints(0)), op.Less(tap, taps))
    band = op.Gather(padded, op.Where(inside, tap, taps), axis=1)
    return op.Reshape(band, op.Concat(sizes.kv_heads, op.ints(1), sizes.repeats, op.Shape(tap), axis=0))


def _leaving(op: _Ops, tokens: _Tokens, kv_heads: Value) -> Value:
    """Rows [B, Hkv, blocks, block] that leave the window: as many as tokens came, from the oldest on."""
    oldest = op.cut(tokens.order, op.ints(0), tokens.padded, 1)
    leaves = op.Less(op.arange(tokens.padded), tokens.count)
    source = op.reshape(op.Where(leaves, oldest, tokens.nothing), tokens.batch, tokens.blocks, tokens.block)
    return tokens.row_of(kv_heads, source, 1, 1)


def _running_sum(
    op: _Ops, recurrent: Value, keys: Value, values: Value, blocks: Value
) -> tuple[Value, Value]:
    """Sums of key^T value before each block [B, Hkv, blocks, D, Dv], and after the last [B, Hkv, D, Dv]."""
    sums = op.MatMul(_transposed(op, keys), values)
    through = op.Concat(op.Unsqueeze(recurrent, op.ints(2)), sums, axis=2)
    through = op.CumSum(through, op.Constant(value_int=2))
    after = op.Squeeze(op.cut(through, blocks, op.ints(_END), 2), op.ints(2))
    return op.cut(through, op.ints(0), blocks, 2), after


def _last_rows(op: _Ops, tokens: _Tokens, joined: Value, kv_heads: Value, window: Value) -> Value:
    """The window after the call, [B, Hkv, window, D + Dv]."""
    kept = op.GatherElements(tokens.order, op.Add(tokens.count, op.arange(window)), axis=1)
    return op.rows(joined, tokens.row_of(kv_heads, kept, 1), tokens.batch, kv_heads, window)


def _bidirectional(
    op: _Ops,
    act: Act,
    query: Value,
    key: Value,
    value: Value,
    mask: Value,
    alpha: Value,
    local_scale: Value,
    conv_weight: Value,
) -> Value:
    group, normalize = op.attribute("group_size", "int"), op.float(op.attribute("normalize", "int"))
    sizes = _Heads(op, query, key, value)
    kv_heads = sizes.kv_heads
    tokens = _Tokens(op, mask, _block(op, group), op.ints(0))
    batch, block, blocks = tokens.batch, tokens.block, tokens.blocks

    index = tokens.row_of(kv_heads, op.reshape(tokens.order, batch, blocks, block), 1, 1)
    keys = _with_zero_row(op, op.unit(op.float(key), normalize))
    keys = op.rows(keys, index, batch, kv_heads, blocks, block)
    by_rank = _with_zero_row(op, op.float(value))
    values = op.rows(by_rank, index, batch, kv_heads, blocks, block)
    queries = tokens.queries(op.unit(op.float(query), normalize), kv_heads, sizes.repeats)

    scores = sizes.split(op, op.MatMul(queries, _transposed(op, keys)), block)
    place = op.Div(op.arange(block), group)
    same = op.float(op.Equal(op.column(place), place))  # [block, block]
    weights = act(op, scores, op.Mul(same, op.Reshape(local_scale, sizes.table)), None)
    out = op.MatMul(sizes.merge(op, weights), values)

    reach = op.Div(op.size(conv_weight, 1), op.ints(2))
    span = op.Add(block, op.Mul(reach, op.ints(2)))
    none = op.Expand(tokens.nothing, op.shape(batch, reach))
    order = op.Concat(none, tokens.order, none, axis=1)
    first = op.column(op.Mul(op.arange(blocks), block))
    source = op.Gather(order, op.Add(first, op.arange(span)), axis=1)
    around = op.rows(by_rank, tokens.row_of(kv_heads, source, 1, 1), batch, kv_heads, blocks, span)
    tap = op.Add(op.Sub(op.column(op.arange(block)), op.arange(span)), op.Mul(reach, op.ints(2)))
    band = op.reshape(_band(op, conv_weight, tap, sizes), 1, kv_heads, 1, op.Mul(sizes.repeats, block), span)
    out = op.Add(out, op.MatMul(band, around))

    long_keys = op.Reshape(keys, op.Concat(op.Shape(keys, start=0, end=2), op.ints(1, -1), sizes.dim, axis=0))
    long_values = op.Reshape(
        values, op.Concat(op.Shape(values, start=0, end=2), op.ints(1, -1), sizes.value_dim, axis=0)
    )
    total = op.MatMul(_transposed(op, long_keys), long_values)  # [B, Hkv, 1, D, Dv]
    scaled = op.Mul(sizes.split(op, queries, block), op.Reshape(alpha, sizes.table))
    out = op.Add(out, op.MatMul(sizes.merge(op, scaled), total))
    return op.CastLike(tokens.columns(out, kv_heads, sizes.repeats), query)


def _cross(
    op: _Ops,
    act: Act,
    query: Value,
    key: Value,
    value: Value,
    mask: Value,
    start: Value,
    alpha: Value,
    local_scale: Value,
) -> Value:
    group, normalize = op.attribute("group_size", "int"), op.float(op.attribute("normalize", "int"))
    sizes = _Heads(op, query, key, value)
    kv_heads, repeats = sizes.kv_heads, sizes.repeats
    tokens = _Tokens(op, mask, group, op.ints(0))  # of the keys
    batch, length = tokens.batch, op.size(query, 2)

    # Queries in blocks that begin where groups do; the first one is `ahead` rows into its block.
    ahead = op.Mod(start, group)
    blocks = op.ceil_div(op.Sub(op.Add(group, length), op.ints(1)), group)
    frame = op.Sub(op.arange(op.Mul(blocks, group)), ahead)
    asked = op.And(op.GreaterOrEqual(frame, op.ints(0)), op.Less(frame, length))
    asked = op.reshape(op.Where(asked, frame, length), blocks, 1, group)
    first = op.Mul(op.arange(op.Mul(batch, sizes.heads)), op.Add(length, op.ints(1)))
    index = op.Add(op.reshape(first, batch, kv_heads, 1, repeats, 1), asked)
    queries = _with_zero_row(op, op.unit(op.float(query), normalize))
    queries = op.rows(queries, index, batch, kv_heads, blocks, op.Mul(repeats, group))

    there = op.reshape(mask, batch, 1, tokens.length, 1)
    keys = op.unit(op.Where(there, op.float(key), 0.0), normalize)
    values = op.Where(there, op.float(value), 0.0)
    order = op.Concat(tokens.order, op.Expand(tokens.nothing, op.shape(batch, 1)), axis=1)
    own = op.Add(op.arange(op.Mul(blocks, group)), op.Mul(op.Div(start, group), group))
    source = op.Gather(order, op.Min(own, tokens.padded), axis=1)
    index = tokens.row_of(kv_heads, op.reshape(source, batch, blocks, group), 1, 1)
    near_keys = op.rows(_with_zero_row(op, keys), index, batch, kv_heads, blocks, group)
    near_values = op.rows(_with_zero_row(op, values), index, batch, kv_heads, blocks, group)

    scores = sizes.split(op, op.MatMul(queries, _transposed(op, near_keys)), group)
    weights = act(op, scores, op.Reshape(local_scale, sizes.table), None)
    out = op.MatMul(sizes.merge(op, weights), near_values)
    total = op.Unsqueeze(op.MatMul(op.Transpose(keys, perm=[0, 1, 3, 2]), values), op.ints(2))
    scaled = op.Mul(sizes.split(op, queries, group), op.Reshape(alpha, sizes.table))
    out = op.Add(out, op.MatMul(sizes.merge(op, scaled), total))
    place = op.Unsqueeze(op.Add(op.arange(length), ahead), op.ints(0))
    return op.CastLike(_unstacked(op, out, place, group, kv_heads, repeats), query)


def _window_softmax(
    op: _Ops,
    query: Value,
    key: Value,
    value: Value,
    mask: Value,
    past_recurrent: Value,
    past_window: Value,
    past_length: Value,
    query_map: Value,
    key_map: Value,
    far_weight: Value,
) -> Sequence[Value]:
    near_tokens = op.attribute("window", "int")
    sizes, window = _Heads(op, query, key, value), op.size(past_window, 2)
    kv_heads, repeats = sizes.kv_heads, sizes.repeats
    tokens = _Tokens(op, mask, op.Max(near_tokens, op.ints(_LEAST_BLOCK)), window)
    batch, block, blocks = tokens.batch, tokens.block, tokens.blocks
    span = op.Add(window, block)

    new = op.Concat(op.float(key), op.float(value), axis=3)
    joined = _with_zero_row(op, op.Concat(op.float(past_window), new, axis=2))
    keys = op.cut(joined, op.ints(0), sizes.dim, 3)
    values = op.cut(joined, sizes.dim, op.ints(_END), 3)
    near = _spans(op, tokens, kv_heads, span)
    near_keys = op.rows(keys, near, batch, kv_heads, blocks, span)
    near_values = op.rows(values, near, batch, kv_heads, blocks, span)
    queries = tokens.queries(op.float(query), kv_heads, repeats)

    lag = _lags(op, block, span, window)
    row = op.Add(op.reshape(op.Sub(past_length, window), -1, 1), op.arange(span))  # position, first block
    later = op.reshape(op.Mul(op.arange(blocks), block), 1, -1, 1)
    position = op.Add(op.Unsqueeze(row, op.ints(1)), later)  # [B, blocks, span]
    there = op.reshape(op.GreaterOrEqual(position, op.ints(0)), batch, 1, blocks, 1, 1, span)
    close = op.And(op.And(op.GreaterOrEqual(lag, op.ints(0)), op.Less(lag, near_tokens)), there)
    scores = sizes.split(op, op.MatMul(queries, _transposed(op, near_keys)), block)
    scores = op.Where(close, op.Mul(scores, op.attribute("scale", "float")), -3.0e38)
    largest = op.ReduceMax(scores, op.ints(-1), keepdims=1)
    weights = op.Mul(op.Exp(op.Sub(scores, largest)), op.float(close))
    sum_near = op.ReduceSum(weights, op.ints(-1), keepdims=1)
    of_near = sizes.split(op, op.MatMul(sizes.merge(op, weights), near_values), block)
    of_near = op.Div(of_near, sum_near)

    by_head = sizes.split(op, queries, block)
    maps = op.Reshape(query_map, op.shape(1, kv_heads, 1, repeats, sizes.dim, sizes.dim))
    asked = sizes.merge(op, _positive(op, by_head, maps, [0, 1, 2, 3, 5, 4]))
    maps = op.Unsqueeze(key_map, op.ints(0))
    features = _positive(op, keys, maps, [0, 1, 3, 2])
    ones = op.Add(op.zeros(batch, kv_heads, op.size(values, 2), 1), 1.0)
    counted = op.Concat(values, ones, axis=3)
    # A row that no token left in the window counts nothing.
    far = op.And(op.GreaterOrEqual(lag, near_tokens), there)
    seen_keys = op.rows(features, near, batch, kv_heads, blocks, span)
    seen_values = op.rows(counted, near, batch, kv_heads, blocks, span)
    weights = sizes.split(op, op.MatMul(asked, _transposed(op, seen_keys)), block)
    weights = sizes.merge(op, op.Mul(weights, op.float(far)))
    leaving = _leaving(op, tokens, kv_heads)
    old_keys = op.rows(features, leaving, batch, kv_heads, blocks, block)
    old_values = op.rows(counted, leaving, batch, kv_heads, blocks, block)
    gone = op.Less(op.arange(tokens.padded), tokens.count)
    gone = op.And(
        op.reshape(gone, batch, blocks, block),
        op.GreaterOrEqual(op.cut(position, op.ints(0), block, 2), op.ints(0)),
    )
    old_values = op.Mul(old_values, op.reshape(op.float(gone), batch, 1, blocks, block, 1))
    before, present_recurrent = _running_sum(op, past_recurrent, old_keys, old_values, blocks)
    of_far = op.Add(op.MatMul(weights, seen_values), op.MatMul(asked, before))
    of_far = sizes.split(op, of_far, block)
    total = op.cut(of_far, sizes.value_dim, op.ints(_END), 5)
    some = op.Greater(total, 0.0)
    total = op.Where(some, total, 1.0)
    log_far = op.Add(op.Log(total), op.Reshape(far_weight, sizes.table))
    share = op.Sigmoid(op.Sub(log_far, op.Add(largest, op.Log(sum_near))))
    share = op.Where(some, share, 0.0)
    of_far = op.Div(op.cut(of_far, op.ints(0), sizes.value_dim, 5), total)
    out = op.Add(of_near, op.Mul(share, op.Sub(of_far, of_near)))
    output = tokens.columns(sizes.merge(op, out), kv_heads, repeats)
    present_window = _last_rows(op, tokens, joined, kv_heads, window)
    return op.CastLike(output, query), present_recurrent, op.CastLike(present_window, past_window)


def _positive(op: _Ops, x: Value, maps: Value, transposed: Sequence[int]) -> Value:
    """[softmax(W x), softmax(-W x)] + 1e-6, W in the last two axes of `maps`."""
    x = op.MatMul(x, op.Transpose(maps, perm=list(transposed)))
    both = op.Concat(op.Softmax(x, axis=-1), op.Softmax(op.Neg(x), axis=-1), axis=-1)
    return op.Add(both, 1e-6)
