"""Graph passes: capture -> match -> verify -> raise -> lower. Knows graphs only.

Nothing here imports kernels or the product around it; lowering takes a factory from site to module.
`print(PIPELINE)` shows the passes in order, with what each needs and gives.
"""

from __future__ import annotations

from .capture import CaptureError, capture
from .pipeline import Change, Pass, PassError, Pipeline, Work, run_passes
from .sequence import PIPELINE, find_attention, lower_attention, raise_attention
from .site import MatchReport, Reason, Refusal, Site
from .steps import SCORE_STEPS, Effect, StepRule

Row = StepRule  # its name in 0.1.0

__all__ = [
    "PIPELINE",
    "SCORE_STEPS",
    "CaptureError",
    "Change",
    "Effect",
    "MatchReport",
    "Pass",
    "PassError",
    "Pipeline",
    "Reason",
    "Refusal",
    "Row",
    "Site",
    "StepRule",
    "Work",
    "capture",
    "find_attention",
    "lower_attention",
    "raise_attention",
    "run_passes",
]
