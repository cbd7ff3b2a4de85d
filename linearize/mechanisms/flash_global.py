"""FLASH's global part (Hua et al., arXiv 2202.10447, section 3.2): linear attention over groups.

    causal:     o[t] = 1/G sum_{group(j) < group(t)} q'[t].k'[j] v[j]
    otherwise:  o[t] = 1/n sum_j q'[t].k'[j] v[j]                        n real keys
    q' = gamma_q * q + beta_q,  k' = gamma_k * k + beta_k                per head and feature

The divisors are those of the FLASH in arXiv 2406.07368's code (`flash_pytorch.py`). Nothing is normalised and
the site's scale plays no part; a causal query of the first group gets zero.

Parallel form: one core call, grouped part alone; without causality a second one, over constants, counts keys.
State: [D, Dv] per key/value head, and the keys and values of the open group.
Initialisation: gamma one, beta zero, so q' = q.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.tensors import ones, widen
from .base import EVERYWHERE, Mechanism
from .composed import Term
from .flash_local import FlashAttention
from .spec import SiteSpec

if TYPE_CHECKING:
    from .base import Settings


class FlashGlobalAttention(FlashAttention):
    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        # Without causality a division by the number of keys follows the core, and the convolution that.
        self.conv_joins = spec.causal
        self.reset_parameters()

    def terms(self, query: Tensor, key: Tensor, value: Tensor) -> list[Term]:
        if self.spec.causal:
            query, key = self.offset(query, key)
            return [Term(query, key, value, alpha=1 / self.group_size, conv_weight=self.conv_weight)]
        # The sum before its division can leave float16, so all in float32; n is a sum of ones.
        query, key, value = widen(query), widen(key), widen(value)
        count = Term(ones(query), ones(key), ones(value), alpha=1.0)
        query, key = self.offset(query, key)
        return [Term(query, key, value, alpha=1.0), count]

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        if self.spec.causal:
            return outputs[0]
        total, count = outputs
        return total / count.clamp(min=1)


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_gamma: Tensor,
    query_beta: Tensor,
    key_gamma: Tensor,
    key_beta: Tensor,
    *,
    group_size: int,
    causal: bool,
) -> Tensor:
    """float64 [B, H, T, D] with heads repeated; gamma, beta [H, D]."""
    query = query * query_gamma[:, None] + query_beta[:, None]
    key = key * key_gamma[:, None] + key_beta[:, None]
    if not causal:
        return query @ key.mT @ value / key.shape[2]
    t, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    return (query @ key.mT * (j // group_size < t // group_size)) @ value / group_size


MECHANISM = Mechanism(
    name="flash_global",
    formula="q'.k' / G over earlier groups, q' and k' scaled and shifted per feature",
    supports=EVERYWHERE,
    build=FlashGlobalAttention,
)
