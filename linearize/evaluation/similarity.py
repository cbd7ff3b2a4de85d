"""Embeddings of texts by an encoder, and how alike two encoders find the same texts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


def pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real tokens: `[B, T, D]`, mask `[B, T]` (None: all) -> float32 or float64 `[B, D]`."""
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    if mask is None or mask.shape != hidden.shape[:2]:
        return wide.mean(1)
    weight = mask.to(wide)[..., None]
    # What stands at padding may be anything, NaN too.
    return torch.where(weight > 0, wide * weight, 0).sum(1) / weight.sum(1).clamp_min(1e-9)


def compare(found: Tensor, wanted: Tensor) -> tuple[float, float | None]:
    """Mean cosine of the same text's embeddings `[N, D]`, and Spearman's correlation of the similarities of
    all pairs within each; None where a model finds all pairs alike. Raises InputError below three texts."""
    if len(found) < 3:
        raise InputError(f"a rank correlation needs three texts or more, got {len(found)}")
    a, b = F.normalize(found.double(), dim=-1), F.normalize(wanted.double(), dim=-1)
    pairs = torch.triu_indices(len(a), len(a), 1, device=a.device)
    first, second = ((x @ x.mT)[pairs[0], pairs[1]] for x in (a, b))
    return float((a * b).sum(-1).mean()), spearman(first, second)


def spearman(a: Tensor, b: Tensor) -> float | None:
    """Rank correlation of `[N]` and `[N]`; equal values share the mean of their ranks. None when one of them
    is constant."""
    x, y = (rank - rank.mean() for rank in (ranks(a), ranks(b)))
    size = float(x.square().sum() * y.square().sum()) ** 0.5
    return float((x * y).sum()) / size if size > 0 else None


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, float64 `[N]`, of values `[N]`; equal ones share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
