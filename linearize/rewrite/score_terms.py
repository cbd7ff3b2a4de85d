"""What the score terms of a site hide: the steps of its program, and the tensors of a call that they take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..passes.mask import MASKED
from ..passes.site import Step
from .masks import visible

Kind = tuple[str, Any]
"""Kind and value of a step that has a term."""


def kinds_of(program: Sequence[Step]) -> list[Kind]:
    """Of every step with a term, in the order of the terms."""
    return [
        (step.kind, 1.0 if step.kind == "sdpa" or step.value is None else step.value)
        for step in program
        if step.term is not None
    ]


def hides_what_is_later(program: Sequence[Step]) -> bool:
    """Whether a step without a term is causal."""
    return any(step.kind == "causal" or (step.kind == "sdpa" and step.value["causal"]) for step in program)


def parts_seen(terms: Sequence[Tensor], kinds: Sequence[Kind]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What each term lets be seen, and whether it does nothing but hide.

    Args:
        terms: Broadcastable to `[B, H, T, S]`.
        kinds: Of their steps.

    Yields:
        For a term that may hide keys, bool of its shape, and bool `[]`; None where it can do nothing else.
    """
    for term, (kind, value) in zip(terms, kinds, strict=True):
        if kind in ("fill", "keep"):
            part = term.bool() if kind == "keep" else ~term.bool()
            yield part, None if value <= MASKED else part.all()
        elif kind in ("add", "sdpa") and term.dtype == torch.bool:
            yield term, None
        elif kind in ("add", "sdpa"):
            part = visible(term * value)
            yield part, ((term == 0) | ~part).all()
