from __future__ import annotations

from typing import TYPE_CHECKING

from ..mechanisms.module import AttentionModule
from ..mechanisms.spec import SiteSpec

if TYPE_CHECKING:
    from .config import LinearizeConfig


def build_attention(spec: SiteSpec, config: LinearizeConfig) -> AttentionModule:
    """The module for one site. Whether the mechanism can carry the site is the planner's question
    (`mechanisms.get(name).refusal`)."""
    from .. import mechanisms  # the mechanisms' files build on this one

    return mechanisms.get(config.mechanism).build(spec, config)
