"""What the bodies of all operators are written with: a builder, and a call's tokens in blocks.

The causal bodies in blocks of L queries (L a multiple of the group, or all tokens of a short call):

    rows    the window's R rows, then the call's real tokens, then nothing: a row is found by its rank, so
            padding costs an index and no branch
    span    of block n: the R rows before its first query and its own L, read by index

Tensors of blocks are [B, Hkv, repeats, blocks, rows, features], repeats = H // Hkv, 1 for keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import onnx_ir as ir

Value = ir.Value
INT64, FLOAT = ir.DataType.INT64, ir.DataType.FLOAT
ATTRIBUTES = {"int": ir.AttributeType.INT, "float": ir.AttributeType.FLOAT}
_END = 2**63 - 1
LEAST_BLOCK = 64
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


class Builder:
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
        reference = ir.RefAttr(f"value_{kind}", name, ATTRIBUTES[kind])
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
        return self._op.Cast(x, to=int(FLOAT))

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

    def transposed(self, x: Value) -> Value:
        """The last two of six axes exchanged."""
        return self._op.Transpose(x, perm=[0, 1, 2, 3, 5, 4])

    def scan(
        self, step: Callable[..., Sequence[Value]], states: Sequence[Value], given: Sequence[Value]
    ) -> Sequence[Value]:
        """A loop over the first axis of `given`: step(op, *states, *rows of given) -> states and one output,
        all of them float with four axes. The last states, and the outputs stacked.

        `step` may read values from around the loop.
        """
        names = [f"state_{n}" for n in range(len(states))], [f"row_{n}" for n in range(len(given))]
        held = [ir.Value(name=name, type=ir.TensorType(FLOAT)) for name in names[0]]
        rows = [ir.Value(name=name, type=x.type) for name, x in zip(names[1], given, strict=True)]
        # onnxruntime takes no output whose number of axes is unknown.
        made = [
            ir.Value(name=f"next_{name}", type=ir.TensorType(FLOAT), shape=ir.Shape([None] * 4))
            for name in (*names[0], "output")
        ]
        builder = self._op.builder
        builder.push_module("step")  # for names of its own: the loop shares a scope with what is around it
        body = builder.subgraph(lambda op, *values: step(Builder(op), *values), [*held, *rows], made)
        builder.pop_module()
        return self._op.Scan(*states, *given, body=body, num_scan_inputs=len(given), _outputs=len(made))

    def lags(self, block: Value, span: Value, window: Value) -> Value:
        """Distance from a key of the span back from a query of its block, [block, span]."""
        return self._op.Sub(self.column(self._op.Add(self.arange(block), window)), self.arange(span))

    def running_sum(self, recurrent: Value, keys: Value, values: Value) -> tuple[Value, Value]:
        """Sums of key^T value: before each block [B, Hkv, 1, blocks, D, Dv], and after the last
        [B, Hkv, D, Dv]."""
        sums = self._op.MatMul(self.transposed(keys), values)
        before = self._op.CumSum(sums, self._op.Constant(value_int=3), exclusive=1)
        before = self._op.Add(self._op.Unsqueeze(recurrent, self.ints(2, 3)), before)
        return before, self._op.Add(recurrent, self._op.ReduceSum(sums, self.ints(2, 3), keepdims=0))


class Heads:
    """Sizes of a node, [1] each."""

    def __init__(
        self,
        op: Builder,
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

    def table(self, op: Builder, x: Value) -> Value:
        """[H] in the shape in which it meets blocks, [Hkv, repeats, 1, 1, 1]."""
        return op.reshape(x, self.kv_heads, self.repeats, 1, 1, 1)


class Tokens:
    """The call's tokens by rank: which row of [window | call | one row of zeros] comes at which place.

    block: queries that are computed together, at most all of them. window: rows before the call.
    """

    def __init__(self, op: Builder, heads: Heads, mask: Value, block: Value, window: Value) -> None:
        self.op, self.heads, self.mask, self.window = op, heads, mask, window
        self.batch, self.length = op.size(mask, 0), op.size(mask, 1)
        seen = op.CumSum(op.Cast(mask, to=int(INT64)), op.Constant(value_int=1))
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


class Recent:
    """A causal call in blocks, each with its span: the window before its first query, and its own tokens.

    block: as for `Tokens`. rows: of the window. query [B, H, T, D], key [B, Hkv, T, D] and value
    [B, Hkv, T, Dv] are float; past_window [B, Hkv, rows, D + Dv] is of any type.

    joined [B, Hkv, rows + T + 1, D + Dv]: the window, the call, nothing. places [blocks, span], source
    [B, blocks, span], index [B, Hkv, 1, blocks, span]: what lies where. keys [B, Hkv, 1, blocks, span, D],
    values [..., Dv], queries [B, Hkv, repeats, blocks, block, D]. lag [block, span]: of a key behind a query.
    """

    def __init__(
        self,
        op: Builder,
        heads: Heads,
        mask: Value,
        block: Value,
        rows: Value,
        query: Value,
        key: Value,
        value: Value,
        past_window: Value,
    ) -> None:
        self.op, self.heads, self.past_window = op, heads, past_window
        self.tokens = tokens = Tokens(op, heads, mask, block, rows)
        self.span = op.Add(rows, tokens.block)
        new = op.Concat(key, value, axis=3)
        self.joined = tokens.with_nothing(op.float(past_window), new, width=heads.width)
        self.places = tokens.places(self.span)
        self.source = tokens.source(self.places)
        self.index = tokens.row_of(self.source)
        near = op.rows(self.joined, self.index, heads.width)
        self.keys, self.values = op.split(near, heads.dim, heads.value_dim)
        self.queries = tokens.queries(query, self.source)
        self.lag = op.lags(tokens.block, self.span, rows)

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


class StateCall(NamedTuple):
    """The inputs of a node with a state, but for a mechanism's own; shapes as in `schema.py`."""

    op: Builder
    heads: Heads
    query: Value
    key: Value
    value: Value
    mask: Value
    past_recurrent: Value
    past_window: Value
    past_length: Value

    def recent(self, block: Value, rows: Value) -> Recent:
        """In blocks of at least `block` queries, each with the `rows` of the window before it."""
        op = self.op
        block = op.Max(block, op.ints(LEAST_BLOCK))
        query, key, value = (op.float(x) for x in (self.query, self.key, self.value))
        return Recent(op, self.heads, self.mask, block, rows, query, key, value, self.past_window)

    def tokens(self, block: Value) -> Tokens:
        """The call's tokens alone, by rank."""
        return Tokens(self.op, self.heads, self.mask, block, self.op.ints(0))


class WholeCall(NamedTuple):
    """The inputs of a node without a state; shapes as in `schema.py`."""

    op: Builder
    heads: Heads
    query: Value
    key: Value
    value: Value
    mask: Value

    def tokens(self) -> Tokens:
        """The tokens by rank, in blocks."""
        return Tokens(self.op, self.heads, self.mask, self.op.ints(LEAST_BLOCK), self.op.ints(0))
