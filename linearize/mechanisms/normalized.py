"""Mechanisms that are one sum over all keys divided by another: a map of features is all that they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.tensors import widen, with_one
from .composed import ComposedAttention
from .term import Term


class NormalizedAttention(ComposedAttention):
    """sum f(q).f(k) v / sum f(q).f(k), over every key a query may see. Subclasses give `features`."""

    least: ClassVar[float] = 0.0
    """Denominators are kept at or above this; at 0, a denominator of 0 gives an output of 0."""

    def features(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """query [B, H, T, D], key [B, Hkv, S, D] in float32 or wider -> [B, H, T, F], [B, Hkv, S, F]."""
        raise NotImplementedError

    def terms(self, query: Tensor, key: Tensor, value: Tensor) -> list[Term]:
        query, key = self.features(widen(query), widen(key))
        return [self.over_all(query, key, with_one(widen(value)))]

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        (joined,) = outputs
        total = joined[..., -1:]
        if self.least:
            total = total.clamp(min=self.least)
        else:
            total = torch.where(total <= 0, torch.ones_like(total), total)  # NaN stays NaN
        return joined[..., :-1] / total


def orthogonal_gaussian(like: Tensor, seed: int) -> Tensor:
    """float32 of the shape of `like` [rows, columns], on the CPU: Gaussian vectors, orthogonal in blocks.

    Choromanski et al. (arXiv 2009.14794), section 2.4: directions of orthogonal blocks of `columns` rows,
    norms of Gaussian vectors. The same for the same seed, on any device.
    """
    rows, columns = like.shape
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, columns, generator=generator, device="cpu", dtype=torch.float64)

    blocks = [torch.linalg.qr(normal(columns)).Q.T for _ in range(math.ceil(rows / columns))]
    norms = normal(rows).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:rows] * norms).float()
