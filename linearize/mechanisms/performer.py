"""Performer's FAVOR+ (Choromanski et al., arXiv 2009.14794): positive random features of the softmax kernel.

    o[t] = sum_j f(q[t]).g(k[j]) v[j] / sum_j f(q[t]).g(k[j])        j <= t if causal
    f(q) = exp(W q' - |q'|^2 / 2)
    g(k) = exp(min(W k' - |k'|^2 / 2, 40)) + 1e-4                     q' = sqrt(scale) q, k' = sqrt(scale) k

E[f(q).f(k)] / m = exp(scale q.k): with many features this is the site's own softmax. W [m, D] are Gaussian
vectors, orthogonal in blocks (section 2.4), drawn once from `seed`: a buffer, saved with the model.

Stable for any norm, and causal to the last bit, unlike a maximum over keys, which the future would move:
f is divided by its largest entry, which cancels; a key's exponent is at most |w|^2 / 2, and capped where that
is still too much for float32; 1e-4 (the paper's own epsilon) leaves keys that no feature meets a weight.

Parallel form: one core call, linear, numerator and denominator together.
State: [m, Dv + 1] per key/value head. Initialisation: no learned parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import EVERYWHERE, Mechanism, whole
from .normalized import NormalizedAttention, orthogonal_gaussian
from .spec import SiteSpec

if TYPE_CHECKING:
    from .base import Settings

_CAP = 40.0
"""exp(40) times 10^6 tokens, squared in a gradient, is still a float32."""
_EPSILON = 1e-4


class PerformerAttention(NormalizedAttention):
    projection: Tensor

    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        self.seed: int = config.option("seed")
        features = config.option("features") or 2 * spec.head_dim
        self.register_buffer("projection", torch.empty(features, spec.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.projection.copy_(orthogonal_gaussian(self.projection, self.seed))

    def features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        projection = self.projection.to(query.dtype)
        root = abs(self.scale) ** 0.5
        query, key = query * (root if self.scale > 0 else -root), key * root
        of_query = query @ projection.mT
        of_query = (of_query - of_query.amax(-1, keepdim=True).detach()).exp()
        of_key = key @ projection.mT - key.square().sum(-1, keepdim=True) / 2
        return of_query, of_key.clamp(max=_CAP).exp() + _EPSILON

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, features={self.projection.shape[0]}, seed={self.seed}"


def naive(
    query: Tensor, key: Tensor, value: Tensor, projection: Tensor, *, scale: float, causal: bool
) -> Tensor:
    """float64 [B, H, T, D] with heads repeated; projection [m, D]."""
    query, key = query * scale**0.5, key * scale**0.5
    of_query = torch.exp(query @ projection.T - (query**2).sum(-1, keepdim=True) / 2)
    of_key = torch.exp(key @ projection.T - (key**2).sum(-1, keepdim=True) / 2) + 1e-4
    weights = of_query @ of_key.mT
    if causal:
        weights = weights.tril()
    return weights @ value / weights.sum(-1, keepdim=True)


MECHANISM = Mechanism(
    name="performer",
    formula="f(q).f(k) / sum, f positive random features of exp(scale q.k)",
    supports=EVERYWHERE,
    build=PerformerAttention,
    options={
        "features": whole(None, "random features m; None for 2 D"),
        "seed": whole(0, "seed of the random features", least=0, most=2**32),
    },
)
