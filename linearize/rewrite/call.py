"""What one call of a rewritten owner knows. It travels with the call and ends with it.

Nothing of a call is kept on a module, so that one model serves several threads, calls itself again from a
hook, and is as it was after an exception.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ..cache import lookup as caches
from ..cache.consistency import check_level
from ..errors import InvalidModelError
from ..planning.plan import child_name

if TYPE_CHECKING:
    from ..cache.cross_layer import CrossLayer
    from ..cache.state_layer import StateLayer
    from ..mechanisms.module import AttentionModule
    from ..mechanisms.spec import SiteSpec
    from .owner import OwnerRecord


class Call:
    """One call of an owner.

    Attributes:
        owner: the live module.
        record: what the plan says of it.
        cache: the transformers cache of the call, or None.
        state: the constant-size state that the attention reads and extends; None where it goes by keys and
            values.
        layer_index: of the layer of the cache that the call fills; None where it cannot be told.
        cross: the cross-attention layer that keeps a summary of the encoder's keys and values, or None.
        start: column of the first query among the keys; None for the last columns.
        decoded: tokens in the decoder's own layer of an encoder-decoder cache, this call's included once that
            layer ran; None for any other cache.
    """

    def __init__(
        self,
        owner: nn.Module,
        cache: Any | None = None,
        state: StateLayer | None = None,
        cross: CrossLayer | None = None,
        whole: bool = False,
        layer_index: int | None = None,
    ) -> None:
        """whole: every key is needed, see `caches.start_of_queries`. layer_index: None for the record's."""
        self.owner, live = owner, cast(Any, owner)
        self.record: OwnerRecord = live._linearize_owner
        self.cache, self.state, self.cross = cache, state, cross
        self.layer_index = self.record.layer_index if layer_index is None else layer_index
        layer = caches.self_layer(cache, self.layer_index)
        self.start: int | Tensor | None
        self.start = caches.start_of_queries(layer, whole) if state is None else caches.length_of(state)
        self.decoded = caches.decoded_length(cache, layer)
        self._next_slot = 0

    def next_slot(self) -> int:
        """Which of the owner's sites runs now; each time it is asked, the next one."""
        slot, self._next_slot = self._next_slot, self._next_slot + 1
        if slot >= len(self.record.sites):
            raise InvalidModelError(
                f"{self.record.name} runs attention {slot + 1} times in one call; its plan has "
                f"{len(self.record.sites)} sites"
            )
        return slot

    def child(self, slot: int) -> AttentionModule:
        """The attention module of the owner's `slot`-th site, as it is now."""
        return getattr(self.owner, child_name(slot))

    def query_start(self, spec: SiteSpec, queries: int) -> int | Tensor | None:
        """Where the `queries` queries of a site start.

        Returns:
            For causal sites the column of the first query, None for the last columns; for cross-attention the
            position of the first query in its own sequence, None for 0; None for other sites.
        """
        if spec.cross and self.decoded is not None:
            # The decoder's own attention of this layer ran before and already counted this call's tokens.
            return self.decoded - queries
        return self.start if spec.causal or spec.cross else None

    def notice(self, slot: int, window: int | None = None) -> None:
        """Tell the record's witness, if any, that a site runs; window: the one that the owner asked for."""
        if self.record.witness is not None:
            self.record.witness(slot, window)

    @property
    def is_first(self) -> bool:
        """The owner's layer is the first of those that are called with the same masks and caches."""
        layers = self.record.layers
        return not layers or self.record.layer_index == layers[0]

    def check_cache(self, spec: SiteSpec, count: int) -> None:
        """Raise InputError when an earlier call on this cache ended midway; count: new tokens here."""
        if self.cache is not None and spec.causal:
            check_level(self.cache, self.layer_index, self.record.layers, count)

    def failed(self) -> None:
        """The call ended with an exception."""
        if self.state is not None:
            self.state.call_failed()

    def ended(self, layer: Any) -> None:
        """The call ended; layer: the one of the cache that it filled."""
        if self.cache is not None:
            caches.mark_filled(layer)


def attention_children(owner: nn.Module) -> list[Any]:
    """The owner's attention modules, told by what they have: PEFT wraps those it trains with an adapter."""
    return [child for child in owner.children() if hasattr(child, "has_state")]


def sole_child(owner: nn.Module) -> Any | None:
    """The owner's one attention module; None when it has several, which would share a cache layer."""
    children = attention_children(owner)
    return children[0] if len(children) == 1 else None
