"""Graph passes: capture -> match -> verify -> raise -> lower. Knows graphs only.

Nothing here imports kernels or the product around it; lowering takes a factory from site to module.
"""

from __future__ import annotations

from .capture import CaptureError, capture
from .pipeline import find_attention, lower_attention, raise_attention
from .site import MatchReport, Refusal, Site
from .steps import SCORE_STEPS, Effect, StepRule

__all__ = [
    "SCORE_STEPS",
    "CaptureError",
    "Effect",
    "MatchReport",
    "Refusal",
    "StepRule",
    "Site",
    "capture",
    "find_attention",
    "lower_attention",
    "raise_attention",
]
