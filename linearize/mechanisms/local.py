"""Ablation: the local part of `augmented` alone, relu(q.k)^2 inside each group. No parameters of its own.

Formula, source and oracle: `kernels/oracle.py`. State: the keys and values of the open group.
"""

from __future__ import annotations

from ..attention import LinearAttention, SiteSpec
from ..config import LinearizeConfig
from .augmented import OPTIONS
from .base import EVERYWHERE, Mechanism


def _build(spec: SiteSpec, config: LinearizeConfig) -> LinearAttention:
    return LinearAttention(
        spec,
        group_size=config.group_size,
        conv_taps=config.conv_taps if config.augments else None,
        local_scale=config.local_scale,
        alpha=None,
        keeps_bias=config.option("position_bias") == "local",
    )


MECHANISM = Mechanism(
    name="local",
    formula="local_scale * relu(q.k)^2 in the group",
    supports=EVERYWHERE,
    build=_build,
    options=OPTIONS,
)
