"""The state as a layer of a cache whose layers also hold what is no attention (Falcon-H1, Zamba, Zaya).

Such a layer runs attention and a state-space or convolution part side by side, and transformers keeps both in
one cache layer. The attention's keys and values become our state; the other part goes on as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from ..errors import InputError
from ..mechanisms.module import AttentionModule
from .state_layer import StateLayer


class MixedStateLayer(StateLayer, LinearAttentionAndFullAttentionLayer):
    """A `StateLayer` that takes over the convolution and recurrent states of the layer `like`.

    transformers tells layers apart by their class: one that holds both kinds is the second base's.
    """

    takes_trees = False
    """The other part keeps one sequence and cannot branch."""

    def __init__(self, module: AttentionModule, like: Any, max_length: int | None = None) -> None:
        take_over_states(self, like)
        super().__init__(module, like, max_length)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of the attention with keys and values by position, of the other part with its states by name."""
        if args:
            StateLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    # A class attribute of the state's layer, a property of the other part's: this layer is both.
    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether all of the layer can be rewound: a recurrent state cannot."""
        return bool(LinearAttentionLayer.is_croppable.fget(self))

    def crop(self, tokens_to_remove: int) -> None:
        """As `StateLayer.crop`, with the convolution states. Raises InputError beside a recurrent state."""
        if tokens_to_remove and not (self.is_croppable and self.record_past):
            raise InputError(
                "tokens cannot be taken back from this cache: its layers also hold recurrent states, or "
                "convolution states that were not recorded (`activate_past_recording`)"
            )
        StateLayer.crop(self, tokens_to_remove)
        if self.record_past and any(self.is_conv_states_initialized.values()):
            LinearAttentionLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        StateLayer.reset(self)

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(x.nbytes for held in self._held() for x in held.values() if x is not None)

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        super()._map(function)
        for held in self._held():
            for name, tensor in held.items():
                held[name] = None if tensor is None else function(tensor)

    def _held(self) -> tuple[dict[int, Tensor | None], ...]:
        return self.conv_states, self.recurrent_states


def take_over_states(layer: Any, like: Any) -> None:
    """Give `layer` the convolution and recurrent states of `like`: the same objects, with all attributes."""
    theirs = vars(LinearAttentionLayer())
    layer.__dict__.update({name: getattr(like, name) for name in theirs})


def holds_more(layer: Any) -> bool:
    """Whether a cache layer holds convolution or recurrent states."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)
