"""The identity: the site's own softmax attention, exactly, through the machinery of a conversion."""

from __future__ import annotations

from .base import EVERYWHERE, Mechanism, Settings
from .module import SoftmaxAttention
from .spec import SiteSpec


def _build(spec: SiteSpec, config: Settings) -> SoftmaxAttention:
    return SoftmaxAttention(spec)


MECHANISM = Mechanism(
    name="softmax",
    formula="softmax(program(q.k)) v",
    supports=EVERYWHERE | {"softcap", "sinks", "alibi", "bias", "window", "mask", "documents"},
    build=_build,
    augmentation=None,
)
