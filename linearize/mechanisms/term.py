"""What a mechanism gets in one call, and one call of the core operator, as it describes itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Term:
    """Arguments of one call of `ops.augmented_attention`; None leaves that part out.

    query [B, H, T, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], one dtype; alpha, local_scale: a number or
    a tensor [1] or [H]; conv_weight [H, taps]; local_bias [H, lags].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor | float | None = None
    local_scale: Tensor | float | None = None
    conv_weight: Tensor | None = None
    local_bias: Tensor | None = None
    activation: str = "linear"
    normalize: bool = False


class Given(NamedTuple):
    """What a site gets in one call, as `AttentionModule.forward` describes it.

    query [B, H, T, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], key_mask bool [B, S].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    query_start: int | Tensor | None
