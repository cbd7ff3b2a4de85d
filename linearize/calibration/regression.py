"""Ridge regression on a stream, one for each head, which chooses its own strength.

Whatever comes is first predicted by what was fitted before it came, then counted. So the error of every
strength, and that of changing nothing, is known on data that had no part in the fit (Dawid's prequential
principle), without a second pass. Each head takes what predicted best; a head that no fit helped stays as it
was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.precise import wide

STRENGTHS = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""How strongly weights are pulled to zero, relative to the evidence for each."""
_GROWTH = 1.1
"""The least growth of the data after which it is solved again."""


class Regression:
    """`target ~ columns @ weights` for each head.

    strengths: Those to choose from.
    """

    def __init__(self, strengths: tuple[float, ...] = STRENGTHS) -> None:
        self.strengths = strengths
        self.rows = 0
        self._solved_at = 0.0
        self._products: Tensor | None = None  # [H, P, P]
        self._right: Tensor  # [H, P, C]
        self._solutions: Tensor | None = None  # [strengths, H, P, C]
        self._errors: Tensor  # [1 + strengths, H], of no weights and of each strength

    def add(self, columns: Tensor, target: Tensor) -> None:
        """Take columns [H, N, P] and target [H, N, C]."""
        columns, target = wide(columns), wide(target)
        if self._products is None:
            heads, rows, width = columns.shape
            self._products = columns.new_zeros(heads, width, width)
            self._right = columns.new_zeros(heads, width, target.shape[2])
            self._errors = columns.new_zeros(1 + len(self.strengths), heads)
            if rows > 1:  # the first half of what comes first predicts the other half
                self._take(columns[:, : rows // 2], target[:, : rows // 2])
                columns, target = columns[:, rows // 2 :], target[:, rows // 2 :]
        self._take(columns, target)

    def _take(self, columns: Tensor, target: Tensor) -> None:
        if self._solutions is not None:
            self._errors[0] += target.square().sum((1, 2))
            for error, weights in zip(self._errors[1:], self._solutions, strict=True):
                error += (target - columns @ weights).square().sum((1, 2))
        assert self._products is not None
        self._products += columns.mT @ columns
        self._right += columns.mT @ target
        self.rows += columns.shape[1]
        if self.rows >= _GROWTH * self._solved_at:
            self._solved_at = self.rows
            self._solutions = torch.stack([self._solve(strength) for strength in self.strengths])

    def _solve(self, strength: float) -> Tensor:
        assert self._products is not None
        own = self._products.diagonal(dim1=1, dim2=2)
        # A weight without any evidence stays zero.
        ridge = torch.where(own > 0, own * strength, torch.ones_like(own))
        return torch.linalg.solve(self._products + torch.diag_embed(ridge), self._right)

    @property
    def evidence(self) -> bool:
        """Whether any column was ever other than zero."""
        return self._products is not None and bool(self._products.diagonal(dim1=1, dim2=2).any())

    @property
    def finite(self) -> bool:
        """Whether everything that came was finite."""
        sums = () if self._products is None else (self._products, self._right)
        return all(bool(torch.isfinite(x).all()) for x in sums)

    def weights(self, last: bool = False) -> Tensor | None:
        """[H, P, C]; None before anything came. last: from all that came, not from what was last solved."""
        if self._solutions is None:
            return None
        if last and self._solved_at < self.rows:
            self._solved_at = self.rows
            self._solutions = torch.stack([self._solve(strength) for strength in self.strengths])
        every = torch.cat([torch.zeros_like(self._solutions[:1]), self._solutions])
        chosen = self._errors.argmin(0)
        if not bool(self._errors.any()):  # nothing was predicted yet
            chosen = torch.full_like(chosen, 1 + len(self.strengths) // 2)
        return every[chosen, torch.arange(chosen.shape[0], device=chosen.device)]

    def errors(self) -> tuple[float, float]:
        """Sum of squares on data before it had a part in the fit: without the weights, and with them."""
        if self._products is None:
            return 0.0, 0.0
        return float(self._errors[0].sum()), float(self._errors.amin(0).sum())
