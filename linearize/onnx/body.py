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

Tensors of blocks are [B, Hkv, repeats, blocks, rows, features], repeats = H // Hkv, 1 for keys and values.

Decoding is many small operators, so their number is its time. What a node reads of `mask`, `past_length` and
constants alone is the same for every layer, and onnxruntime computes it once. Sizes are such constants where
`function` is told them, so that every index and mask is found once a call instead of once a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import onnx_ir as ir
from onnxscript import build_function

from .schema import DOMAIN, FAMILIES, OPERATORS, WINDOW_SOFTMAX

Value = ir.Value
_FLOAT = ir.DataType.FLOAT
_INT64 = ir.DataType.INT64
_TYPES = {"float": _FLOAT, "int64": _INT64, "bool": ir.DataType.BOOL}
_ATTRIBUTES = {"int": ir.AttributeType.INT, "float": ir.AttributeType.FLOAT}
_END = 2**63 - 1
_LEAST_BLOCK = 64
"""Smaller groups share a block: a product of few rows is all overhead."""
_LEAST_NORM = 1e-19
"""The square of a smaller one is no normal float32."""


class Sizes(NamedTuple):
    """Sizes that all nodes of one operator in a file share."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    taps: int
    """Columns of conv_weight; any where there is none."""


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
    attributes = [ir.Attr(given, _ATTRIBUTES[kind], None) for given, kind in operator.attributes]
    return build_function(
        lambda op, *given: _bodies()[name](_Ops(op), sizes, *given),
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
    bodies[WINDOW_SOFTMAX] = _window_softmax
    return bodies


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

    def split(self, x: Value, *sizes: Value | int) -> Sequence[Value]:
        """x cut along its last axis."""
        return self._op.Split(x, self.shape(*sizes), axis=-1, _outputs=len(sizes))

    def ceil_div(self, x: Value, by: Value) -> Value:
        return self._op.Div(self._op.Sub(self._op.Add(x, by), self.ints(1)), by)

    def unit(self, x: Value) -> Value:
        """x as float, divided by its norm where the attribute `normalize` is 1; zeros stay zeros."""
        x = self.float(x)
        normalize = self._op.Cast(self.attribute("normalize", "int"), to=int(ir.DataType.BOOL))
        least = self._op.Squeeze(self._op.Where(normalize, _LEAST_NORM, 1.0))
        most = self._op.Squeeze(self._op.Where(normalize, math.inf, 1.0))
        norm = self._op.ReduceL2(x, self.ints(-1), keepdims=1)
        return self._op.Div(x, self._op.Clip(norm, least, most))

    def rows(self, x: Value, index: Value, width: Value) -> Value:
        """Rows of x [..., width] seen as [n, width], at `index` [...] -> [..., width]."""
        return self._op.Gather(self.reshape(x, -1, width), index, axis=0)


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


class _Heads:
    """Sizes of a node, [1] each."""

    def __init__(
        self,
        op: _Ops,
        sizes: Sizes | None,
        query: Value,
        key: Value,
        value: Value,
        conv_weight: Value | None = None,
    ) -> None:
        if sizes is None:
            self.heads, self.kv_heads = op.size(query, 1), op.size(key, 1)
            self.dim, self.value_dim = op.size(key, 3), op.size(value, 3)
            self.taps = op.ints(0) if conv_weight is None else op.size(conv_weight, 1)
        else:
            self.heads, self.kv_heads, self.dim, self.value_dim, self.taps = map(op.ints, sizes)
        self.repeats = op.Div(self.heads, self.kv_heads)
        self.width = op.Add(self.dim, self.value_dim)

    def table(self, op: _Ops, x: Value) -> Value:
        """[H] in the shape in which it meets blocks, [Hkv, repeats, 1, 1, 1]."""
        return op.reshape(x, self.kv_heads, self.repeats, 1, 1, 1)


class _Tokens:
    """The call's tokens by rank: which row of [window | call | one row of zeros] comes at which place.

    block: queries that are computed together, at most all of them. window: rows before the call.
    """

    def __init__(self, op: _Ops, heads: _Heads, mask: Value, block: Value, window: Value) -> None:
        self.op, self.heads, self.mask, self.window = op, heads, mask, window
        self.batch, self.length = op.size(mask, 0), op.size(mask, 1)
        seen = op.CumSum(op.Cast(mask, to=int(_INT64)), op.Constant(value_int=1))
        self.rank = op.Sub(seen, op.ints(1))  # [B, T]
        self.count = op.ReduceMax(seen, op.ints(1), keepdims=1)  # [B, 1]
        self.block = op.Min(block, self.length)
        self.blocks = op.ceil_div(self.length, self.block)
        self.padded = op.Mul(self.blocks, self.block)
        self.nothing = op.Add(window, self.length)
        self.counted = op.arange(op.Add(self.nothing, op.ints(1)))
        rows = op.cut(self.counted, window, self.nothing, 0)
        rows, _ = op.TopK(op.Where(mask, rows, self.nothing), self.length, axis=1, largest=0, _outputs=2)
        each = op.Shape(self.count)
        held = op.Expand(op.cut(self.counted, op.ints(0), window, 0), each)
        self.order = op.Concat(held, rows, op.Expand(self.nothing, each), axis=1)
        """[B, window + T + 1], the last one nothing"""

    def places(self, width: Value) -> Value:
        """The first `width` places from where each block's window begins, [blocks, width]."""
        op = self.op
        first = op.column(op.Mul(op.arange(self.blocks), self.block))
        return op.Add(first, op.arange(width))

    def source(self, places: Value) -> Value:
        """Rows at `places` [blocks, n] -> [B, blocks, n]."""
        return self.op.Gather(self.order, self.op.Min(places, self.nothing), axis=1)

    def row_of(self, source: Value) -> Value:
        """Rows in [B Hkv (window + T + 1)]: source [B, blocks, n] -> [B, Hkv, 1, blocks, n]."""
        op, heads = self.op, self.heads
        first = op.Mul(op.arange(op.Mul(self.batch, heads.kv_heads)), op.Add(self.nothing, op.ints(1)))
        return op.Add(op.reshape(first, -1, heads.kv_heads, 1, 1, 1), op.Unsqueeze(source, op.ints(1, 2)))

    def leaving(self, source: Value, places: Value) -> Value:
        """Of spans at `source` the first rows that leave the window, [B, blocks, block]: as many as tokens
        came, from the oldest on."""
        op = self.op
        oldest = op.cut(source, op.ints(0), self.block, 2)
        return op.Where(self.gone(places), oldest, self.nothing)

    def gone(self, places: Value) -> Value:
        """Whether the row at a place leaves the window, [B, blocks, block]."""
        op = self.op
        return op.Less(op.cut(places, op.ints(0), self.block, 1), op.column(self.count))

    def with_nothing(self, *rows: Value, width: Value) -> Value:
        """Rows [B, Hkv, n, width] one after the other, and one of zeros."""
        op = self.op
        nothing = op.ConstantOfShape(op.shape(self.batch, self.heads.kv_heads, 1, width))
        return op.Concat(*rows, nothing, axis=2)

    def queries(self, query: Value, source: Value) -> Value:
        """[B, H, T, D] -> [B, Hkv, repeats, blocks, block, D]; anything at a place without token."""
        op, heads = self.op, self.heads
        asked = op.cut(source, self.window, op.ints(_END), 2)
        asked = op.Sub(op.Min(asked, op.Sub(self.nothing, op.ints(1))), self.window)
        first = op.Mul(op.arange(op.Mul(self.batch, heads.heads)), self.length)
        first = op.reshape(first, -1, heads.kv_heads, heads.repeats, 1, 1)
        return op.rows(query, op.Add(first, op.Unsqueeze(asked, op.ints(1, 2))), heads.dim)

    def columns(self, out: Value, width: Value) -> Value:
        """Inverse of `queries`, [B, Hkv, repeats, blocks, block, width] -> [B, H, T, width]; zero for no
        token."""
        op, heads = self.op, self.heads
        first = op.Mul(op.arange(op.Mul(self.batch, heads.heads)), self.padded)
        place = op.column(op.Max(self.rank, op.ints(0)))
        out = op.rows(out, op.Add(op.reshape(first, -1, heads.heads, 1), place), width)
        return op.Where(op.Unsqueeze(self.mask, op.ints(1, 3)), out, 0.0)

    def last(self, joined: Value) -> Value:
        """The window after the call, of joined [B, Hkv, window + T + 1, width]."""
        op = self.op
        held = op.cut(self.counted, op.ints(0), self.window, 0)
        kept = op.GatherElements(self.order, op.Add(self.count, held), axis=1)
        index = op.Squeeze(self.row_of(op.column(kept)), op.ints(2, 3))
        return op.rows(joined, index, self.heads.width)


