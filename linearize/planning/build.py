"""The attention module of a site, from its spec and the config."""

from __future__ import annotations

from .. import mechanisms
from ..mechanisms.module import AttentionModule
from ..mechanisms.spec import SiteSpec
from .config import LinearizeConfig


def build_attention(spec: SiteSpec, config: LinearizeConfig) -> AttentionModule:
    """The module for one site. Whether the mechanism can carry the site is the planner's question
    (`mechanisms.get(name).refusal`)."""
    return mechanisms.get(config.mechanism).build(spec, config)
