"""TransNormer's NormAttention (Qin et al., arXiv 2210.10340): no denominator, the output is normalised.

    o[t] = weight * RMSNorm(sum_j f(q[t]).f(k[j]) v[j])        j <= t if causal
    f(x) = 1 + elu(x),  RMSNorm(x) = x / sqrt(mean(x^2) + 1e-6)  over the features of a head

The norm is per head, since heads of one site are independent here (the authors normalise them together), and
`weight`, one number per head and feature, is its usual gain. The site's scale plays no part. TransNormer's
block-diagonal attention of early layers is `local`.

Parallel form: one core call in float32, linear. State: [D, Dv] per key/value head.
Initialisation: weight one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.tensors import widen
from .base import EVERYWHERE, Mechanism
from .composed import ComposedAttention, Term
from .spec import SiteSpec

if TYPE_CHECKING:
    from .base import Settings

_EPSILON = 1e-6


class TransnormerAttention(ComposedAttention):
    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        self.weight = nn.Parameter(torch.empty(spec.num_heads, spec.value_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.weight.fill_(1)

    def terms(self, query: Tensor, key: Tensor, value: Tensor) -> list[Term]:
        return [self.over_all(1 + F.elu(widen(query)), 1 + F.elu(widen(key)), widen(value))]

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        (total,) = outputs
        # Over the largest entry first: squares of long sums leave float32.
        largest = total.detach().abs().amax(-1, keepdim=True).clamp(min=1)
        total = total / largest
        norm = torch.sqrt(total.square().mean(-1, keepdim=True) + _EPSILON / largest.square())
        return total / norm * self.weight[:, None].to(total.dtype)


def naive(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *, causal: bool) -> Tensor:
    """float64 [B, H, T, D] with heads repeated; weight [H, Dv]."""

    def f(x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, x.exp())

    scores = f(query) @ f(key).mT
    out = (scores.tril() if causal else scores) @ value
    return out / torch.sqrt((out**2).mean(-1, keepdim=True) + 1e-6) * weight[:, None]


MECHANISM = Mechanism(
    name="transnormer",
    formula="RMSNorm(sum of (1 + elu(q)).(1 + elu(k)) v)",
    supports=EVERYWHERE,
    build=TransnormerAttention,
)
