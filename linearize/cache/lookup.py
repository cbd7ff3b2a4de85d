"""What an owner does with the cache it is called with.

A mechanism with a state of constant size puts that in the cache, in place of the empty layer it finds there
(`state_layer.py`). Others, and calls that need gradients, keep transformers' own layers: keys and values grow
(or are static), and the attention runs over all of them. Only one thing is needed beyond the tensors then:
the column at which the queries of this call start, which a static cache hides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..mechanisms.module import AttentionModule

if TYPE_CHECKING:
    pass

_MARK = "_linearize_filled"


def find_cache(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any | None:
    """The transformers cache among the arguments of a call, or None. Names differ by model, the type does
    not."""
    for value in (*args, *kwargs.values()):
        if is_cache(value):
            return value
    return None


def is_cache(value: Any) -> bool:
    # By shape rather than by import: a plain PyTorch user need not have transformers installed.
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def self_layer(cache: Any, index: int | None) -> Any | None:
    """The self-attention layer `index` of `cache`; None when it does not exist yet or cannot be told."""
    if cache is None or index is None:
        return None
    return _layer(decoder_part(cache), index)


def own_layer(cache: Any, index: int | None, module: AttentionModule | None) -> Any | None:
    """The layer that an owner of the attention `module` fills: the cross-attention layer of an
    encoder-decoder cache for cross-attention, else as `self_layer`."""
    if module is not None and module.spec.cross and index is not None:
        cache = getattr(cache, "cross_attention_cache", cache)
        return None if cache is None else _layer(cache, index)
    return self_layer(cache, index)


def _layer(cache: Any, index: int) -> Any | None:
    layers = getattr(cache, "layers", None)
    return layers[index] if layers is not None and index < len(layers) else None


def decoder_part(cache: Any) -> Any:
    """The part of an encoder-decoder cache that self-attention fills; any other cache is that part itself."""
    return getattr(cache, "self_attention_cache", cache)


def made_layer(cache: Any, index: int) -> Any | None:
    """Layer `index` of `cache`, made now if the cache makes its layers one by one; None if there is none."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    return _layer(cache, index)


def length_of(layer: Any) -> int | Tensor:
    """Tokens in a layer; a copy, as static layers count in place."""
    length = layer.get_seq_length()
    return length.clone() if isinstance(length, Tensor) else length


def start_of_queries(layer: Any | None, whole: bool = False) -> int | Tensor | None:
    """Column of the first query of this call, read before the layer is updated. None: the last columns.

    whole: every key is needed; raises InputError for a static cache that keeps a sliding window.
    """
    if layer is None or not getattr(layer, "is_compileable", False):
        return None
    if whole and getattr(layer, "is_sliding", False):
        raise InputError(
            "a rewritten layer needs all keys, but the static cache keeps only a sliding window; "
            "use a DynamicCache (cache_implementation=None)"
        )
    return length_of(layer)


def decoded_length(cache: Any | None, layer: Any | None) -> int | Tensor | None:
    """Tokens in the decoder's own layer of an encoder-decoder cache, None for any other cache."""
    if layer is None or not hasattr(cache, "cross_attention_cache"):
        return None
    return length_of(layer)


def check_not_foreign(layer: Any | None, path: str) -> None:
    """Raise InputError when the layer holds keys and values that a converted model did not put there."""
    if layer is None or getattr(layer, _MARK, False) or torch.compiler.is_compiling():
        return
    if not getattr(layer, "is_initialized", False):
        return
    length = layer.get_seq_length()
    if int(length) > 0:
        raise InputError(
            f"the cache given to {path or 'the model'} already holds {int(length)} keys and values that this "
            "converted model did not compute; start from an empty cache and run the prompt again"
        )


def mark_filled(layer: Any | None) -> None:
    """Remember on the cache layer itself that its contents come from a converted owner."""
    if layer is not None and not getattr(layer, _MARK, False):
        setattr(layer, _MARK, True)


def check_empty(inputs: Mapping[str, Any]) -> None:
    """Raise InputError when example inputs carry a cache that is not empty."""
    for name, value in inputs.items():
        if is_cache(value):
            length = value.get_seq_length()
            if int(length) > 0:
                raise InputError(
                    f"example input {name!r} is a cache that already holds {int(length)} keys and values; "
                    "give inputs without a cache, the model makes its own"
                )
        elif name in ("past_key_values", "past_key_value", "layer_past") and value:
            raise InputError(f"example input {name!r} holds keys and values; give inputs without it")
