"""What cross-attention keeps of an encoder's output, so that a step of decoding does not read all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.tensors import unit, widen


@dataclass(frozen=True)
class Summary:
    """Sums over one encoder output, and which of its tokens are real.

    sums: as the mechanism made them, [B, ...]; for a core call the sum of k^T v over all keys,
    [B, Hkv, D, Dv] in float32 or wider, None without a grouped part. near: queries also read the key groups
    that they meet. key_mask: bool [B, S]; order: int64 [B, S], the column of each rank, real tokens first;
    both None when every token is real.
    """

    sums: tuple[Tensor | None, ...]
    near: bool
    key_mask: Tensor | None
    order: Tensor | None

    @classmethod
    def of(cls, sums: tuple[Tensor | None, ...], near: bool, key_mask: Tensor | None) -> Summary:
        order = None if key_mask is None else torch.argsort(~key_mask, dim=1, stable=True)
        return cls(sums, near, key_mask, order)

    def map(self, function: Callable[[Tensor], Tensor]) -> Summary:
        """A new summary of `function` of every tensor: a copy, another device, other rows of the batch."""

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else function(x)

        return Summary(tuple(of(x) for x in self.sums), self.near, of(self.key_mask), of(self.order))

    def is_for(self, key_mask: Tensor | None) -> bool:
        """Whether it was made with this mask. (Compiled code takes it as given: it cannot look.)"""
        if self.key_mask is None or key_mask is None:
            return self.key_mask is key_mask
        return torch.compiler.is_compiling() or torch.equal(self.key_mask, key_mask)


@dataclass(frozen=True)
class Block:
    """The key groups that meet a call's queries: key [B, Hkv, N, D], value [B, Hkv, N, Dv], real bool [B, N].

    query_start: place of the first query, counted from the block's first rank.
    """

    key: Tensor
    value: Tensor
    real: Tensor
    query_start: int | Tensor


def block_of(
    key: Tensor, value: Tensor, summary: Summary, queries: int, start: int | Tensor, group_size: int
) -> Block:
    """The groups of `queries` queries from position `start`, none if the summary needs none."""
    first = start // group_size * group_size
    aligned = queries == 1 or (isinstance(start, int) and start == 0)
    # Unless it starts with a group, a call can reach into one group more than it fills.
    span = -(-(queries if aligned else queries + group_size - 1) // group_size) * group_size
    span = span if summary.near else 0
    batch, keys = key.shape[0], key.shape[2]
    rank = torch.arange(span, device=key.device) + first
    columns = rank.clamp(max=keys - 1)
    if summary.order is None or summary.key_mask is None:
        real = (rank < keys).expand(batch, -1)
        return Block(key.index_select(2, columns), value.index_select(2, columns), real, start - first)
    columns = summary.order.index_select(1, columns)[:, None, :, None]
    real = rank < summary.key_mask.sum(1, keepdim=True)
    key, value = (x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
    return Block(key, value, real, start - first)


def summed(key: Tensor, value: Tensor, key_mask: Tensor | None, normalize: bool) -> Tensor:
    """Sum of k^T v over the real tokens: key [B, Hkv, S, D], value [B, Hkv, S, Dv] -> [B, Hkv, D, Dv]."""
    key, value = (widen(x) for x in (key, value))
    key = unit(key) if normalize else key
    if key_mask is not None:  # whatever padding holds, NaN included
        hidden = ~key_mask[:, None, :, None]
        key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    return key.mT @ value
