"""Ablation: the grouped linear part of `augmented` alone, q.k over earlier groups; alpha starts at one.

Formula, source and oracle: `kernels/oracle.py`. State: [D, Dv] per key/value head, the sum of k^T v over
finished groups, and the keys and values of the open group.
"""

from __future__ import annotations

from ..attention import LinearAttention, SiteSpec
from ..config import LinearizeConfig
from .base import EVERYWHERE, Mechanism


def _build(spec: SiteSpec, config: LinearizeConfig) -> LinearAttention:
    taps = config.conv_taps if config.augments else None
    return LinearAttention(spec, group_size=config.group_size, conv_taps=taps, local_scale=0.0, alpha=1.0)


MECHANISM = Mechanism(
    name="grouped",
    formula="alpha * q.k over earlier groups",
    supports=EVERYWHERE,
    build=_build,
)
