"""A power in place of softmax's exponential over the nearest tokens, a linear kernel over all others.

    w(s) = relu(1 + s / p)^p + 1e-6            which tends to exp(s) as the power p grows
    f(x) = (relu([x, -x]) + 1e-6) / sum        of which no entry is zero
    c = b^2, near and far as in `windowed.py`

No exponential anywhere: powers are squarings, for p is a power of two. Without the relu this is the limit
form of exp that arithmetic without exponentials uses (CrypTen, arXiv 2109.00984); the relu keeps it monotone
below -p. 1e-6 is ours: a query all of whose scores lie below -p would have no weights; its window counts
evenly then. A, B and b learn, b per head.

Parallel form and state: those of `windowed.py`. The size of the near weights is the p-th root of their sum,
relative to the row's largest base, so that scores of any finite magnitude neither overflow nor vanish.
Initialisation: A and B the identity; b = sqrt(FAR 2 D), so that features that are spread evenly weigh FAR.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.window_chunk import EPSILON, power_weights, power_window, root, to_power
from .base import Mechanism, Option, whole
from .spec import SiteSpec
from .windowed import FAR, OPTIONS, WindowedAttention, reach

if TYPE_CHECKING:
    from .base import Settings


class PowerWindowAttention(WindowedAttention):
    def __init__(self, spec: SiteSpec, config: Settings, window: int | None = None) -> None:
        super().__init__(spec, config, window)
        self.power: int = config.option("power")

    @property
    def far_weight_at_first(self) -> float:
        return math.sqrt(FAR * 2 * self.spec.head_dim)

    def near(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        window, causal = self.window, self.spec.causal
        return power_window(query, key, value, key_mask, query_start, window, causal, self.power)

    def weigh(self, scores: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        return power_weights(scores, hidden, self.power)

    def joint_size(self, size: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        largest = torch.maximum(size, other)
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        own, others = (to_power(x / largest, self.power) for x in (size, other))
        total = own + others
        total = torch.where(total > 0, total, torch.ones_like(total))
        return largest * root(total, self.power), others / total

    def features(self, x: Tensor, weight: Tensor) -> Tensor:
        x = x @ weight.to(x.dtype).mT
        x = torch.cat([x.relu(), (-x).relu()], dim=-1) + EPSILON
        return x / x.sum(-1, keepdim=True)

    def far_share(self, total: Tensor, size: Tensor) -> Tensor:
        assert self.far_weight is not None
        size = torch.where(size > 0, size, torch.ones_like(size))  # a padded query has none
        weight = self.far_weight.to(total.dtype)[:, None, None]
        far = weight * weight * total * to_power(1 / size, self.power)  # in units of the near sum
        return far / (1 + far)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, power={self.power}"


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_map: Tensor | None,
    key_map: Tensor | None,
    far_weight: Tensor | None,
    *,
    window: int,
    sinks: int,
    power: int,
    scale: float,
    causal: bool,
) -> Tensor:
    """float64 [B, H, T, D] with heads repeated; maps [H, D, D], far_weight [H], None without a tail."""

    def features(x: Tensor, weight: Tensor) -> Tensor:
        x = torch.einsum("hij,bhtj->bhti", weight, x)
        x = torch.cat([x.clamp(min=0), (-x).clamp(min=0)], -1) + 1e-6
        return x / x.sum(-1, keepdim=True)

    position = torch.arange(key.shape[2])
    lag = torch.arange(query.shape[2])[:, None] - position
    near = (1 + query @ key.mT * scale / power).clamp(min=0) ** power + 1e-6
    far = torch.zeros_like(near)
    if query_map is not None and key_map is not None and far_weight is not None:
        far = features(query, query_map) @ features(key, key_map).mT * far_weight.square()[:, None, None]
    weights = torch.where((lag.abs() < window) | (position < sinks), near, far)
    if causal:
        weights = weights.tril()
    return weights @ value / weights.sum(-1, keepdim=True)


def _is_power_of_two(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 2 and value & (value - 1) == 0


def _build(spec: SiteSpec, config: Settings) -> PowerWindowAttention:
    own = None
    if spec.window is not None and MECHANISM.covers(spec, config.options):
        own = spec.window if spec.causal else spec.window + 1
    return PowerWindowAttention(spec, config, own)


MECHANISM = Mechanism(
    name="power_window",
    formula="relu(1 + s/p)^p over the last `window` and first `sinks` tokens + f(q).f(k) over others",
    supports=frozenset({"causal", "bidirectional"}),
    build=_build,
    reach=reach,
    sizes=("window",),
    options={
        "window": whole(64, "tokens that see each other's scores, the present one included"),
        "power": Option(16, "p; the larger, the closer to exp", "a power of two >= 2", _is_power_of_two),
        **OPTIONS,
    },
)
