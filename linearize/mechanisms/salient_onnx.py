"""The attention of `kernels/salient.py` in ONNX: what `augmented` brings along for files.

`SalientAttention`, tokens after a state. With K = max(sinks + salient, 1) and R = K + window + 32:

    past_window     [B, Hkv, R, D + Dv]  [key | value] of the kept tokens, those that are kept for ever first,
                                         then of the last window + 32, newest last
    past_recurrent  [B, Hkv, R, 4]       of the same tokens: score, then the weights that the queries of the
                                         last three blocks gave, the newest block's last

Nothing else is needed, because the rest follows from past_length. A selection is made when the first token
of a block comes, so the state is for the block of its last token; how many rows are kept, and which of them
are sinks, is how many tokens have left the window. A call is one step for each block of 32 positions that it
touches, and rows of the batch may stand at different places in their blocks. A call of one token is one step.

`BidirectionalSalientAttention`, a whole sequence: no step reads another one, so there is no loop.

The functions here write operators as `onnx_form.py` says.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..kernels.salient import BLOCK, DECAY
from ..kernels.salient_chunk import VOTERS
from ..kernels.softmax import Scores
from .onnx_form import OperatorCall, StateOperator, WholeForm

_MOST = 3.0e38
"""Not infinite: masked scores and weights are multiplied."""


def node(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    conv_weight: Tensor | None,
    sizes: tuple[int, int, int],
    rule: Scores,
) -> OperatorCall:
    """The operator on query [B, H, T, D] (interleaved), key [B, Hkv, T, D] and value.

    conv_weight: [H, taps], taps at most window + 1. sizes: window, sinks, salient.
    """
    window, sinks, salient = sizes
    rows = max(sinks + salient, 1) + window + BLOCK
    cap = {} if rule.softcap is None else {"softcap": rule.softcap}
    return OperatorCall(
        CAPPED if cap else OPERATOR,
        query,
        key,
        value,
        own=(query.new_zeros(query.shape[1], 1) if conv_weight is None else conv_weight,),
        ints={"window": window, "sinks": sinks, "salient": salient},
        floats={"scale": rule.scale, **cap},
        rows=rows,
        sums=(rows, 4),
    )


def _whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    window: int,
    sinks: int,
    salient: int,
    scale: float,
    softcap: float | None,
) -> tuple[OperatorCall, Tensor | None, bool]:
    """`kernels/registered_salient.py` `salient_attention` as a node."""
    given = node(query.flatten(1, 2), key, value, None, (window, sinks, salient), Scores(scale, softcap))
    return given, key_mask, causal


class _Sizes:
    """The attributes, [1] each, and what follows from them."""

    def __init__(self, op: Any, capped: bool) -> None:
        self.window, self.sinks, salient = (
            op.attribute(name, "int") for name in ("window", "sinks", "salient")
        )
        self.chosen = op.Add(self.sinks, salient)
        self.kept = op.Max(self.chosen, op.ints(1))
        """A row that is never seen, where none are kept: no axis is empty."""
        self.recent = op.Add(self.window, op.ints(BLOCK))
        self.scale = op.attribute("scale", "float")
        self.softcap = op.attribute("softcap", "float") if capped else None

    def scores(self, op: Any, products: Any) -> Any:
        """The scores, of products that the scale is in."""
        if self.softcap is None:
            return products
        return op.Mul(op.Tanh(op.Div(products, self.softcap)), self.softcap)


class _Steps:
    """The steps of a call: I of them, of W = min(32, T) tokens or fewer, which lie in one block of positions.

    All of it follows from mask and past_length, so that it is the same for every layer.
    """

    def __init__(self, op: Any, call: Any, sizes: _Sizes) -> None:
        self.op, self.heads, self.sizes = op, call.heads, sizes
        self.tokens = tokens = call.tokens(op.ints(BLOCK))
        self.width = op.Min(op.ints(BLOCK), tokens.length)
        self.count = op.Div(op.Add(tokens.length, op.ints(2 * BLOCK - 2)), op.ints(BLOCK))
        self.slots = op.arange(self.width)
        length = op.column(call.past_length)
        self.inside = op.Mod(length, op.ints(BLOCK))  # [B, 1]
        first = op.reshape(op.Mul(op.arange(self.count), op.ints(BLOCK)), -1, 1, 1)
        self.start = op.Max(op.Sub(first, self.inside), op.ints(0))  # [I, B, 1], the first token by rank
        end = op.Min(tokens.count, op.Sub(op.Add(first, op.ints(BLOCK)), self.inside))
        self.taken = op.Max(op.Sub(end, self.start), op.ints(0))
        self.before = op.Add(length, self.start)
        begins = op.Equal(op.Mod(self.before, op.ints(BLOCK)), op.ints(0))
        some = op.And(op.Greater(self.taken, op.ints(0)), op.Greater(self.before, op.ints(0)))
        self.due = op.And(begins, some)
        block = op.Mul(op.Div(self.before, op.ints(BLOCK)), op.ints(BLOCK))
        self.near = op.Sub(block, sizes.window)  # the first position in the window
        self.gone = op.Max(self.near, op.ints(0))
        self.here = op.Less(self.slots, self.taken)  # [I, B, W]
        age = op.arange(sizes.recent)
        after = op.Sub(op.Add(self.before, self.taken), sizes.recent)
        self.position = op.Unsqueeze(op.Add(after, age), op.ints(2))  # of recent rows, [I, B, 1, R - K]
        self.asked = op.Unsqueeze(op.Add(self.before, self.slots), op.ints(3))  # [I, B, W, 1]

    def index(self) -> Any:
        """Where each recent row lies among the rows before the step and its W tokens after them,
        [I, B, Hkv, R - K, 1]."""
        op, sizes = self.op, self.sizes
        index = op.Add(op.Add(self.taken, sizes.kept), op.arange(sizes.recent))
        index = op.Unsqueeze(index, op.ints(2, 4))
        return op.Expand(index, op.shape(1, 1, self.heads.kv_heads, 1, 1))

    def columns(self) -> Any:
        """The column of each slot's token, any for none, [I, B, W]."""
        op, tokens = self.op, self.tokens
        last = op.Sub(tokens.length, op.ints(1))
        rank = op.Min(op.Add(self.start, self.slots), last)
        return op.Min(_of_rows(op, tokens.order, rank, tokens), last)

    def contest(self) -> tuple[Any, Any]:
        """Of the kept rows and the 32 that leave the window: whether a row's score decides, and what does
        elsewhere, [I, B, 1, K + 32, 1]. Where no selection is due the kept rows stay, in their order."""
        op, sizes = self.op, self.sizes
        rows, leaving = op.arange(sizes.kept), op.Sub(op.arange(op.ints(BLOCK)), op.ints(BLOCK))
        leaving = op.Add(self.near, leaving)  # [I, B, 32], positions
        held = op.Min(op.Max(op.Sub(self.near, op.ints(BLOCK)), op.ints(0)), sizes.chosen)
        there = op.Concat(op.Less(rows, held), op.GreaterOrEqual(leaving, op.ints(0)), axis=2)
        first = op.Expand(op.Less(rows, sizes.sinks), op.Shape(op.Less(rows, held)))
        first = op.Concat(first, op.Less(leaving, sizes.sinks), axis=2)
        decided = op.And(op.And(self.due, there), op.Not(first))
        other = op.Where(op.And(there, first), _MOST, -_MOST)
        order = op.Neg(op.float(op.arange(op.Add(sizes.kept, op.ints(BLOCK)))))
        other = op.Where(self.due, other, order)
        return tuple(op.Unsqueeze(x, op.ints(2, 4)) for x in (decided, other))

    def seen(self) -> Any:
        """Which recent rows each token sees, [I, B, W, R - K]."""
        op = self.op
        near = op.GreaterOrEqual(self.position, op.Unsqueeze(self.gone, op.ints(3)))
        near = op.And(near, op.LessOrEqual(self.position, self.asked))
        return op.And(near, op.Unsqueeze(self.here, op.ints(3)))

    def visible(self) -> Any:
        """Which rows each query sees, [I, B, 1, repeats W, R]."""
        op, sizes = self.op, self.sizes
        kept = op.Less(op.arange(sizes.kept), op.Min(self.gone, sizes.chosen))
        kept = op.And(op.Unsqueeze(kept, op.ints(2)), op.Unsqueeze(self.here, op.ints(3)))
        return self._of_heads(op.Concat(kept, self.seen(), axis=3))

    def votes(self) -> Any:
        """What takes the weights of queries to the newest block's column, [I, B, 1, repeats W, 4]."""
        op = self.op
        newest = op.Constant(value_floats=[0.0, 0.0, 0.0, 1.0])
        return self._of_heads(op.Mul(op.float(op.Unsqueeze(self.here, op.ints(3))), newest))

    def counting(self) -> Any:
        """From columns before a step to those in it, [I, B, 1, 4, 4]: the oldest weights are counted where a
        selection is due, and each block is one block older."""
        op = self.op
        older = [DECAY, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]
        same = [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
        moved, kept = (
            op.reshape(op.Constant(value_floats=[float(x) for x in entries]), 4, 4)
            for entries in (older, same)
        )
        return op.Where(op.Unsqueeze(self.due, op.ints(3, 4)), moved, kept)

    def taps(self, number: Any) -> Any:
        """How far back each row lies, where a tap reads it, else `number`: [I, B, W, R]."""
        op, sizes = self.op, self.sizes
        lag = op.Sub(self.asked, self.position)
        lag = op.Where(op.And(self.seen(), op.Less(lag, number)), lag, number)
        kept = op.Expand(number, op.shape(self.count, self.tokens.batch, self.width, sizes.kept))
        return op.Concat(kept, lag, axis=3)

    def _of_heads(self, x: Any) -> Any:
        """[I, B, W, n] -> [I, B, 1, repeats W, n], for the query heads of a key/value head."""
        op, repeats = self.op, self.heads.repeats
        each = op.Expand(op.Unsqueeze(x, op.ints(2, 3)), op.shape(1, 1, 1, repeats, 1, 1))
        return op.reshape(each, self.count, self.tokens.batch, 1, op.Mul(repeats, self.width), op.size(x, 3))

    def given(self, x: Any, heads: Any, width: Any) -> Any:
        """Rows x [B, heads, T, width] of each step's tokens, [I, B, Hkv, heads / Hkv W, width]."""
        op, tokens = self.op, self.tokens
        first = op.reshape(
            op.Mul(op.arange(op.Mul(tokens.batch, heads)), tokens.length), tokens.batch, heads, 1
        )
        index = op.Add(first, op.Unsqueeze(self.columns(), op.ints(2)))
        shape = self.count, tokens.batch, self.heads.kv_heads, -1, width
        return op.reshape(op.rows(x, index, width), *shape)

    def output(self, out: Any) -> Any:
        """Inverse of `given`: out [I, B, Hkv, repeats W, Dv] -> [B, H, T, Dv], zero for padding."""
        op, heads, tokens = self.op, self.heads, self.tokens
        rank = op.Max(tokens.rank, op.ints(0))
        step = op.Div(op.Add(self.inside, rank), op.ints(BLOCK))
        slot = op.Sub(rank, op.Max(op.Sub(op.Mul(step, op.ints(BLOCK)), self.inside), op.ints(0)))
        each = op.reshape(op.arange(op.Mul(tokens.batch, heads.heads)), tokens.batch, heads.heads, 1)
        first = op.Mul(step, op.Mul(tokens.batch, heads.heads))  # [B, T]
        index = op.Mul(op.Add(op.Unsqueeze(first, op.ints(1)), each), self.width)
        out = op.rows(out, op.Add(index, op.Unsqueeze(slot, op.ints(1))), heads.value_dim)
        return op.Where(op.Unsqueeze(tokens.mask, op.ints(1, 3)), out, 0.0)


def _body(op: Any, call: Any, conv_weight: Any, *, capped: bool) -> tuple[Any, Any, Any]:
    """The formula of `augmented.py`, conv_weight [H, taps] included, one block after the other. Called as
    `StateOperator` says."""
    heads, sizes = call.heads, _Sizes(op, capped)
    steps = _Steps(op, call, sizes)
    taps = op.size(conv_weight, 1)
    conv_weight = op.Concat(conv_weight, op.ConstantOfShape(op.shape(heads.heads, 1)), axis=1)
    nothing = op.ConstantOfShape(op.shape(steps.tokens.batch, heads.kv_heads, steps.width, 4))
    ends = op.shape(op.Add(sizes.kept, op.ints(BLOCK)), 1)
    band = op.shape(steps.tokens.batch, heads.kv_heads, op.Mul(heads.repeats, steps.width), -1)
    queries = steps.given(op.Mul(op.float(call.query), sizes.scale), heads.heads, heads.dim)
    tokens = op.Concat(op.float(call.key), op.float(call.value), axis=3)
    tokens = steps.given(tokens, heads.kv_heads, heads.width)

    def step(
        op: Any,
        rows: Any,
        counts: Any,
        queries: Any,
        tokens: Any,
        recent: Any,
        decided: Any,
        other: Any,
        counting: Any,
        visible: Any,
        votes: Any,
        lags: Any,
    ) -> tuple[Any, Any, Any]:
        counts = op.MatMul(counts, counting)
        rank = op.Where(decided, op.Slice(counts, op.ints(0, 0), ends, op.ints(2, 3)), other)
        _, chosen = op.TopK(rank, sizes.kept, axis=2, _outputs=2)
        index = op.Concat(chosen, recent, axis=2)
        rows = op.GatherND(op.Concat(rows, tokens, axis=2), index, batch_dims=2)
        counts = op.GatherND(op.Concat(counts, nothing, axis=2), index, batch_dims=2)
        keys, values = op.split(rows, heads.dim, heads.value_dim)
        scores = sizes.scores(op, op.MatMul(queries, op.Transpose(keys, perm=[0, 1, 3, 2])))
        weights = op.Softmax(op.Where(visible, scores, -_MOST), axis=-1)
        counts = op.Add(counts, op.MatMul(op.Transpose(weights, perm=[0, 1, 3, 2]), votes))
        taps = op.Transpose(op.Gather(conv_weight, lags, axis=1), perm=[1, 0, 2, 3])
        out = op.MatMul(op.Add(weights, op.Reshape(taps, band)), values)
        return rows, counts, out

    given = (
        queries,
        tokens,
        steps.index(),
        *steps.contest(),
        steps.counting(),
        steps.visible(),
        steps.votes(),
        steps.taps(taps),
    )
    rows, counts, out = op.scan(step, (op.float(call.past_window), call.past_recurrent), given)
    return (
        op.CastLike(steps.output(out), call.query),
        counts,
        op.CastLike(rows, call.past_window),
    )


def _bidirectional(op: Any, call: Any, *, capped: bool) -> Any:
    """Every token sees those at most `window` away, and the landmarks that are farther."""
    heads, sizes, tokens = call.heads, _Sizes(op, capped), call.tokens()
    block = tokens.block
    there = op.Unsqueeze(call.mask, op.ints(1, 3))
    query = op.Mul(op.float(call.query), sizes.scale)
    key, value = (op.Where(there, op.float(x), 0.0) for x in (call.key, call.value))
    index, rank = _landmarks(op, tokens, sizes, query, key)

    window = op.Min(sizes.window, tokens.length)
    span = op.Add(block, op.Mul(window, op.ints(2)))
    places = op.Sub(tokens.places(span), window)  # [blocks, span]
    source = tokens.source(op.Where(op.Less(places, op.ints(0)), tokens.nothing, places))
    rows = tokens.row_of(source)
    near = op.Abs(op.Sub(op.Sub(op.arange(span), window), op.column(op.arange(block))))
    near = op.And(op.LessOrEqual(near, window), op.Unsqueeze(op.Less(source, tokens.nothing), op.ints(2)))
    near = op.Unsqueeze(near, op.ints(1, 2))  # [B, 1, 1, blocks, block, span]
    asked = op.Unsqueeze(tokens.places(block), op.ints(2))  # [blocks, block, 1]
    away = op.Abs(op.Sub(op.Unsqueeze(rank, op.ints(2, 3, 4)), asked))
    valid = op.GreaterOrEqual(rank, op.ints(0))
    far = op.And(op.Greater(away, window), op.Unsqueeze(valid, op.ints(2, 3, 4)))

    queries = tokens.queries(query, tokens.source(tokens.places(block)))
    scores, values = [], []
    for seen, by_rank, of_rank in ((near, rows, True), (far, index, False)):
        found = []
        for x, width in ((key, heads.dim), (value, heads.value_dim)):
            x = tokens.with_nothing(x, width=width)
            found.append(op.rows(x, by_rank, width))
            if not of_rank:
                found[-1] = op.Unsqueeze(found[-1], op.ints(2, 3))
        found[0] = sizes.scores(op, op.MatMul(queries, op.transposed(found[0])))
        scores.append(op.Where(seen, found[0], -_MOST))
        values.append(found[1])
    weights = op.Softmax(op.Concat(*scores, axis=-1), axis=-1)
    of_near, of_far = op.split(weights, span, op.size(rank, 2))
    out = op.Add(op.MatMul(of_near, values[0]), op.MatMul(of_far, values[1]))
    return op.CastLike(tokens.columns(out, heads.value_dim), call.query)


def _of_rows(op: Any, x: Any, index: Any, tokens: Any) -> Any:
    """x [B, n] at index [..., B, k] of each row of the batch, [..., B, k]."""
    first = op.column(op.Mul(op.arange(tokens.batch), op.size(x, 1)))
    return op.Gather(op.reshape(x, -1), op.Add(index, first), axis=0)


def _landmarks(op: Any, tokens: Any, sizes: _Sizes, query: Any, key: Any) -> tuple[Any, Any]:
    """The first `sinks` tokens, and the `salient` others to which `VOTERS` queries, evenly spread, give most:
    rows in [B Hkv (T + 1)], and ranks, -1 for none, [B, Hkv, k]."""
    heads = tokens.heads
    voters = op.Div(op.Mul(op.arange(op.ints(VOTERS)), tokens.count), op.ints(VOTERS))  # [B, VOTERS]
    columns = op.Min(_of_rows(op, tokens.order, voters, tokens), op.Sub(tokens.length, op.ints(1)))
    first = op.reshape(
        op.Mul(op.arange(op.Mul(tokens.batch, heads.heads)), tokens.length), tokens.batch, heads.heads, 1
    )
    asked = op.rows(query, op.Add(first, op.Unsqueeze(columns, op.ints(1))), heads.dim)
    asked = op.reshape(asked, tokens.batch, heads.kv_heads, -1, heads.dim)
    real = op.Unsqueeze(tokens.mask, op.ints(1, 2))  # [B, 1, 1, T]
    scores = sizes.scores(op, op.MatMul(asked, op.Transpose(key, perm=[0, 1, 3, 2])))
    scores = op.Where(real, scores, -_MOST)
    mass = op.ReduceSum(op.Softmax(scores, axis=-1), op.ints(2), keepdims=0)  # [B, Hkv, T]
    rank = op.Unsqueeze(tokens.rank, op.ints(1))
    mass = op.Where(op.Less(rank, sizes.sinks), _MOST, mass)
    mass = op.Where(op.Unsqueeze(tokens.mask, op.ints(1)), mass, -_MOST)
    number = op.Min(sizes.kept, tokens.length)
    best, column = op.TopK(mass, number, axis=2, _outputs=2)
    valid = op.And(op.GreaterOrEqual(best, 0.0), op.Less(op.arange(number), sizes.chosen))
    of_row = op.Mul(op.arange(tokens.batch), tokens.length)
    rank = op.Gather(op.reshape(tokens.rank, -1), op.Add(column, op.reshape(of_row, -1, 1, 1)), axis=0)
    begin = op.Mul(op.arange(op.Mul(tokens.batch, heads.kv_heads)), op.Add(tokens.length, op.ints(1)))
    index = op.Add(op.reshape(begin, tokens.batch, heads.kv_heads, 1), column)
    return index, op.Where(valid, rank, op.ints(-1))


def _operator(name: str, capped: bool, *beside: StateOperator) -> StateOperator:
    return StateOperator(
        name,
        ("conv_weight",),
        ("window", "sinks", "salient"),
        ("scale", "softcap") if capped else ("scale",),
        partial(_body, capped=capped),
        WholeForm("salient_attention", _whole, partial(_bidirectional, capped=capped)),
        beside,
    )


CAPPED = _operator("CappedSalientAttention", True)
"""With a softcap, as `kernels/softmax.py` `Scores` has it."""
OPERATOR = _operator("SalientAttention", False, CAPPED)
