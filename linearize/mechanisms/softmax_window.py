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

import torch
from torch import Tensor

from .base import Mechanism, whole
from .hedgehog import oracle_weights, positive
from .window_op import softmax_weights, softmax_window
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

    def weigh(self, scores: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return softmax_weights(scores, hidden)

    def features(self, x: Tensor, weight: Tensor) -> Tensor:
        return positive(x, weight)

    def far_share(self, total: Tensor, size: Tensor) -> Tensor:
        return torch.sigmoid(total.log() + self.far_weight.to(total.dtype)[:, None, None] - size)


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
