"""Drafts that repeat what the text said before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...errors import ConfigError
from .drafter import Draft, merge


@dataclass(frozen=True)
class PromptLookup:
    """Drafts what followed earlier occurrences of the last tokens, in the prompt or in the generated text.

    Args:
        ngram: How many last tokens to look for; fewer if they do not occur.
        depth: How many tokens to copy from each occurrence.
        branches: How many occurrences to copy from, the latest first.

    Raises:
        ConfigError: A number is below 1.
    """

    ngram: int = 3
    depth: int = 8
    branches: int = 4

    needs_hidden: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if min(self.ngram, self.depth, self.branches) < 1:
            raise ConfigError(f"ngram, depth and branches must be at least 1: {self}")

    def start(self, model: Any) -> None:
        """Nothing to prepare: any model fits."""

    def propose(self, ids: Sequence[Tensor], hidden: Tensor | None) -> list[Draft]:
        return [self.lookup(row) for row in ids]

    def lookup(self, ids: Tensor) -> Draft:
        """The draft for one sequence, int64 `[n]`."""
        for size in range(min(self.ngram, ids.shape[0] - 1), 0, -1):
            windows = ids[:-1].unfold(0, size, 1)
            found = (windows == ids[-size:]).all(1).nonzero()[:, 0].flip(0)[: self.branches].tolist()
            if found:
                return merge([ids[i + size : i + size + self.depth].tolist() for i in found])
        return [], []
