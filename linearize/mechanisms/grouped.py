"""Ablation: the grouped linear part of `augmented_paper` alone, q.k over earlier groups; alpha starts at one.

Formula, source and naive form: `kernels/naive.py`. State: [D, Dv] per key/value head, the sum of k^T v over
finished groups, and the keys and values of the open group.
"""

from __future__ import annotations

from .augmented_paper import PaperAttention
from .base import EVERYWHERE, Mechanism, Settings
from .spec import SiteSpec


def _build(spec: SiteSpec, config: Settings) -> PaperAttention:
    return PaperAttention(spec, config, alpha=1.0, local_scale=None)


MECHANISM = Mechanism(
    name="grouped",
    formula="alpha * q.k over earlier groups",
    supports=EVERYWHERE,
    build=_build,
)
