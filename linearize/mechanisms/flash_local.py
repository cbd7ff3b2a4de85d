"""FLASH's local part (Hua et al., arXiv 2202.10447, section 3.2): quadratic attention inside each group.

    o[t] = sum_{j visible, group(j) == group(t)} f(q'[t].k'[j] / G) v[j]
    q' = gamma_q * q + beta_q,  k' = gamma_k * k + beta_k     per head and feature

f is relu(s)^2, or the Laplace function 1/2 (1 + erf((s - sqrt(1/2)) / (sigma sqrt 2))), sigma^2 = 1 / 4 pi,
with which the FLASH of arXiv 2406.07368 was trained (its `flash_pytorch.py`). Nothing is normalised and the
site's scale plays no part: 1/G is FLASH's own. Left out: T5's bias inside f, which needs a score bias, and
FLASH's gate, which belongs to its block.

Parallel form: one core call, local part alone. State: the keys and values of the open group.
Initialisation: gamma one, beta zero, so q' = q (FLASH trains from scratch, from gamma ~ N(0, 0.02^2)).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .base import EVERYWHERE, Mechanism, choice
from .composed import ComposedAttention, Term
from .spec import SiteSpec

if TYPE_CHECKING:
    from .base import Settings


class FlashAttention(ComposedAttention):
    """FLASH's scaled and shifted queries and keys. Nothing follows the core, so the convolution is inside."""

    conv_joins = True

    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        self.query_gamma = nn.Parameter(torch.empty(spec.num_heads, spec.head_dim))
        self.query_beta = nn.Parameter(torch.empty(spec.num_heads, spec.head_dim))
        self.key_gamma = nn.Parameter(torch.empty(spec.num_key_value_heads, spec.head_dim))
        self.key_beta = nn.Parameter(torch.empty(spec.num_key_value_heads, spec.head_dim))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            for gamma, beta in ((self.query_gamma, self.query_beta), (self.key_gamma, self.key_beta)):
                gamma.fill_(1)
                beta.zero_()

    def offset(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """q' and k', in the dtypes of query and key."""
        shifted_query = query * self.query_gamma[:, None] + self.query_beta[:, None]
        shifted_key = key * self.key_gamma[:, None] + self.key_beta[:, None]
        return shifted_query.to(query.dtype), shifted_key.to(key.dtype)


class FlashLocalAttention(FlashAttention):
    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        self.activation: str = config.option("activation")
        self.reset_parameters()

    def terms(self, query: Tensor, key: Tensor, value: Tensor) -> list[Term]:
        query, key = self.offset(query, key)
        query, conv = query / self.group_size, self.conv_weight
        return [Term(query, key, value, local_scale=1.0, conv_weight=conv, activation=self.activation)]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_gamma: Tensor,
    query_beta: Tensor,
    key_gamma: Tensor,
    key_beta: Tensor,
    *,
    activation: str,
    group_size: int,
    causal: bool,
) -> Tensor:
    """float64 [B, H, T, D] with heads repeated; gamma, beta [H, D]."""
    query = query * query_gamma[:, None] + query_beta[:, None]
    key = key * key_gamma[:, None] + key_beta[:, None]
    scores = query @ key.mT / group_size
    weights = scores.clamp(min=0) ** 2
    if activation == "laplace":
        sigma = math.sqrt(1 / (4 * math.pi))
        weights = 0.5 * (1 + torch.erf((scores - math.sqrt(0.5)) / (sigma * math.sqrt(2))))
    t, j = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    visible = t // group_size == j // group_size
    if causal:
        visible = visible & (j <= t)
    return (weights * visible) @ value


MECHANISM = Mechanism(
    name="flash_local",
    formula="f(q'.k' / G) in the group, q' and k' scaled and shifted per feature",
    supports=EVERYWHERE,
    build=FlashLocalAttention,
    options={"activation": choice("relu2", "f: relu(s)^2 or Laplace's", ("relu2", "laplace"))},
)
