from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class SiteSpec:
    """What an attention module must know of its site. JSON-able, part of the plan.

    head_dim, value_dim: features per head of query and key, and of value. scale: factor of the scores, None
    for `head_dim ** -0.5`. kv_layout: query head h reads key/value head `h // groups` ("interleaved") or
    `h % num_key_value_heads` ("tiled"). dropout: probability on attention weights. window: causal sites see
    the last `window` tokens, the present one included; others see `|i - j| <= window`.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    cross: bool = False
    scale: float | None = None
    softcap: float | None = None
    kv_layout: str = "interleaved"
    dropout: float = 0.0
    window: int | None = None

    def __post_init__(self) -> None:
        sizes = (self.num_heads, self.num_key_value_heads, self.head_dim, self.value_dim)
        if min(sizes) < 1 or self.num_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_key_value_heads} key/value heads, or a "
                f"dimension is not positive: {self}"
            )
        if self.causal and self.cross:
            raise ConfigError(f"a site is causal or cross-attention, not both: {self}")
        if self.kv_layout not in ("interleaved", "tiled"):
            raise ConfigError(f"kv_layout must be 'interleaved' or 'tiled', got {self.kv_layout!r}")
        if not 0 <= self.dropout <= 1:
            raise ConfigError(f"dropout must be a probability, got {self.dropout!r}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteSpec:
        """Inverse of `to_dict`. Raises ConfigError on unknown or missing fields."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"not a site spec: {error}") from error
