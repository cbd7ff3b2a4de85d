"""Ablation: the local part of `augmented_paper` alone, relu(q.k)^2 inside each group.

Formula, source and naive form: `kernels/naive.py`. State: the keys and values of the open group.
"""

from __future__ import annotations

from .augmented_paper import POSITION_BIAS, PaperAttention
from .base import EVERYWHERE, Mechanism, Settings
from .spec import SiteSpec


def _build(spec: SiteSpec, config: Settings) -> PaperAttention:
    return PaperAttention(spec, config, alpha=None, local_scale=config.local_scale)


MECHANISM = Mechanism(
    name="local",
    formula="local_scale * relu(q.k)^2 in the group",
    supports=EVERYWHERE,
    build=_build,
    options=POSITION_BIAS,
)
