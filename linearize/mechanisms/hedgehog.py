"""Hedgehog (Zhang et al., arXiv 2402.04347): a learned positive feature map that can be spiky as softmax is.

    o[t] = sum_j f(q[t]).g(k[j]) v[j] / sum_j f(q[t]).g(k[j])        j <= t if causal
    f(q) = [softmax(A q), softmax(-A q)] + 1e-6,  g(k) = [softmax(B k), softmax(-B k)] + 1e-6

A [D, D] per query head, B [D, D] per key/value head; softmax over features is the form the authors (and
LoLCATs, arXiv 2410.10254) train for its stability, in place of exp. 1e-6 is ours: where features are one-hot
and do not meet, float32 would leave a denominator of 0. The site's scale is A's and B's to learn.

Parallel form: one core call, linear, numerator and denominator together.
State: [2D, Dv + 1] per key/value head. Initialisation: A and B the identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .base import EVERYWHERE, Mechanism
from .normalized import NormalizedAttention
from .spec import SiteSpec

if TYPE_CHECKING:
    from .base import Settings

_EPSILON = 1e-6


def positive(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, heads, L, D], weight [heads, D, D] -> features [B, heads, L, 2D]."""
    x = x @ weight.to(x.dtype).mT
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1) + _EPSILON


def square(heads: int, dim: int) -> nn.Parameter:
    """A map per head, still empty."""
    return nn.Parameter(torch.empty(heads, dim, dim))


def set_identity(*maps: Tensor) -> None:
    with torch.no_grad():
        for weight in maps:
            weight.copy_(torch.eye(weight.shape[-1], device=weight.device))


class HedgehogAttention(NormalizedAttention):
    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        self.query_map = square(spec.num_heads, spec.head_dim)
        self.key_map = square(spec.num_key_value_heads, spec.head_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        set_identity(self.query_map, self.key_map)

    def features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return positive(query, self.query_map), positive(key, self.key_map)


def naive_weights(query: Tensor, key: Tensor, query_map: Tensor, key_map: Tensor) -> Tensor:
    """f(q).g(k) as float64 [B, H, T, S]; maps [H, D, D]."""
    query = torch.einsum("hij,bhtj->bhti", query_map, query)
    key = torch.einsum("hij,bhtj->bhti", key_map, key)
    same, opposite = (
        ((sign * query).softmax(-1) + 1e-6) @ ((sign * key).softmax(-1) + 1e-6).mT for sign in (1, -1)
    )
    return same + opposite


def naive(
    query: Tensor, key: Tensor, value: Tensor, query_map: Tensor, key_map: Tensor, *, causal: bool
) -> Tensor:
    """float64 [B, H, T, D] with heads repeated; maps [H, D, D]."""
    weights = naive_weights(query, key, query_map, key_map)
    if causal:
        weights = weights.tril()
    return weights @ value / weights.sum(-1, keepdim=True)


MECHANISM = Mechanism(
    name="hedgehog",
    formula="f(q).g(k) / sum, f and g = [softmax(W x), softmax(-W x)], learned",
    supports=EVERYWHERE,
    build=HedgehogAttention,
)
