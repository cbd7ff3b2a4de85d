"""Exact softmax over the nearest tokens, a linear kernel over all others, one normaliser for both.

    o[t] = (sum_{near j} exp(scale q[t].k[j]) v[j] + exp(b) sum_{far j} f(q[t]).g(k[j]) v[j]) / same, v = 1
    causal:         near is t - window < j <= t, far is j <= t - window
    bidirectional:  near is |t - j| < window,    far is all other j
    f(q) = [softmax(A q), softmax(-A q)] + 1e-6, g(k) likewise with B                  as in `hedgehog`

The combination is that of LoLCATs (arXiv 2410.10254); its scores and features share a learned mixing weight,
here exp(b), per head. While the window covers the sequence this is the site's own attention, exactly, with
its own scale. Cross-attention has no near tokens and is refused.

Parallel form: window softmax in blocks of `window` queries, O(T window) memory, heads not repeated
(`window.py`); the far part is one linear core call on keys and values delayed by `window` tokens (without
causality a second one on the reversed sequence). Both come with the logarithm of their sum of weights, and
are joined by a sigmoid of the difference, so that no exponential overflows.
State: the last `window` keys and values, and [2D, Dv + 1] per key/value head for the tokens that left them.
Initialisation: A and B the identity; b = log(D / 2), so that a pair without features of its own weighs 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..attention import SiteSpec
from .base import Mechanism, whole
from .composed import ComposedAttention, Term, widen, with_one
from .hedgehog import oracle_weights, positive, set_identity, square
from .window import softmax_window

if TYPE_CHECKING:
    from ..config import LinearizeConfig


class SoftmaxWindowAttention(ComposedAttention):
    def __init__(self, spec: SiteSpec, config: LinearizeConfig) -> None:
        super().__init__(spec, config)
        self.window: int = config.option("window")
        self.query_map = square(spec.num_heads, spec.head_dim)
        self.key_map = square(spec.num_key_value_heads, spec.head_dim)
        self.far_weight = nn.Parameter(torch.empty(spec.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        set_identity(self.query_map, self.key_map)
        with torch.no_grad():
            self.far_weight.fill_(math.log(self.spec.head_dim / 2))

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        query, key, value = widen(query), widen(key), widen(value)
        rows = self.split_heads(query * self.scale)
        joined = softmax_window(rows, key, value, key_mask, query_start, self.window, self.spec.causal)
        joined = self.merge_heads(joined)
        near, log_near = joined[..., :-1], joined[..., -1:]
        if statically_known_true(key.shape[2] <= self.window):
            return near
        query, key = positive(query, self.query_map), positive(key, self.key_map)
        joined = self._far(query, key, with_one(value), key_mask, query_start)
        total = joined[..., -1:]
        some = total > 0
        total = torch.where(some, total, torch.ones_like(total))
        log_far = total.log() + self.far_weight.to(total.dtype)[:, None, None]
        share = torch.where(some, torch.sigmoid(log_far - log_near), torch.zeros_like(total))
        return near + share * (joined[..., :-1] / total - near)

    def _far(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        """Sums of weights times value over the tokens outside the window: [B, H, T, Dv + 1]."""
        past = self._delayed(query, key, value, key_mask, query_start)
        if self.spec.causal:
            return past
        flipped = [None if key_mask is None else key_mask.flip(1), None]
        future = self._delayed(query.flip(2), key.flip(2), value.flip(2), *flipped)
        return past + future.flip(2)

    def _delayed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        """sum q.k v over the keys at least `window` real tokens before each query."""
        if key_mask is None:
            key, value = (F.pad(x, (0, 0, self.window, 0))[:, :, : x.shape[2]] for x in (key, value))
        else:
            rank = key_mask.cumsum(1) - 1
            source = torch.argsort(~key_mask, dim=1, stable=True).gather(1, (rank - self.window).clamp(min=0))
            there = (rank >= self.window)[:, None, :, None]
            key, value = _rows(key, source) * there, _rows(value, source)
        term = Term(query, key, value, alpha=1.0, local_scale=1.0)
        return self.run(term, key_mask, query_start, causal=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}"


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, n] of x [B, heads, L, D]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def oracle(
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
    far = oracle_weights(query, key, query_map, key_map) * far_weight.exp()[:, None, None]
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
)
