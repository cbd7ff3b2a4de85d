"""Putting our layers into transformers' caches, in the places of layers that hold nothing yet."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    StaticLayer,
)

from ..errors import InputError
from ..mechanisms.module import AttentionModule
from .cross_layer import CrossLayer, DynamicCrossLayer, StaticCrossLayer
from .lookup import decoder_part, made_layer, self_layer
from .mixed_layer import MixedStateLayer, holds_more, take_over_states
from .state_layer import StateLayer

_CROSS_LAYERS: dict[type, type[CrossLayer]] = {
    DynamicLayer: DynamicCrossLayer,
    StaticLayer: StaticCrossLayer,
}


def state_layer(
    cache: Any, index: int | None, module: AttentionModule | None, max_length: int | None = None
) -> StateLayer | None:
    """The constant-size state that `module` uses in this call; None when it goes by keys and values.

    States carry no gradients: a call that builds an autograd graph attends keys and values. max_length: see
    `_adopt_state`. Raises InputError when such a call comes after others that left a state.
    """
    if cache is None or index is None or module is None:
        return None
    if not torch.is_grad_enabled():
        return _adopt_state(decoder_part(cache), index, module, max_length)
    layer = self_layer(cache, index)
    if isinstance(layer, StateLayer):
        if layer.is_initialized and int(layer.get_seq_length()) > 0:
            raise InputError(
                "the cache holds a state, which carries no gradients; continue under torch.no_grad(), or "
                "give the whole text without a cache"
            )
        give_up_state(cache, index)
    return None


def cross_layer(cache: Any, index: int | None, module: AttentionModule | None) -> CrossLayer | None:
    """The layer of the encoder's keys and values that keeps their summary for `module`; None where none is.

    Calls that need gradients go by the kernels that have them, and an exported graph keeps nothing of its own
    from call to call.
    """
    if index is None or module is None or not module.has_summary:
        return None
    cache = getattr(cache, "cross_attention_cache", None)
    if cache is None or torch.is_grad_enabled() or torch.compiler.is_exporting():
        return None
    return _adopt_cross(cache, index)


def keep_everything(cache: Any, index: int | None) -> None:
    """Replace the layer by one that forgets nothing, where it is still empty and keeps a sliding window only.

    A site whose window was dropped reads every key; a dynamic cache made for the original would lose them.
    """
    layer = self_layer(cache, index)
    if layer is None or not getattr(layer, "is_sliding", False) or layer.is_compileable:
        return
    if int(layer.get_seq_length()) > 0:
        return
    whole = LinearAttentionAndFullAttentionLayer() if holds_more(layer) else DynamicLayer()
    if holds_more(layer):
        take_over_states(whole, layer)
    decoder_part(cache).layers[index] = whole


def give_up_state(cache: Any, index: int) -> None:
    """Put back the layer whose place an empty state took."""
    layers = decoder_part(cache).layers
    layers[index] = layers[index].instead_of


def _adopt_state(
    cache: Any, index: int, module: AttentionModule, max_length: int | None = None
) -> StateLayer | None:
    """The state layer of `module` in `cache`, put there now if the layer is empty; None where it is not.

    cache: the decoder's own part of an encoder-decoder cache, or any other cache. A layer with keys and
    values in it stays, and its tokens are attended as before. max_length: of a static cache, whose layers do
    not tell when each of them keeps a window only. Raises InputError when the state is another module's.
    """
    if not module.has_state:
        return None
    layer = made_layer(cache, index)
    if layer is None:
        return None
    if isinstance(layer, StateLayer):
        layer.claim(module)
        return layer
    kind = _kind_of(layer.__class__)
    if kind is None or (getattr(layer, "is_initialized", False) and int(layer.get_seq_length()) > 0):
        return None
    longest = None
    if getattr(layer, "is_compileable", False) and getattr(layer, "is_sliding", False):
        # Masks as wide as the window would have no column for new tokens. (A state where the model has a
        # window means that every layer becomes one: `convert.pipeline.check_dropped_windows`.)
        whole = [x.get_max_length() for x in cache.layers if not getattr(x, "is_sliding", False)]
        longest = max(whole, default=max_length)
        if longest is None:
            return None
    cache.layers[index] = made = kind(module, layer, longest)
    return made


@functools.cache
def _kind_of(layer: Any) -> type[StateLayer] | None:
    """The kind of state layer that can do all that a layer of a cache does; None where none can.

    Layers of other kinds hold more than keys and values, such as the keys of an indexer: they stay.
    """
    if not issubclass(layer, CacheLayerMixin):
        return None
    kinds = (StateLayer, MixedStateLayer)
    return next((kind for kind in kinds if _abilities(layer) <= _abilities(kind)), None)


def _abilities(layer: type) -> set[str]:
    return {name for name in dir(layer) if not name.startswith("_")}


def _adopt_cross(cache: Any, index: int) -> CrossLayer | None:
    """Layer `index` of a cross-attention cache, made one that keeps a summary; None for other kinds of layer,
    such as quantized ones."""
    layer = made_layer(cache, index)
    if isinstance(layer, CrossLayer):
        return layer
    kind = _CROSS_LAYERS.get(type(layer))
    if kind is None:
        return None
    cache.layers[index] = made = kind(layer)
    return made
