"""The paper's augmented linear attention (arXiv 2406.07368), its default here.

o = local_scale * local + alpha * grouped + convolution(v); the formula and its source are in
`kernels/oracle.py`, the parallel form in `kernels/reference.py`. alpha (one number per site) and the
convolution (one filter per head) start at zero, so a fresh module computes the local part alone.
"""

from __future__ import annotations

from ..attention import LinearAttention, SiteSpec
from ..config import LinearizeConfig
from .base import Mechanism


def _build(spec: SiteSpec, config: LinearizeConfig) -> LinearAttention:
    return LinearAttention(
        spec,
        group_size=config.group_size,
        conv_taps=config.conv_taps,
        local_scale=config.local_scale,
        alpha=0.0,
    )


MECHANISM = Mechanism(
    name="augmented",
    formula="local_scale * relu(q.k)^2 in the group + alpha * q.k over earlier groups + convolution of v",
    supports=frozenset({"causal", "bidirectional", "cross"}),
    build=_build,
)
