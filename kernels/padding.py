"""Padding removed by rank: real tokens moved to the front, in order, and back again.

A real token's rank is the number of real tokens before it. Every causal form runs on ranks, so that padded
tokens take part in nothing wherever they are, and groups and taps count real tokens only.
"""

from __future__ import annotations

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .tensors import are_finite, may_ask, take_rows


class Ranks:
    """The two orders of the tokens under key_mask, bool [B, T], True for real tokens."""

    def __init__(self, key_mask: Tensor) -> None:
        self._real = key_mask
        self.count = key_mask.sum(1)  # [B]
        columns = (~key_mask).to(key_mask.device).argsort(dim=1, stable=True)  # rank -> column
        self._columns = columns
        self._ranks = (key_mask.cumsum(1) - 1).clamp_min(0)  # column -> rank
        self._front = columns.new_ones(columns.shape).cumsum(1) <= self.count[:, None]

    def to_front(self, x: Tensor) -> Tensor:
        """x [B, ..., T, D] by rank; rows past the last real token are zero, whatever they held."""
        return take_rows(x, self._columns).masked_fill_(~_rows(self._front, x), 0)

    def to_columns(self, x: Tensor) -> Tensor:
        """Inverse of `to_front`; rows of padded tokens are zero."""
        return take_rows(x, self._ranks).masked_fill_(~_rows(self._real, x), 0)


def without_padding(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor, cross: bool, always: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """query [B, H, T, D], key and value [B, Hkv, S, ...] with zeros in padding that could reach other tokens,
    or their gradients: 0 * NaN is NaN. always: also where asking what padding holds would mean waiting."""
    if are_finite(query, key, value) if may_ask(key) else not always:
        return query, key, value
    if not cross and statically_known_true(query.shape[2] == key.shape[2]):
        query = query.masked_fill(~_rows(key_mask, query), 0)
    return query, key.masked_fill(~_rows(key_mask, key), 0), value.masked_fill(~_rows(key_mask, value), 0)


def _rows(mask: Tensor, x: Tensor) -> Tensor:
    """mask [B, T] over x [B, ..., T, D]."""
    return mask.reshape(mask.shape[0], *(1,) * (x.dim() - 3), mask.shape[1], 1)
