"""What an attention module must know of its site."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class SiteSpec:
    """What an attention module must know of its site. Part of the plan, so it can be written as JSON.

    Attributes:
        num_heads: Query heads, H.
        num_key_value_heads: Key and value heads, Hkv, a divisor of H.
        head_dim: Features per head of query and key, D.
        value_dim: Features per head of value, Dv.
        causal: A query sees itself and earlier tokens only.
        cross: Queries and keys are different sequences (not with `causal`).
        scale: Factor of the scores; None for `head_dim ** -0.5`.
        softcap: c where scores become `c * tanh(score / c)`; None without.
        kv_layout: Query head h reads key/value head `h // (H // Hkv)` ("interleaved") or `h % Hkv` ("tiled").
        dropout: Probability with which training drops an attention weight.
        window: Causal sites see the last `window` tokens, the present one included; others see tokens with
            `|i - j| <= window`. None: no window.

    Raises:
        ConfigError: The values do not fit together.
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
        """The fields by name, as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteSpec:
        """Make a spec of what `to_dict` gave.

        Args:
            data: The fields by name.

        Returns:
            The spec.

        Raises:
            ConfigError: A field is unknown, missing or wrong.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"not a site spec: {error}") from error
