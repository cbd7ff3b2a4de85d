"""Layers of a cross-attention cache that keep a `Summary` of the encoder's keys and values beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from ..mechanisms.module import AttentionModule
from ..mechanisms.summary import Summary


class CrossLayer(CacheLayerMixin):
    """A layer with the summary of one attention module, made when first asked for.

    like: the layer whose keys and values it takes over. Whatever gives the layer other keys makes it forget
    the summary; what moves its rows moves those of the summary as well.
    """

    def __init__(self, like: CacheLayerMixin) -> None:
        self.__dict__.update(like.__dict__)
        self._summary: Summary | None = None
        self._summarized: Tensor | None = None  # the keys that the summary is of

    def summary(self, module: AttentionModule, key_mask: Tensor | None) -> Summary:
        """What `module` keeps of these keys and values; key_mask: bool `[B, S]`, None when all are real."""
        known = self._known()
        if known is None or not known.is_for(key_mask):
            assert self.keys is not None and self.values is not None
            self._summary = known = module.summarize(self.keys, self.values, key_mask)
            self._summarized = self.keys
        return known

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._forget()
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        self._forget()
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        known = self._known()
        super().reorder_cache(beam_idx)
        self._keep(known, lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        known = self._known()
        super().batch_repeat_interleave(repeats)
        self._keep(known, lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        known = self._known()
        super().batch_select_indices(indices)
        self._keep(known, lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        known = self._known()
        super().offload()
        self._keep(known, lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        known = self._known()
        super().prefetch()
        self._keep(known, lambda x: x.to(self.device, non_blocking=True))

    def _known(self) -> Summary | None:
        """The summary, unless it is of other keys than the present ones."""
        return self._summary if self._summarized is self.keys else None

    def _keep(self, summary: Summary | None, function: Callable[[Tensor], Tensor]) -> None:
        if summary is not None:
            self._summary, self._summarized = summary.map(function), self.keys

    def _forget(self) -> None:
        self._summary = self._summarized = None


class DynamicCrossLayer(CrossLayer, DynamicLayer):
    """Of a dynamic cache."""


class StaticCrossLayer(CrossLayer, StaticLayer):
    """Of a static cache."""
