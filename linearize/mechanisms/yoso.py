"""YOSO (Zeng et al., arXiv 2111.09714): the collision probability of a hash as the weight of a pair.

    o[t] = unit(sum_{j, group(j) == group(t)} w(s) v[j] + sum_{other j} (c0 + c1 s) v[j])     j <= t if causal
    w(s) = (1 - arccos(0.98 s) / pi)^8,  s = q^[t].k^[j],  q^ = q / |q|,  unit(o) = o / |o|

w is YOSO's expected weight with 8 hash bits, used as it is, as arXiv 2406.07368 does; 0.98 (its code's) keeps
arccos differentiable. YOSO itself is quadratic or sampled; here w holds inside a group, and outside it its
tangent at s = 0: c0 = w(0) = 2^-8, c1 = w'(0) = 8 2^-7 0.98 / pi, which is linear in s and so has a constant
state. (The tangent is negative below s = -0.2, where w is nearly 0.) Cross-attention: query group i meets key
group i, by position. The site's scale plays no part.

Parallel form: one core call for w and c1 s, one over constants for c0; without causality the core's grouped
part counts the own group as well, so both are taken back there.
State: [D + 1, Dv] per key/value head, and the keys and values of the open group.
Initialisation: no parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.tensors import ones, unit_of_any_size, widen
from .base import EVERYWHERE, Mechanism
from .composed import ComposedAttention, Term
from .spec import SiteSpec

if TYPE_CHECKING:
    from .base import Settings

_C0 = 0.5**8
_C1 = 8 * 0.5**7 * 0.98 / math.pi


class YosoAttention(ComposedAttention):
    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        self.reset_parameters()

    def terms(self, query: Tensor, key: Tensor, value: Tensor) -> list[Term]:
        # In float32 throughout: the parts are rounded once, after their sum.
        query, key, value = widen(query), widen(key), widen(value)
        own = None if self.spec.causal else -_C0
        terms = [
            Term(query, key, value, alpha=_C1, local_scale=1.0, activation="yoso", normalize=True),
            Term(ones(query), ones(key), value, alpha=_C0, local_scale=own),
        ]
        if not self.spec.causal:
            terms.append(Term(query, key, value, local_scale=-_C1, normalize=True))
        return terms

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        return unit_of_any_size(super().combine(outputs))


def naive(query: Tensor, key: Tensor, value: Tensor, *, group_size: int, causal: bool) -> Tensor:
    """float64 [B, H, T, D] with heads repeated."""
    query, key = query / query.norm(dim=-1, keepdim=True), key / key.norm(dim=-1, keepdim=True)
    scores = query @ key.mT
    weights = (1 - torch.arccos(0.98 * scores) / math.pi) ** 8
    tangent = 0.5**8 + 8 * 0.5**7 * (0.98 / math.pi) * scores
    t, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    weights = torch.where(t // group_size == j // group_size, weights, tangent)
    out = (weights.tril() if causal else weights) @ value
    return out / out.norm(dim=-1, keepdim=True)


MECHANISM = Mechanism(
    name="yoso",
    formula="unit((1 - arccos(0.98 q.k) / pi)^8 in the group + its tangent c0 + c1 q.k outside)",
    supports=EVERYWHERE,
    build=YosoAttention,
)
