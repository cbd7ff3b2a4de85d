"""The identity: the site's own softmax attention, exactly, through the machinery of a conversion."""

from __future__ import annotations

from ..attention import SiteSpec, SoftmaxAttention
from ..config import LinearizeConfig
from .base import EVERYWHERE, Mechanism


def _build(spec: SiteSpec, config: LinearizeConfig) -> SoftmaxAttention:
    return SoftmaxAttention(spec)


MECHANISM = Mechanism(
    name="softmax",
    formula="softmax(program(q.k)) v",
    supports=EVERYWHERE | {"softcap", "sinks", "alibi", "bias", "window", "mask"},
    build=_build,
    augmentation=None,
)
