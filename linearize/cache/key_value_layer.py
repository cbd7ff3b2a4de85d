"""Draft trees on a cache layer of keys and values: models that kept their softmax, or some layers that did.

The layer does what `state_layer.StateLayer` does for a state: while `tree` is set, new keys and values are
shown to the attention and not kept, and `accept` keeps the rows of one path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..errors import InputError


class KeyValueLayer(DynamicLayer):
    """A `DynamicLayer` that can hold a draft tree. like: the layer whose keys and values it takes over."""

    def __init__(self, like: DynamicLayer) -> None:
        super().__init__()
        self.__dict__.update(like.__dict__)
        self.tree: Any = None
        self._drafted: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.tree is None:
            return super().update(key_states, value_states, *args, **kwargs)
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self._drafted = keys, values
        return keys, values

    def accept(self, path: Tensor) -> None:
        """Keep the nodes `path` `[B, P]` of the last tree; -1 makes a column that masks must leave out."""
        if self._drafted is None:
            raise InputError("no draft tree was run on this cache since the last accepted one")
        length, count = self.get_seq_length(), path.shape[1]
        index = path.to(self._drafted[0].device).clamp_min(0)[:, None, :, None] + length
        kept = []
        for whole in self._drafted:
            rows = whole.gather(2, index.expand(-1, whole.shape[1], -1, whole.shape[3]))
            # The rows after `length` are the draft's own: nothing else looks at them.
            whole[:, :, length : length + count] = rows
            kept.append(whole[:, :, : length + count])
        self.keys, self.values = kept
        self._drafted = None


def tree_mask(columns: Tensor, ancestors: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask `[B, 1, N, L + N]`: a node sees the real columns `[B, L]`, its ancestors and itself.

    ancestors: bool `[B, N, N]`, ancestors-or-self. Float because every attention implementation adds it.
    """
    nodes = ancestors.shape[1]
    past = columns.bool()[:, None].expand(-1, nodes, -1)
    seen = torch.cat([past, ancestors.to(past.device)], 2)[:, None]
    hidden = torch.tensor(torch.finfo(dtype).min, dtype=dtype, device=seen.device)
    return torch.where(seen, torch.zeros((), dtype=dtype, device=seen.device), hidden)
