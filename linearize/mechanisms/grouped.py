"""Ablation: the grouped linear part of `augmented` alone, q.k over earlier groups; alpha starts at one."""

from __future__ import annotations

from ..attention import LinearAttention, SiteSpec
from ..config import LinearizeConfig
from .base import Mechanism


def _build(spec: SiteSpec, config: LinearizeConfig) -> LinearAttention:
    return LinearAttention(spec, group_size=config.group_size, conv_taps=None, local_scale=0.0, alpha=1.0)


MECHANISM = Mechanism(
    name="grouped",
    formula="alpha * q.k over earlier groups",
    supports=frozenset({"causal", "bidirectional", "cross"}),
    build=_build,
)
