"""Embeddings of texts, and how similar the embeddings of two encoders are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.precise import wide
from ..errors import InputError


def pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over tokens that are not padding.

    Args:
        hidden: `[B, T, D]`.
        mask: `[B, T]`, 0 at padding; None without padding.

    Returns:
        `[B, D]` in float32, or in float64 for that.
    """
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    if mask is None or mask.shape != hidden.shape[:2]:
        return wide.mean(1)
    weight = mask.to(wide)[..., None]
    # Padding may hold anything, even NaN.
    return torch.where(weight > 0, wide * weight, 0).sum(1) / weight.sum(1).clamp_min(1e-9)


def compare(found: Tensor, wanted: Tensor) -> tuple[float, float | None]:
    """Compare the embeddings `[N, D]` of the same texts by two models.

    Returns:
        The mean cosine between the embeddings of a text, and Spearman's correlation of the similarities of
        all pairs of texts; None if all similarities are the same.

    Raises:
        InputError: There are fewer than three texts.
    """
    if len(found) < 3:
        raise InputError(f"a rank correlation needs three texts or more, got {len(found)}")
    a, b = F.normalize(wide(found), dim=-1), F.normalize(wide(wanted), dim=-1)
    pairs = torch.triu_indices(len(a), len(a), 1, device=a.device)
    first, second = ((x @ x.mT)[pairs[0], pairs[1]] for x in (a, b))
    return float((a * b).sum(-1).mean()), spearman(first, second)


def spearman(a: Tensor, b: Tensor) -> float | None:
    """The rank correlation of `[N]` and `[N]`; equal values get the mean of their ranks.

    None if one of them is constant.
    """
    x, y = (rank - rank.mean() for rank in (ranks(a), ranks(b)))
    size = float(x.square().sum() * y.square().sum()) ** 0.5
    return float((x * y).sum()) / size if size > 0 else None


def ranks(values: Tensor) -> Tensor:
    """The ranks, from 1, of values `[N]`: float64 `[N]`. Equal values get the mean of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
