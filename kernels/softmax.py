"""Softmax attention to the tokens that a query sees, whatever the others hold.

0 * NaN is NaN, so a masked token would reach everybody; and scores of finite rows can leave the range of
float32. On a CPU both are looked for, and what is then computed takes longer. Elsewhere looking would mean
waiting: there a masked value that is not finite reaches the queries of its block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .tensors import are_finite, product_of_seen


class Scores(NamedTuple):
    """How the scores are made of the products of queries and keys.

    Attributes:
        scale: Factor of the products.
        softcap: c where scores become `c * tanh(score / c)` (Gemma 2, arXiv 2408.00118); None without.
    """

    scale: float
    softcap: float | None = None

    def of(self, query: Tensor, keys: Tensor) -> Tensor:
        """query [*P, R, T, D] and keys [*P, M, D] -> [*P, R, T, M]."""
        found = query.flatten(-3, -2) @ (keys.mT * self.scale)
        return self.capped(found).unflatten(-2, query.shape[-3:-1])

    def capped(self, scaled: Tensor) -> Tensor:
        """Products that the scale is in already."""
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def weights_of_seen(scores: Tensor, hidden: Tensor, in_double: Callable[[], Tensor]) -> Tensor:
    """softmax(scores) over what is not hidden.

    Args:
        scores: [..., m], float32 or wider.
        hidden: Bool, broadcastable to the scores.
        in_double: Gives the scores anew, in float64.

    Returns:
        Like the scores: zeros where hidden, and NaN where a score that is seen is NaN or infinite.
    """
    dtype, lost = scores.dtype, None
    if not are_finite(scores):
        scores = in_double()
        lost = ((scores == -torch.inf) | hidden).all(-1, keepdim=True) & ~hidden
    # Not -inf: a query that sees nothing must have finite gradients as well.
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    if lost is not None:
        weights = weights.masked_fill(lost, torch.nan).to(dtype)
    return weights.masked_fill(hidden, 0)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, rule: Scores
) -> tuple[Tensor, Tensor]:
    """Attention of query [*P, R, T, D] to keys [*P, M, D] and values [*P, M, Dv] that are not hidden, bool
    [*P, T, M] -> outputs [*P, R, T, Dv] and weights [*P, R, T, M]; a query that sees nothing gets zeros."""
    hidden = hidden.unsqueeze(-3)
    scores = rule.of(query, keys)
    weights = weights_of_seen(scores, hidden, lambda: rule.of(query.double(), keys.double()))
    return product(weights, values, ~hidden), weights


def product(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """weights [*P, R, T, M] @ values [*P, M, Dv] that are `seen`, bool broadcastable to the weights."""
    rows = weights.flatten(-3, -2)
    if are_finite(values):
        out = rows @ values
    else:
        out = product_of_seen(rows, values, seen.expand(weights.shape).flatten(-3, -2))
    return out.unflatten(-2, weights.shape[-3:-1])
