"""Sums over scored positions: the perplexity of two models, their agreement, and their divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.precise import wide
from ..errors import InputError

_ROWS = 1024
"""How many positions are converted to probabilities at once, to save memory."""


def scored_positions(count: int, lengths: Sequence[int]) -> Tensor:
    """bool `[count]`: the tokens that begin no window of any of `lengths`."""
    positions = torch.arange(count)
    keep = torch.ones(count, dtype=torch.bool)
    for length in lengths:
        keep &= positions % length != 0
    return keep


@dataclass
class Tally:
    """Sums over scored positions.

    Attributes:
        tokens: The number of positions.
        loss: Negative log-likelihood by the model, in nats.
        other_loss: Negative log-likelihood by the reference, in nats.
        agreed: Positions at which the likeliest tokens are the same.
        kl: KL(reference || model), in nats.
    """

    tokens: int = 0
    loss: float = 0.0
    other_loss: float = 0.0
    agreed: int = 0
    kl: float = 0.0

    def add(self, logits: Tensor, other: Tensor | None, targets: Tensor, where: str) -> None:
        """Add positions.

        Args:
            logits: `[N, vocabulary]`, of the model.
            other: `[N, vocabulary]`, of the reference; None without one.
            targets: int64 `[N]`, the tokens.
            where: Names the batch in errors.

        Raises:
            InputError: Logits are NaN, the vocabularies differ, a target is outside of them, or a token has
                probability 0.
        """
        for who, given in (("model", logits), ("reference", other)):
            if given is None or not len(given):
                continue
            if bool(given.isnan().any()):
                raise InputError(f"the {who}'s logits are NaN in {where}: its weights or inputs are broken")
            if int(targets.max()) >= given.shape[-1] or int(targets.min()) < 0:
                raise InputError(
                    f"{where} has the token {int(targets.max())}, but the {who} gives {given.shape[-1]} "
                    "logits: the tokens are another model's"
                )
        if other is not None and other.shape[-1] != logits.shape[-1]:
            raise InputError(
                f"the reference has {other.shape[-1]} logits and the model {logits.shape[-1]}: another "
                "vocabulary cannot be compared"
            )
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            self._add(logits[rows], None if other is None else other[rows], targets[rows])
        if not math.isfinite(self.loss + self.other_loss):
            raise InputError(f"a token of {where} has probability 0, so there is no perplexity")

    def _add(self, logits: Tensor, other: Tensor | None, targets: Tensor) -> None:
        chosen = targets[:, None].to(logits.device)
        log_p = _log_probabilities(logits)
        self.tokens += len(targets)
        self.loss -= float(wide(log_p.gather(1, chosen)).sum())
        if other is None:
            return
        wanted = _log_probabilities(other.to(logits.device))
        self.other_loss -= float(wide(wanted.gather(1, chosen)).sum())
        self.agreed += int((logits.argmax(-1) == other.to(logits.device).argmax(-1)).sum())
        self.kl += _divergence(wanted, log_p)

    @property
    def perplexity(self) -> float:
        """The perplexity of the model."""
        return math.exp(self.loss / self.tokens)

    @property
    def other_perplexity(self) -> float:
        """The perplexity of the reference."""
        return math.exp(self.other_loss / self.tokens)


def total_kl(original: Tensor, logits: Tensor) -> float:
    """KL(original || other) in nats, summed over positions, from two logits `[N, vocabulary]`."""
    pairs = zip(original.split(_ROWS), logits.split(_ROWS), strict=True)
    return sum(_divergence(_log_probabilities(a), _log_probabilities(b.to(a.device))) for a, b in pairs)


def _divergence(wanted: Tensor, log_p: Tensor) -> float:
    """The sum of KL(wanted || log_p), both log-probabilities."""
    # Tokens of probability 0 add nothing, although their logarithm is infinite.
    terms = torch.where(wanted > -math.inf, wanted.exp() * (wanted - log_p), 0)
    return float(wide(terms).sum())


def _log_probabilities(logits: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1)
