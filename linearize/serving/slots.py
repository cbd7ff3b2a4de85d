"""The states of all sequences of a layer in an engine's memory: one row of bytes for each slot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mechanisms.module import AttentionModule
from ..ops.state import States

_ALIGNMENT = 64
"""Bytes: where each tensor begins in a row, and what the length of a row is a multiple of."""


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one sequence's state lie in a row.

    Attributes:
        empty: The state of one sequence without tokens.
        starts: The first byte of each of its tensors, in the order of `States.tensors`.
        nbytes: Of a row.
    """

    empty: States
    starts: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, module: AttentionModule, dtype: torch.dtype, device: torch.device) -> Layout:
        """Of a module that has a state.

        Args:
            module: With parameters on `device`.
            dtype: Of the query, key and value that will come.
            device: Where they will be.
        """
        with torch.no_grad():
            empty = module.new_state(1, dtype=dtype, device=device)
        assert empty is not None
        starts, end = list[int](), 0
        for tensor in empty.tensors():
            starts.append(end)
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        return cls(empty, tuple(starts), end)

    def over(self, memory: Tensor) -> States:
        """The states of all slots, in place.

        Args:
            memory: Bytes [slots, at least `nbytes`], columns adjacent, rows aligned to 8.
        """
        starts = iter(self.starts)

        def view(one: Tensor) -> Tensor:
            start, count = next(starts), math.prod(one.shape[1:])
            row = memory[:, start : start + count * one.element_size()].view(one.dtype)
            return row.unflatten(1, one.shape[1:]) if one.dim() > 1 else row[:, 0]

        return self.empty.map(view)

    def clear(self, states: States, rows: Tensor) -> None:
        """Make those slots states of no tokens; rows: int64 [n]."""
        for whole, one in zip(states.tensors(), self.empty.tensors(), strict=True):
            whole.index_copy_(0, rows, one.expand(len(rows), *one.shape[1:]))


def take(states: States, rows: Tensor) -> States:
    """A copy of the states in some slots, a batch of as many sequences; rows: int64 [n]."""
    return states.map(lambda whole: whole.index_select(0, rows))


def put(states: States, rows: Tensor, batch: States) -> None:
    """Write back what `take` copied."""
    for whole, part in zip(states.tensors(), batch.tensors(), strict=True):
        whole.index_copy_(0, rows, part)
