"""Random feature attention (Peng et al., arXiv 2103.02143): sines and cosines, without its gate.

    o[t] = sum_j f(q[t]).f(k[j]) v[j] / max(sum_j f(q[t]).f(k[j]), 0.1)      j <= t if causal
    f(x) = [sin(W (sigma * x^)), cos(W (sigma * x^))] / sqrt m,              x^ = x / |x|

E[f(q).f(k)] = exp(-|sigma (q^ - k^)|^2 / 2), proportional to exp(sigma^2 q^.k^) since rows have unit length;
the site's scale plays no part. W [m, D]: Gaussian vectors, orthogonal in blocks, from `seed`: a buffer, saved
with the model. sigma is learned per feature and key/value head (section 3.1's reparameterisation).

An estimate, unlike what it estimates, can be near zero or negative. So the denominator is kept away from
zero, as the authors' code does (`clamp`): 0.1 is below exp(-2) = 0.135, the least one key weighs at sigma 1.

Parallel form: one core call, linear, numerator and denominator together.
State: [2m, Dv + 1] per key/value head. Initialisation: sigma one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..kernels.tensors import unit_of_any_size
from .base import EVERYWHERE, Mechanism, whole
from .normalized import NormalizedAttention, orthogonal_gaussian
from .spec import SiteSpec

if TYPE_CHECKING:
    from .base import Settings


class RandomFeatureAttention(NormalizedAttention):
    least = 0.1
    projection: Tensor

    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        self.seed: int = config.option("seed")
        features = config.option("features") or spec.head_dim
        self.register_buffer("projection", torch.empty(features, spec.head_dim))
        self.sigma = nn.Parameter(torch.empty(spec.num_key_value_heads, spec.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.projection.copy_(orthogonal_gaussian(self.projection, self.seed))
        with torch.no_grad():
            self.sigma.fill_(1)

    def features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        projection = self.projection.to(query.dtype)

        def waves(x: Tensor, sigma: Tensor) -> Tensor:
            angle = (unit_of_any_size(x) * sigma.to(x.dtype)[:, None]) @ projection.mT
            return torch.cat([angle.sin(), angle.cos()], dim=-1) * projection.shape[0] ** -0.5

        return waves(query, self.of_query_heads(self.sigma)), waves(key, self.sigma)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, features={self.projection.shape[0]}, seed={self.seed}"


def naive(
    query: Tensor, key: Tensor, value: Tensor, sigma: Tensor, projection: Tensor, *, causal: bool
) -> Tensor:
    """float64 [B, H, T, D] with heads repeated; sigma [H, D], projection [m, D]."""
    query = query / query.norm(dim=-1, keepdim=True) * sigma[:, None] @ projection.T
    key = key / key.norm(dim=-1, keepdim=True) * sigma[:, None] @ projection.T
    # sin a sin b + cos a cos b = cos(a - b)
    weights = torch.cos(query[:, :, :, None] - key[:, :, None]).mean(-1)
    if causal:
        weights = weights.tril()
    return weights @ value / weights.sum(-1, keepdim=True).clamp(min=0.1)


MECHANISM = Mechanism(
    name="rfa",
    formula="f(q).f(k) / sum, f random sines and cosines of unit rows",
    supports=EVERYWHERE,
    build=RandomFeatureAttention,
    options={
        "features": whole(None, "random directions m, a sine and a cosine each; None for D"),
        "seed": whole(0, "seed of the random directions", least=0, most=2**32),
    },
)