class _Recent:
    """A causal call in blocks, each with its span: the window before its first query, and its own tokens.

    block: as for `_Tokens`. rows: of the window. query [B, H, T, D], key [B, Hkv, T, D] and value
    [B, Hkv, T, Dv] are float; past_window [B, Hkv, rows, D + Dv] is of any type.

    joined [B, Hkv, rows + T + 1, D + Dv]: the window, the call, nothing. places [blocks, span], source
    [B, blocks, span], index [B, Hkv, 1, blocks, span]: what lies where. keys [B, Hkv, 1, blocks, span, D],
    values [..., Dv], queries [B, Hkv, repeats, blocks, block, D]. lag [block, span]: of a key behind a query.
    """

    def __init__(
        self,
        op: _Ops,
        heads: _Heads,
        mask: Value,
        block: Value,
        rows: Value,
        query: Value,
        key: Value,
        value: Value,
        past_window: Value,
    ) -> None:
        self.op, self.heads, self.past_window = op, heads, past_window
        self.tokens = tokens = _Tokens(op, heads, mask, block, rows)
        self.span = op.Add(rows, tokens.block)
        new = op.Concat(key, value, axis=3)
        self.joined = tokens.with_nothing(op.float(past_window), new, width=heads.width)
        self.places = tokens.places(self.span)
        self.source = tokens.source(self.places)
        self.index = tokens.row_of(self.source)
        near = op.rows(self.joined, self.index, heads.width)
        self.keys, self.values = op.split(near, heads.dim, heads.value_dim)
        self.queries = tokens.queries(query, self.source)
        self.lag = _lags(op, tokens.block, self.span, rows)

    def leaving(self) -> Value:
        """Where the rows are that leave the window, [B, Hkv, 1, blocks, block]."""
        return self.tokens.row_of(self.tokens.leaving(self.source, self.places))

    def outputs(self, out: Value, present_recurrent: Value, query: Value) -> Sequence[Value]:
        """The node's, of out [B, Hkv, repeats, blocks, block, Dv]; query: of the type T."""
        op = self.op
        return (
            op.CastLike(self.tokens.columns(out, self.heads.value_dim), query),
            present_recurrent,
            op.CastLike(self.tokens.last(self.joined), self.past_window),
        )


