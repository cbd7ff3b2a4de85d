"""ReLU linear attention (EfficientViT: Cai et al., arXiv 2205.14756).

    o[t] = sum_j relu(q[t]).relu(k[j]) v[j] / sum_j relu(q[t]).relu(k[j])        j <= t if causal

A query that meets no key (denominator 0) gets zero. The site's scale cancels. EfficientViT's convolutions are
the `augmentation` here.

Parallel form: one core call, linear, numerator and denominator together.
State: [D, Dv + 1] per key/value head. Initialisation: no parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import EVERYWHERE, Mechanism
from .normalized import NormalizedAttention
from .spec import SiteSpec

if TYPE_CHECKING:
    from .base import Settings


class ReluAttention(NormalizedAttention):
    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        self.reset_parameters()

    def features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        # The output does not change with the size of a query, but the sums could leave float32.
        largest = query.detach().amax(-1, keepdim=True)
        extreme = (largest > 1e10) | ((largest > 0) & (largest < 1e-10))
        query = query / torch.where(extreme, largest, torch.ones_like(largest))
        return query.relu(), key.relu()


def naive(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """float64 [B, H, T, D] with heads repeated."""
    weights = query.clamp(min=0) @ key.clamp(min=0).mT
    if causal:
        weights = weights.tril()
    total = weights.sum(-1, keepdim=True)
    return weights @ value / torch.where(total > 0, total, 1.0)


MECHANISM = Mechanism(
    name="relu",
    formula="relu(q).relu(k) / sum",
    supports=EVERYWHERE,
    build=ReluAttention,
)
