"""Noticing that an earlier call on a cache ended midway: some of its layers then hold more than others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .lookup import decoder_part
from .state_layer import StateLayer


def check_level(cache: Any, index: int | None, layers: Sequence[int], count: int) -> None:
    """Compare the lengths of all layers, when the first converted one has just counted its new tokens.

    Layers that run earlier in the model have counted them as well, later ones have not. Skipped in compiled
    code, which a Python exception does not leave between two layers, and for draft trees, which are not
    counted.

    Args:
        cache: of the call; of an encoder-decoder cache the decoder's own part is looked at.
        index: the layer whose attention runs now; only the first of `layers` compares.
        layers: converted layers of the same decoder, in order.
        count: new tokens of this call.

    Raises:
        InputError: layers disagree, or one was moved to another device in part.
    """
    if not layers or index != layers[0] or torch.compiler.is_compiling():
        return
    cache = decoder_part(cache)
    present: Sequence[Any] = getattr(cache, "layers", ())
    if index >= len(present) or getattr(present[index], "tree", None) is not None:
        return
    for place, layer in enumerate(present):
        _check_place(place, layer)
    now = int(present[index].get_seq_length())
    # A cache that makes its layers one by one has none yet for what never ran.
    complete = getattr(cache, "layer_class_to_replicate", None) is None
    for other in range(index + 1, max(len(present), layers[-1] + 1)):
        ours = other in layers
        if other >= len(present):
            found = None if complete else 0
        else:
            # Of a cache that has all its layers, one for keys and values that is empty has missed a call.
            found = _length(present[other], ours or complete)
        if found is not None and found != now - count and (ours or complete or found):
            _refuse(index, now - count, other, found)
    for other in range(index):
        found = _length(present[other], False)
        if found and found != now:
            _refuse(other, found - count, index, now - count)


def _check_place(place: int, layer: Any) -> None:
    """Raise InputError where tensors of a layer are on different devices, or hold nothing.

    A state that is on another device as a whole is moved back by its layer.
    """
    states = getattr(layer, "states", None)
    tensors = (
        [getattr(layer, "keys", None), getattr(layer, "values", None)] if states is None else states.tensors()
    )
    devices = {x.device for x in tensors if isinstance(x, Tensor)}
    lost = any(device.type == "meta" for device in devices) and layer.device.type != "meta"
    if len(devices) > 1 or lost:
        raise InputError(
            f"layer {place} of the cache is on {' and '.join(sorted(map(str, devices)))}: it was copied to "
            "another device in part, or without its numbers; start from an empty cache and run the text again"
        )


def _length(layer: Any, empty: bool) -> int | None:
    """Tokens in a layer; None where it counts none, as a state-space layer or a dummy.

    empty: whether a layer for keys and values that has none counts as one of 0 tokens.
    """
    if isinstance(layer, StateLayer):  # its `keys` are made when they are asked for
        return int(layer.get_seq_length()) if empty or layer.states is not None else None
    if not hasattr(layer, "keys") or not hasattr(layer, "get_seq_length"):
        return None
    if layer.keys is None and not empty:
        return None
    return int(layer.get_seq_length())


def _refuse(first: int, tokens: int, second: int, others: int) -> None:
    raise InputError(
        f"layer {first} of the cache holds {tokens} tokens and layer {second} holds {others}: an earlier "
        "call ended midway (an exception or an interrupt); start from an empty cache and run the text again"
    )
