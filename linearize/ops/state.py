"""The constant-size state of causal attention: made once, changed in place, the same size at any length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import salient, window_recurrent
from ..kernels.recurrent import State


def check_sizes(
    batch: int, kv_heads: int, head_dim: int, value_dim: int, group_size: int = 1, *at_least_none: int
) -> None:
    """Raise InputError for sizes of a state that are not positive, or for others that are negative."""
    if min(batch, kv_heads, head_dim, value_dim, group_size) < 1 or min(at_least_none, default=0) < 0:
        raise InputError("a state needs positive sizes, and taps and max_rewind of at least 0")


class Part(ABC):
    """The state of one term of an attention module: dataclasses that say what its tensors are.

    Attributes:
        tensors: A named tuple, changed in place; `length` is one of it.
        max_rewind: Tokens that can be taken back at any time, counted from the furthest that was reached.
    """

    tensors: Any
    max_rewind: int

    @property
    @abstractmethod
    def settings(self) -> tuple[int, ...]:
        """What two states must agree in besides shapes, dtypes and devices to stand for each other."""

    @abstractmethod
    def first_kept(self) -> Tensor:
        """The least length that each row can be taken back to, int64 `[B]`."""

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
        return [*((x.shape[1:], x.dtype, x.device) for x in self.tensors), *self.settings]

    def check_rewind(self, count: int | Tensor) -> None:
        """Raise InputError when a row has fewer than `count` tokens or no longer holds them."""
        target = self.length - count
        lost = (target < self.first_kept()) & (target != self.length)
        if bool(lost.any()) or bool(((target < 0) | (target > self.length)).any()):
            raise InputError(
                f"cannot take back {count} tokens of {self.length.tolist()}: this state was made with "
                f"max_rewind={self.max_rewind}"
            )

    def rewind(self, count: int | Tensor) -> None:
        """Take back the last `count` tokens (one number, or int `[B]`), exactly and without replay.

        Raises InputError, changing nothing, when a row has fewer tokens or no longer holds them.
        """
        self.check_rewind(count)
        self.length.sub_(count)

    def clear(self) -> None:
        """Make the state one of no tokens, in place."""
        for tensor in self.tensors:
            tensor.zero_()

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A new state of `function` of every tensor."""
        state: Any = self  # a dataclass, which a base class cannot say
        return replace(state, tensors=type(self.tensors)(*map(function, self.tensors)))

    def clone(self) -> Self:
        """A copy that shares no tensor."""
        return self.map(Tensor.clone)

    def select(self, rows: Tensor) -> Self:
        """A new state of the given rows of the batch, in that order, repeated or left out (beam search)."""
        return self.map(lambda x: x.index_select(0, rows))


@dataclass(frozen=True)
class AttentionState(Part):
    """What `ops.augmented_extend` carries from call to call; `kernels/recurrent.py` describes the tensors.

    group_size, taps: of the operator it belongs to; `taps` is how far back a token reads the window's rows.
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
        check_sizes(batch, num_key_value_heads, head_dim, value_dim, group_size, taps, max_rewind)
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
    def settings(self) -> tuple[int, ...]:
        return self.group_size, self.taps

    def first_kept(self) -> Tensor:
        folded = self.tensors.folded
        return torch.where(folded > 0, folded + max(self.taps - 1, 0), 0)


@dataclass(frozen=True)
class WindowState(AttentionState):
    """A window, the first tokens and sums of all others: the tensors of `kernels/window_recurrent.py`."""

    tensors: Any

    @classmethod
    def of_window(
        cls,
        batch: int,
        num_key_value_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        window: int,
        sinks: int,
        features: int,
        max_rewind: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> WindowState:
        """An empty state. features: of a key in the sums; 0 where there are none."""
        sizes = batch, num_key_value_heads, head_dim, value_dim
        options: dict[str, Any] = dict(dtype=dtype, device=device)
        whole = AttentionState.new(*sizes, group_size=1, taps=window, max_rewind=max_rewind, **options)
        recurrent, key_window, value_window, length, folded = whole.tensors
        heads = (batch, num_key_value_heads)
        tensors = window_recurrent.State(
            recurrent.new_zeros(*heads, features, value_dim + 1),
            key_window,
            value_window,
            length,
            folded,
            torch.zeros(*heads, sinks, head_dim, **options),
            torch.zeros(*heads, sinks, value_dim, **options),
        )
        return cls(tensors, 1, window, max_rewind)


class Ready:
    """A call laid out for the tensors of one state. Copies of the state, which has others, start without.

    weights: likewise what is known of the weights that come with flat batches.
    """

    def __init__(self) -> None:
        self.call: Any = None
        self.weights: Any = None

    def __reduce__(self) -> tuple[type[Ready], tuple[()]]:
        return Ready, ()


@dataclass(frozen=True)
class SalientState(Part):
    """A constant number of exact tokens; `kernels/salient.py` describes the tensors.

    sizes: how many tokens are seen exactly. ready: what takes the next token without looking at all again.
    """

    tensors: salient.State
    sizes: salient.Sizes
    max_rewind: int
    ready: Ready = field(default_factory=Ready, init=False, repr=False, compare=False)

    @property
    def settings(self) -> tuple[int, ...]:
        return tuple(self.sizes)

    def first_kept(self) -> Tensor:
        return self.tensors.block * salient.BLOCK

    def clear(self) -> None:
        super().clear()
        salient.forget(self.tensors, self.sizes)


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
        return [x for part in self.parts for x in part.tensors]

    def clear(self) -> None:
        """As `Part.clear`, for all parts."""
        for part in self.parts:
            part.clear()

    def rewind(self, count: int | Tensor) -> None:
        """As `Part.rewind`, for all parts or none."""
        for part in self.parts:
            part.check_rewind(count)
        for part in self.parts:
            part.length.sub_(count)

    def map(self, function: Callable[[Tensor], Tensor]) -> States:
        """A new state of `function` of every tensor: a copy, another device, other rows of the batch."""
        return States(tuple(part.map(function) for part in self.parts))
