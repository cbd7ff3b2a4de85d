"""Exact softmax over the nearest tokens, a linear kernel over all others, one normaliser for both.

    w(s) = exp(s), c = exp(b), near and far as in `windowed.py`
    f(x) = [softmax(x), softmax(-x)] + 1e-6                     as in `hedgehog`

The combination is that of LoLCATs (arXiv 2410.10254); its scores and features share a learned mixing weight,
here exp(b), per head. While the window covers the sequence this is the site's own attention, exactly, with
its own scale.

Parallel form and state: those of `windowed.py`. The size of the near weights is the logarithm of their sum,
and the far share a sigmoid of the difference of logarithms, so that no exponential overflows.
Initialisation: A and B the identity; b = log(D / 2), so that a pair without features of its own weighs 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.window_chunk import softmax_weights, softmax_window
from ..ops.arguments import from_interleaved, to_interleaved
from .base import Mechanism, whole
from .hedgehog import naive_weights, positive
from .onnx_form import Nodes, OperatorCall, StateOperator
from .windowed import WindowedAttention


class SoftmaxWindowAttention(WindowedAttention):
    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.far_weight.fill_(math.log(self.spec.head_dim / 2))

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

    def features(self, x: Tensor, weight: Tensor) -> Tensor:
        return positive(x, weight)

    def far_share(self, total: Tensor, size: Tensor) -> Tensor:
        return torch.sigmoid(total.log() + self.far_weight.to(total.dtype)[:, None, None] - size)

    def emit_onnx(self, nodes: Nodes, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kv_heads, tiled = key.shape[1], self.spec.kv_layout == "tiled"
        rows: Tensor = query
        query_map: Tensor = self.query_map
        far_weight: Tensor = self.far_weight
        if tiled:
            rows = to_interleaved(query, kv_heads)
            query_map = to_interleaved(query_map[None], kv_heads)[0]
            far_weight = to_interleaved(far_weight[None], kv_heads)[0]
        out = nodes.operator(
            OperatorCall(
                OPERATOR,
                rows,
                key,
                value,
                own=(query_map, self.key_map, far_weight),
                ints={"window": self.window},
                floats={"scale": self.scale},
                rows=max(self.window, 2) - 1,
                sums=(2 * self.spec.head_dim, self.spec.value_dim + 1),
            )
        )
        out = from_interleaved(out, kv_heads) if tiled else out
        return self.emit_apart(nodes, out, query, key, value)


def _onnx_body(op: Any, call: Any, query_map: Any, key_map: Any, far_weight: Any) -> tuple[Any, Any, Any]:
    """Tokens less than `window` back weigh exp(scale q.k), older ones exp(far_weight) f(q).g(k), and one sum
    divides both. The recurrent part sums g(k)^T [v | 1] over the tokens older than the window of max(window,
    2) - 1 rows. query_map [H, D, D], key_map [Hkv, D, D], far_weight [H]. Called as `StateOperator` says."""
    near = op.attribute("window", "int")
    rows = op.Sub(op.Max(near, op.ints(2)), op.ints(1))
    recent = call.recent(near, rows)
    heads = recent.heads
    first = op.reshape(op.Sub(call.past_length, rows), -1, 1, 1)
    position = op.Add(first, recent.places)  # [B, blocks, span]
    known = op.GreaterOrEqual(position, op.ints(0))
    there = op.Unsqueeze(known, op.ints(1, 2, 4))  # [B, 1, 1, blocks, 1, span]
    of_near, largest, sum_near = _onnx_near(op, recent, near, there)
    sums = call.past_recurrent
    of_far, present_recurrent = _onnx_far(op, recent, near, known, there, sums, query_map, key_map)
    of_far, total = op.split(of_far, heads.value_dim, 1)
    some = op.Greater(total, 0.0)
    total = op.Where(some, total, 1.0)
    log_far = op.Add(op.Log(total), heads.table(op, far_weight))
    share = op.Sigmoid(op.Sub(log_far, op.Add(largest, op.Log(sum_near))))
    share = op.Where(some, share, 0.0)
    out = op.Add(of_near, op.Mul(share, op.Sub(op.Div(of_far, total), of_near)))
    return recent.outputs(out, present_recurrent, call.query)


def _onnx_near(op: Any, recent: Any, near: Any, there: Any) -> tuple[Any, Any, Any]:
    """Softmax over the near tokens: the output, the largest score, and the sum of exp(score - largest)."""
    lag = recent.lag
    close = op.And(op.And(op.GreaterOrEqual(lag, op.ints(0)), op.Less(lag, near)), there)
    scores = op.MatMul(recent.queries, op.transposed(recent.keys))
    scores = op.Where(close, op.Mul(scores, op.attribute("scale", "float")), -3.0e38)
    largest = op.ReduceMax(scores, op.ints(-1), keepdims=1)
    weights = op.Mul(op.Exp(op.Sub(scores, largest)), op.float(close))
    total = op.ReduceSum(weights, op.ints(-1), keepdims=1)
    return op.Div(op.MatMul(weights, recent.values), total), largest, total


def _onnx_far(
    op: Any,
    recent: Any,
    near: Any,
    known: Any,
    there: Any,
    past_recurrent: Any,
    query_map: Any,
    key_map: Any,
) -> tuple[Any, Any]:
    """Sums of f(q).g(k) [v | 1] over the far tokens, and the sums of g(k)^T [v | 1] after the call."""
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
    far = op.And(op.GreaterOrEqual(recent.lag, near), there)
    seen_features, seen_values = op.split(op.rows(counted, recent.index, width), *widths)
    weights = op.Mul(op.MatMul(asked, op.transposed(seen_features)), op.float(far))
    gone = op.And(tokens.gone(recent.places), op.cut(known, op.ints(0), tokens.block, 2))
    old_features, old_values = op.split(op.rows(counted, recent.leaving(), width), *widths)
    old_values = op.Mul(old_values, op.float(op.Unsqueeze(gone, op.ints(1, 2, 5))))
    before, present_recurrent = op.running_sum(past_recurrent, old_features, old_values)
    return op.Add(op.MatMul(weights, seen_values), op.MatMul(asked, before)), present_recurrent


def _onnx_features(op: Any, x: Any, maps: Any) -> Any:
    """[softmax(x M), softmax(-x M)] + 1e-6"""
    x = op.MatMul(x, maps)
    both = op.Concat(op.Softmax(x, axis=-1), op.Softmax(op.Neg(x), axis=-1), axis=-1)
    return op.Add(both, 1e-6)


OPERATOR = StateOperator(
    "WindowSoftmaxLinearAttention",
    ("query_map", "key_map", "far_weight"),
    ("window",),
    ("scale",),
    _onnx_body,
)


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    far_weight: Tensor,
    *,
    window: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """float64 [B, H, T, D] with heads repeated; maps [H, D, D], far_weight [H]."""
    lag = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
    far = naive_weights(query, key, query_map, key_map) * far_weight.exp()[:, None, None]
    weights = torch.where(lag.abs() < window, torch.exp(query @ key.mT * scale), far)
    if causal:
        weights = weights.tril()
    return weights @ value / weights.sum(-1, keepdim=True)


MECHANISM = Mechanism(
    name="softmax_window",
    formula="softmax over the last `window` tokens + f(q).g(k) over earlier ones, one normaliser",
    supports=frozenset({"causal", "bidirectional"}),
    build=SoftmaxWindowAttention,
    options={"window": whole(64, "tokens that see each other exactly, the present one included")},
    onnx=OPERATOR,
)
