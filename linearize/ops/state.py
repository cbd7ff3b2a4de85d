"""The constant-size state of causal attention: made once, changed in place, the same size at any length."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import salient
from ..kernels.recurrent import State


class Part(Protocol):
    """The state of one term of an attention module."""

    @property
    def length(self) -> Tensor:
        """Tokens so far, int64 `[B]`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the state, whatever its length."""

    @property
    def form(self) -> list[Any]:
        """What two states have in common that can stand for each other."""

    def all_tensors(self) -> list[Tensor]:
        """What is changed in place."""

    def check_rewind(self, count: int | Tensor) -> None:
        """Raise InputError when a row has fewer than `count` tokens or no longer holds them."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A new state of `function` of every tensor."""


@dataclass(frozen=True)
class AttentionState:
    """What `ops.augmented_extend` carries from call to call; `kernels/recurrent.py` describes the tensors.

    group_size, taps: of the operator it belongs to; `taps` is how far back a token reads the window's rows.
    max_rewind: tokens that can be taken back at any time, counted from the furthest that was reached.
    """

    tensors: State
    group_size: int
    taps: int
    max_rewind: int

    @classmethod
    def new(
        cls,
        batch: int,
        num_key_value_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        group_size: int = 64,
        taps: int = 0,
        max_rewind: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> AttentionState:
        """An empty state. taps: length of `conv_weight`, 0 without. dtype: of the window, not of the sums.

        Raises InputError for sizes that are not positive.
        """
        value_dim = head_dim if value_dim is None else value_dim
        if min(batch, num_key_value_heads, head_dim, value_dim, group_size) < 1 or min(taps, max_rewind) < 0:
            raise InputError("a state needs positive sizes, and taps and max_rewind of at least 0")
        # A rewind must find the open group and the convolution's reach still in the window.
        rows = max_rewind + group_size + taps - 2 if max_rewind else max(group_size, taps)
        rows = -(-rows // group_size) * group_size
        heads = (batch, num_key_value_heads)
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = State(
            recurrent=torch.zeros(*heads, head_dim, value_dim, dtype=sums, device=device),
            key_window=torch.zeros(*heads, rows, head_dim, dtype=dtype, device=device),
            value_window=torch.zeros(*heads, rows, value_dim, dtype=dtype, device=device),
            length=torch.zeros(batch, dtype=torch.int64, device=device),
            folded=torch.zeros(batch, dtype=torch.int64, device=device),
        )
        return cls(tensors, group_size, taps, max_rewind)

    @property
    def recurrent(self) -> Tensor:
        return self.tensors.recurrent

    @property
    def length(self) -> Tensor:
        """Tokens so far, int64 `[B]`."""
        return self.tensors.length

    @property
    def nbytes(self) -> int:
        """Bytes of the state, whatever its length."""
        return sum(x.numel() * x.element_size() for x in self.tensors)

    @property
    def form(self) -> list[Any]:
        """What two states have in common that can stand for each other."""
        return [*_layout(self.tensors), self.group_size, self.taps]

    def all_tensors(self) -> list[Tensor]:
        """The five tensors."""
        return list(self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> AttentionState:
        """A new state of `function` of every tensor."""
        return replace(self, tensors=State(*map(function, self.tensors)))

    def check_rewind(self, count: int | Tensor) -> None:
        """Raise InputError when a row has fewer than `count` tokens or no longer holds them."""
        length, folded = self.tensors.length, self.tensors.folded
        target = length - count
        kept = torch.where(folded > 0, folded + max(self.taps - 1, 0), 0)
        if bool(((target < kept) & (target != length)).any()) or bool((target > length).any()):
            raise InputError(
                f"cannot take back {count} tokens of {length.tolist()}: this state was made with "
                f"max_rewind={self.max_rewind}"
            )

    def rewind(self, count: int | Tensor) -> None:
        """Take back the last `count` tokens (one number, or int `[B]`), exactly and without replay.

        Raises InputError, changing nothing, when a row has fewer tokens or no longer holds them.
        """
        self.check_rewind(count)
        self.tensors.length.sub_(count)

    def clone(self) -> AttentionState:
        return replace(self, tensors=State(*(x.clone() for x in self.tensors)))

    def select(self, rows: Tensor) -> AttentionState:
        """A new state of the given rows of the batch, in that order, repeated or left out (beam search)."""
        return replace(self, tensors=State(*(x.index_select(0, rows) for x in self.tensors)))


@dataclass(frozen=True)
class SalientState:
    """A constant number of exact tokens; `kernels/salient.py` describes the tensors.

    Attributes:
        tensors: Changed in place.
        sizes: How many tokens are seen exactly.
        max_rewind: Tokens that can be taken back at any time, counted from the furthest that was reached.
    """

    tensors: salient.State
    sizes: salient.Sizes
    max_rewind: int

    @property
    def length(self) -> Tensor:
        """Tokens so far, int64 `[B]`."""
        return self.tensors.length

    @property
    def nbytes(self) -> int:
        """Bytes of the state, whatever its length."""
        return sum(x.numel() * x.element_size() for x in self.tensors)

    @property
    def form(self) -> list[Any]:
        """What two states have in common that can stand for each other."""
        return [*_layout(self.tensors), *self.sizes]

    def all_tensors(self) -> list[Tensor]:
        """The six tensors."""
        return list(self.tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> SalientState:
        """A new state of `function` of every tensor."""
        return replace(self, tensors=salient.State(*map(function, self.tensors)))

    def check_rewind(self, count: int | Tensor) -> None:
        """Raise InputError when a row has fewer than `count` tokens or its selection has gone on since."""
        length = self.tensors.length
        target = length - count
        lost = (target < self.tensors.block * salient.BLOCK) & (target != length)
        if bool(lost.any()) or bool(((target < 0) | (target > length)).any()):
            raise InputError(
                f"cannot take back {count} tokens of {length.tolist()}: this state was made with "
                f"max_rewind={self.max_rewind}"
            )


@dataclass(frozen=True)
class States:
    """The state of one attention module: a part for each term of its sum that has a past."""

    parts: tuple[Part, ...]

    @property
    def length(self) -> Tensor:
        """Tokens so far, int64 `[B]`."""
        return self.parts[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of the state, whatever its length."""
        return sum(part.nbytes for part in self.parts)

    @property
    def batch_size(self) -> int:
        return self.length.shape[0]

    @property
    def form(self) -> list[Any]:
        """What two states have in common that can stand for each other."""
        return [part.form for part in self.parts]

    def tensors(self) -> list[Tensor]:
        return [x for part in self.parts for x in part.all_tensors()]

    def rewind(self, count: int | Tensor) -> None:
        """As `AttentionState.rewind`, for all parts or none."""
        for part in self.parts:
            part.check_rewind(count)
        for part in self.parts:
            part.length.sub_(count)

    def map(self, function: Callable[[Tensor], Tensor]) -> States:
        """A new state of `function` of every tensor: a copy, another device, other rows of the batch."""
        return States(tuple(part.map(function) for part in self.parts))


def _layout(tensors: Iterable[Tensor]) -> list[Any]:
    """Shape of a row of the batch, dtype and device of each."""
    return [(x.shape[1:], x.dtype, x.device) for x in tensors]