def _block(op: _Ops, group: Value) -> Value:
    """A multiple of the group that makes products worth their call."""
    return op.Mul(group, op.ceil_div(op.ints(_LEAST_BLOCK), group))


def _transposed(op: _Ops, x: Value) -> Value:
    return op.Transpose(x, perm=[0, 1, 2, 3, 5, 4])


def _causal(
    act: Act,
    op: _Ops,
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
    group, heads = op.attribute("group_size", "int"), _Heads(op, sizes, query, key, value, conv_weight)
    window = op.Sub(op.Max(group, heads.taps, op.ints(2)), op.ints(1))  # schema.window_rows
    unit_query, unit_key = op.unit(query), op.unit(key)
    recent = _Recent(
        op, heads, mask, _block(op, group), window, unit_query, unit_key, op.float(value), past_window
    )

    # Counted from a multiple of the group before the first row of the window, which may lie before token 0.
    begin = op.reshape(op.Add(past_length, op.Mul(window, op.Sub(group, op.ints(1)))), -1, 1, 1)
    of_key = op.Div(op.Add(begin, op.arange(recent.span)), group)  # [B, 1, span]
    asked = op.column(op.Add(op.arange(recent.tokens.block), window))
    of_query = op.Div(op.Add(begin, asked), group)  # [B, block, 1]
    own = op.And(op.Equal(of_key, of_query), op.GreaterOrEqual(recent.lag, op.ints(0)))
    own, other = (_met(op, op.float(keep)) for keep in (own, op.Less(of_key, of_query)))

    scores = op.MatMul(recent.queries, _transposed(op, recent.keys))
    alpha = heads.table(op, alpha)
    weights = act(op, scores, op.Mul(own, heads.table(op, local_scale)), op.Mul(other, alpha))
    out = op.MatMul(op.Add(weights, _band(op, conv_weight, recent.lag, heads)), recent.values)

    old = op.rows(recent.joined, recent.leaving(), heads.width)
    before, present_recurrent = _running_sum(op, past_recurrent, *op.split(old, heads.dim, heads.value_dim))
    out = op.Add(out, op.MatMul(op.Mul(recent.queries, alpha), before))
    return recent.outputs(out, present_recurrent, query)


def _met(op: _Ops, x: Value) -> Value:
    """[B, block, span] in the shape in which it meets scores."""
    return op.Unsqueeze(x, op.ints(1, 2, 3))


def _lags(op: _Ops, block: Value, span: Value, window: Value) -> Value:
    """Distance from a key of the span back from a query of its block, [block, span]."""
    return op.Sub(op.column(op.Add(op.arange(block), window)), op.arange(span))


def _band(op: _Ops, conv_weight: Value, tap: Value, heads: _Heads) -> Value:
    """The convolution as weights: conv_weight [H, K] at `tap` [block, span] -> [Hkv, repeats, 1, block,
    span]."""
    padded = op.Concat(conv_weight, op.ConstantOfShape(op.shape(heads.heads, 1)), axis=1)
    padded = op.reshape(padded, heads.kv_heads, heads.repeats, 1, -1)
    inside = op.And(op.GreaterOrEqual(tap, op.ints(0)), op.Less(tap, heads.taps))
    return op.Gather(padded, op.Where(inside, tap, heads.taps), axis=3)


def _running_sum(op: _Ops, recurrent: Value, keys: Value, values: Value) -> tuple[Value, Value]:
    """Sums of key^T value: before each block [B, Hkv, 1, blocks, D, Dv], after the last [B, Hkv, D, Dv]."""
    sums = op.MatMul(_transposed(op, keys), values)
    before = op.CumSum(sums, op.Constant(value_int=3), exclusive=1)
    before = op.Add(op.Unsqueeze(recurrent, op.ints(2, 3)), before)
    return before, op.Add(recurrent, op.ReduceSum(sums, op.ints(2, 3), keepdims=0))


def _bidirectional(
    act: Act,
    op: _Ops,
    sizes: Sizes | None,
    query: Value,
    key: Value,
    value: Value,
    mask: Value,
    alpha: Value,
    local_scale: Value,
    conv_weight: Value,
) -> Value:
    group, heads = op.attribute("group_size", "int"), _Heads(op, sizes, query, key, value, conv_weight)
    tokens = _Tokens(op, heads, mask, _block(op, group), op.ints(0))
    block = tokens.block

    source = tokens.source(tokens.places(block))
    index = tokens.row_of(source)
    keys = op.rows(tokens.with_nothing(op.unit(key), width=heads.dim), index, heads.dim)
    by_rank = tokens.with_nothing(op.float(value), width=heads.value_dim)
    values = op.rows(by_rank, index, heads.value_dim)
    queries = tokens.queries(op.unit(query), source)

    scores = op.MatMul(queries, _transposed(op, keys))
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
    band = _band(op, conv_weight, _lags(op, block, around, both), heads)
    out = op.Add(out, op.MatMul(band, around_values))

    keys, values = (
        op.Reshape(x, op.shape(0, 0, 1, 1, -1, width))
        for x, width in ((keys, heads.dim), (values, heads.value_dim))
    )
    total = op.MatMul(_transposed(op, keys), values)
    out = op.Add(out, op.MatMul(op.Mul(queries, heads.table(op, alpha)), total))
    return op.CastLike(tokens.columns(out, heads.value_dim), query)


def _cross(
    act: Act,
    op: _Ops,
    sizes: Sizes | None,
    query: Value,
    key: Value,
    value: Value,
    mask: Value,
    start: Value,
    alpha: Value,
    local_scale: Value,
) -> Value:
    group, heads = op.attribute("group_size", "int"), _Heads(op, sizes, query, key, value)
    tokens = _Tokens(op, heads, mask, group, op.ints(0))  # of the keys
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

    scores = op.MatMul(queries, _transposed(op, near_keys))
    out = op.MatMul(act(op, scores, heads.table(op, local_scale), None), near_values)
    total = op.Unsqueeze(op.MatMul(op.Transpose(keys, perm=[0, 1, 3, 2]), values), op.ints(2, 3))
    out = op.Add(out, op.MatMul(op.Mul(queries, heads.table(op, alpha)), total))
    out = op.reshape(out, -1, heads.heads, op.Mul(blocks, group), heads.value_dim)
    return op.CastLike(op.cut(out, ahead, op.Add(ahead, length), 2), query)


def _window_softmax(
    op: _Ops,
    sizes: Sizes | None,
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
    near_tokens, heads = op.attribute("window", "int"), _Heads(op, sizes, query, key, value)
    window = op.Sub(op.Max(near_tokens, op.ints(2)), op.ints(1))  # schema.window_rows
    block = op.Max(near_tokens, op.ints(_LEAST_BLOCK))
    recent = _Recent(
        op, heads, mask, block, window, op.float(query), op.float(key), op.float(value), past_window
    )
    tokens, lag = recent.tokens, recent.lag
    kv_heads, dim, value_dim = heads.kv_heads, heads.dim, heads.value_dim

    position = op.Add(op.reshape(op.Sub(past_length, window), -1, 1, 1), recent.places)  # [B, blocks, span]
    known = op.GreaterOrEqual(position, op.ints(0))
    there = op.Unsqueeze(known, op.ints(1, 2, 4))  # [B, 1, 1, blocks, 1, span]
    close = op.And(op.And(op.GreaterOrEqual(lag, op.ints(0)), op.Less(lag, near_tokens)), there)
    scores = op.MatMul(recent.queries, _transposed(op, recent.keys))
    scores = op.Where(close, op.Mul(scores, op.attribute("scale", "float")), -3.0e38)
    largest = op.ReduceMax(scores, op.ints(-1), keepdims=1)
    weights = op.Mul(op.Exp(op.Sub(scores, largest)), op.float(close))
    sum_near = op.ReduceSum(weights, op.ints(-1), keepdims=1)
    of_near = op.Div(op.MatMul(weights, recent.values), sum_near)

    maps = op.reshape(query_map, kv_heads, heads.repeats, 1, dim, dim)
    asked = _positive(op, recent.queries, op.Transpose(maps, perm=[0, 1, 2, 4, 3]))
    keys, values = op.split(recent.joined, dim, value_dim)
    features = _positive(op, keys, op.Transpose(key_map, perm=[0, 2, 1]))
    ones = op.Expand(op.Constant(value_float=1.0), op.shape(tokens.batch, kv_heads, op.size(values, 2), 1))
    counted = op.Concat(features, values, ones, axis=3)
    widths = op.Mul(dim, op.ints(2)), op.Add(value_dim, op.ints(1))
    width = op.Add(*widths)
    # A row that no token left in the window counts nothing.
    far = op.And(op.GreaterOrEqual(lag, near_tokens), there)
    seen = op.rows(counted, recent.index, width)
    seen_features, seen_values = op.split(seen, *widths)
    weights = op.Mul(op.MatMul(asked, _transposed(op, seen_features)), op.float(far))
    gone = op.And(tokens.gone(recent.places), op.cut(known, op.ints(0), tokens.block, 2))
    old = op.rows(counted, recent.leaving(), width)
    old_features, old_values = op.split(old, *widths)
    old_values = op.Mul(old_values, op.float(op.Unsqueeze(gone, op.ints(1, 2, 5))))
    before, present_recurrent = _running_sum(op, past_recurrent, old_features, old_values)
    of_far = op.Add(op.MatMul(weights, seen_values), op.MatMul(asked, before))
    of_far, total = op.split(of_far, value_dim, 1)
    some = op.Greater(total, 0.0)
    total = op.Where(some, total, 1.0)
    log_far = op.Add(op.Log(total), heads.table(op, far_weight))
    share = op.Sigmoid(op.Sub(log_far, op.Add(largest, op.Log(sum_near))))
    share = op.Where(some, share, 0.0)
    out = op.Add(of_near, op.Mul(share, op.Sub(op.Div(of_far, total), of_near)))
    return recent.outputs(out, present_recurrent, query)


def _positive(op: _Ops, x: Value, maps: Value) -> Value:
    """[softmax(x M), softmax(-x M)] + 1e-6"""
    x = op.MatMul(x, maps)
    both = op.Concat(op.Softmax(x, axis=-1), op.Softmax(op.Neg(x), axis=-1), axis=-1)
    return op.Add(both, 1e-6)
