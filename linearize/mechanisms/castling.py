"""Castling-ViT's linear-angular attention (You et al., arXiv 2211.10526), linear part.

    o[t] = unit(1/2 v[t] + 1/pi sum_j q^[t].k^[j] v[j])        j <= t if causal
    q^ = q / |q|,  unit(o) = o / |o|

The angular kernel 1 - arccos(s) / pi is 1/2 + s / pi + higher orders; the constant is applied to the token's
own value only, as Castling-ViT and arXiv 2406.07368's code do. There is no own value in cross-attention,
which is refused. Castling-ViT's depthwise convolution is the `augmentation`; its auxiliary masked softmax
exists during its training only. The site's scale plays no part.

Parallel form: one core call, linear over all keys, with 1/2 v[t] as a convolution of one tap.
State: [D, Dv] per key/value head. Initialisation: no parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.tensors import unit_of_any_size, widen
from .base import EVERYWHERE, Mechanism
from .composed import ComposedAttention, Term
from .spec import SiteSpec

if TYPE_CHECKING:
    from .base import Settings


class CastlingAttention(ComposedAttention):
    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        self.reset_parameters()

    def terms(self, query: Tensor, key: Tensor, value: Tensor) -> list[Term]:
        half = torch.full((self.spec.num_heads, 1), 0.5, device=value.device)
        more = dict(conv_weight=half, normalize=True)
        return [self.over_all(widen(query), widen(key), widen(value), weight=1 / math.pi, **more)]

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        return unit_of_any_size(super().combine(outputs))


def naive(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """float64 [B, H, T, D] with heads repeated."""
    query, key = query / query.norm(dim=-1, keepdim=True), key / key.norm(dim=-1, keepdim=True)
    scores = query @ key.mT
    out = value / 2 + (scores.tril() if causal else scores) @ value / math.pi
    return out / out.norm(dim=-1, keepdim=True)


MECHANISM = Mechanism(
    name="castling",
    formula="unit(v / 2 + q.k / pi over all)",
    supports=EVERYWHERE - {"cross"},
    build=CastlingAttention,
)
