"""The attention module of a site, from its spec and the config."""

from __future__ import annotations

import torch

from .. import mechanisms
from ..mechanisms.module import AttentionModule
from ..mechanisms.spec import SiteSpec
from .config import LinearizeConfig


def build_attention(spec: SiteSpec, config: LinearizeConfig) -> AttentionModule:
    """The module for one site. Whether the mechanism can carry the site is the planner's question
    (`mechanisms.get(name).refusal`)."""
    return mechanisms.get(config.mechanism).build(spec, config)


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the parameters of attention modules are kept in, in a model of `dtype`: float32 or wider.

    They are few and are read once a call; in bfloat16 and float16 the steps of an optimizer are smaller than
    half of their last digit, and most of them are lost.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
