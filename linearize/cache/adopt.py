from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ..mechanisms.module import AttentionModule
from .lookup import decoder_part, self_layer

if TYPE_CHECKING:
    from .cross_layer import CrossLayer
    from .state_layer import StateLayer


def state_layer(
    cache: Any, index: int | None, module: AttentionModule | None, max_length: int | None = None
) -> StateLayer | None:
    """The constant-size state that `module` uses in this call; None when it goes by keys and values.

    States carry no gradients: a call that builds an autograd graph attends keys and values. max_length: see
    `state_layer.adopt`. Raises InputError when such a call comes after others that left a state.
    """
    if cache is None or index is None or module is None:
        return None
    from .state_layer import StateLayer, adopt

    if not torch.is_grad_enabled():
        return adopt(decoder_part(cache), index, module, max_length)
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
    from .cross_layer import adopt

    return adopt(cache, index)


def give_up_state(cache: Any, index: int) -> None:
    """Put back the layer whose place an empty state took."""
    layers = decoder_part(cache).layers
    layers[index] = layers[index].instead_of
