"""Exact softmax over the nearest tokens, a linear kernel over all others, one normaliser for both.

    w(s) = exp(s), c = exp(b), near and far as in `windowed.py`
    f(x) = [softmax(x), softmax(-x)] + 1e-6                     as in `hedgehog`

The combination is that of LoLCATs (arXiv 2410.10254); its scores and features share a learned mixing weight,
here exp(b), per head. While the window covers the sequence this is the site's own attention, exactly, with
its own scale.

Parallel form and state: those of `windowed.py`. The size of the near weights is the logarithm of their sum,
and the far share a sigmoid of the difference of logarithms, so that no exponential overflows.
Initialisation: A and B the identity; b = log(FAR D / 2), so that a pair without features of its own weighs
FAR.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.window_chunk import softmax_weights, softmax_window
from ..ops.arguments import from_interleaved, to_interleaved
from .base import Mechanism, whole
from .hedgehog import naive_weights, positive
from .onnx_form import Nodes, OperatorCall, StateOperator
from .spec import SiteSpec
from .windowed import FAR, OPTIONS, WindowedAttention, reach

if TYPE_CHECKING:
    from .base import Settings


class SoftmaxWindowAttention(WindowedAttention):
    @property
    def far_weight_at_first(self) -> float:
        return math.log(FAR * self.spec.head_dim / 2)

    def near(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        return softmax_window(query, key, value, key_mask, query_start, self.window, self.spec.causal)

    def weigh(self, scores: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        return softmax_weights(scores, hidden)

    def joint_size(self, size: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return torch.logaddexp(size, other), torch.sigmoid(other - size)

    def features(self, x: Tensor, weight: Tensor) -> Tensor:
        return positive(x, weight)

    def far_share(self, total: Tensor, size: Tensor) -> Tensor:
        assert self.far_weight is not None
        return torch.sigmoid(total.log() + self.far_weight.to(total.dtype)[:, None, None] - size)

    def emit_onnx(self, nodes: Nodes, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kv_heads, tiled = key.shape[1], self.spec.kv_layout == "tiled"
        own: list[Tensor] = [x for x in (self.query_map, self.key_map, self.far_weight) if x is not None]
        if tiled:
            query = to_interleaved(query, kv_heads)
            own[::2] = (to_interleaved(x[None], kv_heads)[0] for x in own[::2])
        dim, columns = self.spec.head_dim, self.spec.value_dim + 1
        rows = 2 * dim * self.has_tail + self.sinks * -(-(dim + self.spec.value_dim) // columns)
        out = nodes.operator(
            OperatorCall(
                OPERATORS[self.sinks > 0, self.has_tail],
                query,
                key,
                value,
                own=own,
                ints={"window": self.window},
                floats={"scale": self.scale},
                rows=max(self.window, 2) - 1,
                sums=(max(rows, 1), columns),
            )
        )
        out = from_interleaved(out, kv_heads) if tiled else out
        return self.emit_apart(nodes, out, query, key, value)


def _onnx_body(
    op: Any,
    call: Any,
    query_map: Any = None,
    key_map: Any = None,
    far_weight: Any = None,
    *,
    sinks: bool,
) -> tuple[Any, Any, Any]:
    """Tokens less than `window` back weigh exp(scale q.k), and so do the first S tokens of the sequence where
    `sinks` is said; older ones weigh exp(far_weight) f(q).g(k), or nothing without a tail; one sum divides
    all. query_map [H, D, D], key_map [Hkv, D, D], far_weight [H].

    past_recurrent [B, Hkv, rows, Dv + 1]: the 2D rows of the sums, if there is a tail; then for each first
    token [key | value | zeros] in as many rows as that takes; one row of zeros where there is neither. Called
    as `StateOperator` says."""
    near, tail = op.attribute("window", "int"), far_weight is not None
    rows = op.Sub(op.Max(near, op.ints(2)), op.ints(1))
    recent = call.recent(near, rows)
    past_recurrent, past_length = call.past_recurrent, call.past_length
    position = op.Add(op.reshape(op.Sub(past_length, rows), -1, 1, 1), recent.places)  # [B, blocks, span]
    known = op.GreaterOrEqual(position, op.ints(0))
    there = op.Unsqueeze(known, op.ints(1, 2, 4))  # [B, 1, 1, blocks, 1, span]
    past_sums, first = past_recurrent, None
    if sinks:
        past_sums, past_first = _onnx_unpacked(op, recent, past_recurrent, tail)
        first = _onnx_first(op, recent, past_first, past_length)
    of_near, largest, sum_near = _onnx_near(op, recent, near, there, first, past_length)
    if not tail:
        present = op.Identity(past_recurrent) if first is None else _onnx_packed(op, recent, first)
        return recent.outputs(of_near, present, call.query)
    if first is not None:
        known = op.GreaterOrEqual(position, op.size(first, 2))
    of_far, present_recurrent = _onnx_far(op, recent, near, known, past_sums, query_map, key_map)
    of_far, total = op.split(of_far, recent.heads.value_dim, 1)
    some = op.Greater(total, 0.0)
    total = op.Where(some, total, 1.0)
    log_far = op.Add(op.Log(total), recent.heads.table(op, far_weight))
    share = op.Sigmoid(op.Sub(log_far, op.Add(largest, op.Log(sum_near))))
    share = op.Where(some, share, 0.0)
    if first is not None:
        present_recurrent = op.Concat(present_recurrent, _onnx_packed(op, recent, first), axis=2)
    out = op.Add(of_near, op.Mul(share, op.Sub(op.Div(of_far, total), of_near)))
    return recent.outputs(out, present_recurrent, call.query)


def _onnx_rows(op: Any, heads: Any) -> tuple[Any, Any]:
    """Columns of the recurrent state, and its rows for one first token."""
    columns = op.Add(heads.value_dim, op.ints(1))
    return columns, op.ceil_div(heads.width, columns)


def _onnx_unpacked(op: Any, recent: Any, recurrent: Any, tail: bool) -> tuple[Any, Any]:
    """The sums of a recurrent state, and its first tokens [B, Hkv, S, D + Dv]."""
    heads = recent.heads
    columns, rows = _onnx_rows(op, heads)
    start = op.Mul(heads.dim, op.ints(2)) if tail else op.ints(0)
    first = op.cut(recurrent, start, op.size(recurrent, 2), 2)
    first = op.reshape(first, recent.tokens.batch, heads.kv_heads, -1, op.Mul(rows, columns))
    return op.cut(recurrent, op.ints(0), start, 2), op.cut(first, op.ints(0), heads.width, 3)


def _onnx_packed(op: Any, recent: Any, first: Any) -> Any:
    """Inverse of `_onnx_unpacked`: first tokens as rows of a recurrent state."""
    heads, batch = recent.heads, recent.tokens.batch
    columns, rows = _onnx_rows(op, heads)
    spare = op.shape(batch, heads.kv_heads, op.size(first, 2), op.Sub(op.Mul(rows, columns), heads.width))
    first = op.Concat(first, op.ConstantOfShape(spare), axis=3)
    return op.reshape(first, batch, heads.kv_heads, -1, columns)


def _onnx_first(op: Any, recent: Any, past: Any, past_length: Any) -> Any:
    """The first tokens after the call [B, Hkv, S, D + Dv]: those there were, and those that came with it."""
    tokens = recent.tokens
    came = op.Sub(op.arange(op.size(past, 2)), op.column(past_length))  # [B, S]
    new = op.And(op.GreaterOrEqual(came, op.ints(0)), op.Less(came, tokens.count))
    place = op.Min(op.Add(op.Max(came, op.ints(0)), tokens.window), tokens.nothing)
    source = op.GatherElements(tokens.order, place, axis=1)
    index = op.Squeeze(tokens.row_of(op.column(source)), op.ints(2, 3))
    fresh = op.rows(recent.joined, index, recent.heads.width)
    return op.Where(op.Unsqueeze(new, op.ints(1, 3)), fresh, past)


def _onnx_near(
    op: Any, recent: Any, near: Any, there: Any, first: Any, past_length: Any
) -> tuple[Any, Any, Any]:
    """Softmax over the near tokens, and the first ones where there are any: the output, the largest score,
    and the sum of exp(score - largest)."""
    lag, span = recent.lag, recent.span
    close = op.And(op.And(op.GreaterOrEqual(lag, op.ints(0)), op.Less(lag, near)), there)
    scores = op.MatMul(recent.queries, op.transposed(recent.keys))
    if first is not None:
        keys, values = op.split(op.Unsqueeze(first, op.ints(2, 3)), recent.heads.dim, recent.heads.value_dim)
        asked = recent.tokens.places(recent.tokens.block)  # of queries, [blocks, block]
        asked = op.Add(op.reshape(past_length, -1, 1, 1, 1), op.Unsqueeze(asked, op.ints(2)))
        behind = op.Sub(asked, op.arange(op.size(first, 2)))  # [B, blocks, block, S]
        outside = op.Unsqueeze(op.GreaterOrEqual(behind, near), op.ints(1, 2))
        close = op.Concat(close, outside, axis=5)
        scores = op.Concat(scores, op.MatMul(recent.queries, op.transposed(keys)), axis=5)
    scores = op.Where(close, op.Mul(scores, op.attribute("scale", "float")), -3.0e38)
    largest = op.ReduceMax(scores, op.ints(-1), keepdims=1)
    weights = op.Mul(op.Exp(op.Sub(scores, largest)), op.float(close))
    total = op.ReduceSum(weights, op.ints(-1), keepdims=1)
    if first is None:
        found = op.MatMul(weights, recent.values)
    else:
        weights, of_first = op.split(weights, span, op.size(first, 2))
        found = op.Add(op.MatMul(weights, recent.values), op.MatMul(of_first, values))
    return op.Div(found, total), largest, total


def _onnx_far(
    op: Any, recent: Any, near: Any, known: Any, past_sums: Any, query_map: Any, key_map: Any
) -> tuple[Any, Any]:
    """Sums of f(q).g(k) [v | 1] over the far tokens, and the sums of g(k)^T [v | 1] after the call; of tokens
    that are `known` [B, blocks, span]."""
    tokens, heads = recent.tokens, recent.heads
    kv_heads, dim, value_dim = heads.kv_heads, heads.dim, heads.value_dim
    maps = op.reshape(query_map, kv_heads, heads.repeats, 1, dim, dim)
    asked = _onnx_features(op, recent.queries, op.Transpose(maps, perm=[0, 1, 2, 4, 3]))
    keys, values = op.split(recent.joined, dim, value_dim)
    features = _onnx_features(op, keys, op.Transpose(key_map, perm=[0, 2, 1]))
    ones = op.Expand(op.Constant(value_float=1.0), op.shape(tokens.batch, kv_heads, op.size(values, 2), 1))
    counted = op.Concat(features, values, ones, axis=3)
    widths = op.Mul(dim, op.ints(2)), op.Add(value_dim, op.ints(1))
    width = op.Add(*widths)
    # A row that no token left in the window counts nothing.
    far = op.And(op.GreaterOrEqual(recent.lag, near), op.Unsqueeze(known, op.ints(1, 2, 4)))
    seen_features, seen_values = op.split(op.rows(counted, recent.index, width), *widths)
    weights = op.Mul(op.MatMul(asked, op.transposed(seen_features)), op.float(far))
    gone = op.And(tokens.gone(recent.places), op.cut(known, op.ints(0), tokens.block, 2))
    old_features, old_values = op.split(op.rows(counted, recent.leaving(), width), *widths)
    old_values = op.Mul(old_values, op.float(op.Unsqueeze(gone, op.ints(1, 2, 5))))
    before, present_sums = op.running_sum(past_sums, old_features, old_values)
    return op.Add(op.MatMul(weights, seen_values), op.MatMul(asked, before)), present_sums


def _onnx_features(op: Any, x: Any, maps: Any) -> Any:
    """[softmax(x M), softmax(-x M)] + 1e-6"""
    x = op.MatMul(x, maps)
    both = op.Concat(op.Softmax(x, axis=-1), op.Softmax(op.Neg(x), axis=-1), axis=-1)
    return op.Add(both, 1e-6)


def _operator(name: str, sinks: bool, tail: bool, *beside: StateOperator) -> StateOperator:
    own = ("query_map", "key_map", "far_weight") if tail else ()
    return StateOperator(name, own, ("window",), ("scale",), partial(_onnx_body, sinks=sinks), beside=beside)


_PLAIN = _operator("WindowSoftmaxAttention", False, False)
_FIRST = _operator("FirstWindowSoftmaxAttention", True, False)
_FIRST_LINEAR = _operator("FirstWindowSoftmaxLinearAttention", True, True)
_LINEAR = _operator("WindowSoftmaxLinearAttention", False, True, _FIRST_LINEAR, _FIRST, _PLAIN)
OPERATORS = {
    (False, False): _PLAIN,
    (True, False): _FIRST,
    (True, True): _FIRST_LINEAR,
    (False, True): _LINEAR,
}
"""By whether there are sinks, and a tail."""


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    far_weight: Tensor | None,
    *,
    window: int,
    sinks: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """float64 [B, H, T, D] with heads repeated; maps [H, D, D], far_weight [H], None without a tail."""
    position = torch.arange(key.shape[2])
    lag = torch.arange(query.shape[2])[:, None] - position
    near = (lag.abs() < window) | (position < sinks)
    seen = lag >= 0 if causal else torch.ones_like(near)
    scores = query @ key.mT * scale
    largest = scores.masked_fill(~(near & seen), -torch.inf).amax(-1, keepdim=True).detach()
    far = torch.zeros_like(scores)
    if query_map is not None and key_map is not None and far_weight is not None:
        # All weights are relative to the largest near one, which changes nothing but that exp may overflow.
        factor = (far_weight[:, None, None] - largest).exp()
        far = naive_weights(query, key, query_map, key_map) * factor
    weights = torch.where(near, (scores - largest).exp(), far).masked_fill(~seen, 0)
    return weights @ value / weights.sum(-1, keepdim=True)


def _build(spec: SiteSpec, config: Settings) -> SoftmaxWindowAttention:
    if MECHANISM.covers(spec, config.options):
        return exact_window(spec, config)
    return SoftmaxWindowAttention(spec, config)


def exact_window(spec: SiteSpec, config: Settings) -> SoftmaxWindowAttention:
    """The attention of a site with a window of its own: exactly that, with a state of constant size."""
    assert spec.window is not None
    return SoftmaxWindowAttention(spec, config, spec.window if spec.causal else spec.window + 1)


MECHANISM = Mechanism(
    name="softmax_window",
    formula="softmax over the last `window` and first `sinks` tokens + f(q).g(k) over others, one normaliser",
    supports=frozenset({"causal", "bidirectional"}),
    build=_build,
    sizes=("window",),
    options={"window": whole(64, "tokens that see each other exactly, the present one included"), **OPTIONS},
    reach=reach,
    onnx=_LINEAR,
)
