"""What a fit did to text that had no part in it, and undoing it where that got worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .site_fit import Fit

_FIRST = 512
"""Positions come in ranges that double: to 512, to 1024, to 2048, ..."""


@dataclass(frozen=True)
class ByLength:
    """Perplexity of the tokens at positions `first` to `last`, before the fit and after it."""

    first: int
    last: int
    before: float
    after: float


def predicts(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the model predicts the next of the tokens that it is given."""
    config: Any = getattr(model, "config", None)
    generates = getattr(model, "can_generate", lambda: False)()
    return generates and not config.is_encoder_decoder and "input_ids" in inputs


def settle(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    fits: Mapping[str, Fit],
    forward: Callable[[nn.Module, Mapping[str, Any]], Any],
) -> tuple[dict[str, str], tuple[ByLength, ...]]:
    """Put layers back to what they were until no range of positions is worse than before the fit.

    Those go first that the fit helped least, half of the rest each time.

    Args:
        model: With the fits in.
        batches: Inputs of the model that were held out.
        fits: By site.
        forward: Runs the model on one batch.

    Returns:
        Why a fit was not kept, for the sites where it was not, and perplexity by position.
    """
    if not batches:
        return {}, ()
    after = _losses(model, batches, forward)
    for fit in fits.values():
        fit.restore()
    before = _losses(model, batches, forward)
    kept = sorted(fits, key=lambda name: fits[name].gain)  # the least helpful first
    for name in kept:
        fits[name].put()
    while kept and any(after[length] > before[length] for length in before):
        for name in kept[: -(-len(kept) // 2)]:
            fits[name].restore()
        kept = kept[-(-len(kept) // 2) :]
        after = _losses(model, batches, forward) if kept else before
    table = tuple(
        ByLength(0 if last == _FIRST else last // 2, last - 1, math.exp(before[last]), math.exp(after[last]))
        for last in sorted(before)
    )
    return {name: "its fit made held-out text worse" for name in fits if name not in kept}, table


def _losses(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    forward: Callable[[nn.Module, Mapping[str, Any]], Any],
) -> dict[int, float]:
    """Mean loss of the next token by the end of the range that its position lies in."""
    sums: dict[int, list[float]] = {}
    for batch in batches:
        logits = forward(model, batch).logits[:, :-1]
        ids = batch["input_ids"].to(logits.device)
        loss = torch.stack(  # a sequence at a time: float32 logits are large
            [F.cross_entropy(x.float(), y, reduction="none") for x, y in zip(logits, ids[:, 1:], strict=True)]
        )
        real = _real(batch, ids)[:, 1:]
        for first, last in _ranges(loss.shape[1]):
            there = real[:, first:last]
            total = sums.setdefault(last, [0.0, 0.0])
            total[0] += float((loss[:, first:last] * there).sum())
            total[1] += float(there.sum())
    return {last: total / count for last, (total, count) in sums.items() if count}


def _real(batch: Mapping[str, Any], ids: Tensor) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(ids) if mask is None else mask.to(ids)


def _ranges(length: int) -> list[tuple[int, int]]:
    ranges = [(0, _FIRST)]
    while ranges[-1][1] < length:
        ranges.append((ranges[-1][1], 2 * ranges[-1][1]))
    return ranges
