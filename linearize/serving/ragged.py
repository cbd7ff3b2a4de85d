"""Tokens of many sequences in one flat batch, through an attention module whose states lie in slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.salient import Flat
from ..ops.state import States
from .slots import Layout, put, take


@dataclass(frozen=True)
class Batch:
    """Which tokens of a flat batch are whose.

    Attributes:
        flat: Of R rows, each of at least one token.
        fresh: int64 [n], slots of sequences that begin in this batch.
        singles: How many rows at the front have one token, which are the first tokens of the batch.
        tokens: Of all rows together.
    """

    flat: Flat
    fresh: Tensor
    singles: int
    tokens: int

    @classmethod
    def of(cls, slots: Tensor, bounds: Tensor, lengths: Tensor) -> Batch:
        """Of integers on the CPU.

        Args:
            slots: [R].
            bounds: [R + 1], where the tokens of each row begin, and their end.
            lengths: [R], tokens of each sequence with these.
        """
        slots, bounds, lengths = slots.long(), bounds.long(), lengths.long()
        count = bounds.diff()
        several = (count != 1).nonzero()
        singles = int(several[0]) if len(several) else len(count)
        flat = Flat(slots, bounds[:-1], count)
        return cls(flat, slots[lengths == count], singles, int(bounds[-1]))


@torch.no_grad()
def attend(
    module: Any, layout: Layout, states: States, query: Tensor, key: Tensor, value: Tensor, batch: Batch
) -> Tensor:
    """Attention of the tokens of a batch after the states in their slots, which are brought up to date.

    Args:
        module: An attention module with a state.
        layout: Of its states.
        states: Of all slots.
        query: [T, H, D].
        key: [T, Hkv, D].
        value: [T, Hkv, Dv].
        batch: The rows. Tokens behind the last row are left out.

    Returns:
        [T, H, Dv].
    """
    if len(batch.fresh):
        layout.clear(states, batch.fresh)
    tokens = query, key, value
    if batch.tokens < query.shape[0]:
        tokens = query[: batch.tokens], key[: batch.tokens], value[: batch.tokens]
    rows = batch.flat
    found = module.extend_flat(*tokens, states, rows)
    if found is not None:
        return found if len(found) == len(query) else F.pad(found, (0, 0, 0, 0, 0, len(query) - len(found)))
    out = value.new_zeros(query.shape[0], query.shape[1], value.shape[2])
    if batch.singles:
        slots = rows.slots[: batch.singles]
        some = take(states, slots)
        one = module.extend(*(x[: batch.singles, :, None] for x in tokens), some)
        put(states, slots, some)
        out[: batch.singles] = one[:, :, 0]
    for row in range(batch.singles, len(rows.slots)):
        slots, start = rows.slots[row : row + 1], int(rows.first[row])
        end = start + int(rows.count[row])
        some = take(states, slots)
        several = module.extend(*(x[start:end].transpose(0, 1)[None] for x in tokens), some)
        put(states, slots, some)
        out[start:end] = several[0].transpose(0, 1)
    return out
