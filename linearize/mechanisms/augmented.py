"""The paper's augmented linear attention (arXiv 2406.07368), its default here.

o = local_scale * local + alpha * grouped + convolution(v); the formula and its source are in
`kernels/oracle.py`, the forms beside it. alpha (one number per site) and the convolution (one filter per
head) start at zero, so a fresh module computes the local part alone.

A site with a relative position bias is refused unless `approximate=("bias",)`: outside the group it has no
place. options={"position_bias": "local"} then keeps it inside, added after relu(q.k)^2 as the paper's T5
does. Untuned it is a poor start: it was made for the exponent of a softmax.

State: [D, Dv] per key/value head, the sum of k^T v over finished groups, and a window of keys and values that
serves the open group and the convolution.
"""

from __future__ import annotations

from ..attention import LinearAttention, SiteSpec
from ..config import LinearizeConfig
from .base import EVERYWHERE, Mechanism, choice

OPTIONS = {
    "position_bias": choice(
        "drop",
        "what becomes of T5's relative position bias: nothing, or added to the weights inside a group",
        ("drop", "local"),
    )
}


def _build(spec: SiteSpec, config: LinearizeConfig) -> LinearAttention:
    return LinearAttention(
        spec,
        group_size=config.group_size,
        conv_taps=config.conv_taps if config.augments else None,
        local_scale=config.local_scale,
        alpha=0.0,
        keeps_bias=config.option("position_bias") == "local",
    )


MECHANISM = Mechanism(
    name="augmented",
    formula="local_scale * relu(q.k)^2 in the group + alpha * q.k over earlier groups + convolution of v",
    supports=EVERYWHERE,
    build=_build,
    augmentation=True,
    options=OPTIONS,
)
