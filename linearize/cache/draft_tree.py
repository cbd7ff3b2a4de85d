"""Draft trees on a decoder: every branch verified in one forward pass, then one of them accepted.

A node's logits are exactly those of decoding its branch token by token (You et al., section 4.3, exact at
group borders as well): attention modules score each node against the state and its own ancestors, and the
state is not changed before a path is accepted. Layers with keys and values, where a model kept its softmax,
see the same tree through a mask.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ..errors import InputError
from ..ops.attention import lineage
from .key_value_layer import KeyValueLayer, tree_mask
from .state_layer import StateLayer


@torch.no_grad()
def tree_logits(
    model: nn.Module, cache: Any, tokens: Tensor, parents: Tensor, columns: Tensor | None = None
) -> Tensor:
    """Logits `[B, N, vocabulary]` of N draft tokens that follow what `cache` holds; the cache is not changed.

    tokens: int64 `[B, N]`. parents: int `[N]` or `[B, N]`, the index of each node's parent, -1 for one that
    follows the last committed token; parents come before children. cache: of a decoder, after at least one
    token; each layer holds a state, or keys and values that grow (`DynamicLayer`). columns: `[B, L]`, which
    columns of the cache are real tokens; None when all are. Raises InputError when the cache is another, or
    for what is no tree.
    """
    layers = tree_layers(cache)
    # Once for all layers: it costs as much as a layer's attention.
    tree = lineage(parents, tokens.shape[0], tokens.shape[1], tokens.device)
    inputs: dict[str, Any] = {}
    length: Tensor | int
    if all(isinstance(layer, StateLayer) for layer in layers):
        assert isinstance(layers[0], StateLayer) and layers[0].states is not None
        length = layers[0].states.length.to(tokens.device)[:, None]
    else:
        _check_masks(model)
        if columns is None:
            columns = torch.ones(tokens.shape[0], int(cache.get_seq_length()), device=tokens.device)
        length = columns.sum(1, keepdim=True).long()
        inputs["attention_mask"] = tree_mask(columns, tree.ancestors, next(model.parameters()).dtype)
    for layer in layers:
        layer.tree = tree
    try:
        call: Any = model
        out = call(
            input_ids=tokens,
            position_ids=length + tree.depth,
            past_key_values=cache,
            use_cache=True,
            **inputs,
        )
    finally:
        for layer in layers:
            layer.tree = None
    return out.logits


def accept(cache: Any, path: Tensor) -> None:
    """Make the nodes `path`, int `[B, P]`, of the last tree part of every sequence, without recomputation.

    -1 stands for nothing: rows may accept different numbers of tokens. The cache then counts P columns for
    all of them, so an attention mask for calls that follow has zeros where a row accepted nothing.
    """
    for layer in tree_layers(cache):
        layer.accept(path)


def tree_layers(cache: Any) -> list[StateLayer | KeyValueLayer]:
    """The layers of a filled cache, all of which can hold a tree. Raises InputError when one cannot."""
    layers = list(getattr(cache, "layers", ()))
    for index, layer in enumerate(layers):
        if isinstance(layer, StateLayer):
            usable = layer.takes_trees and layer.states is not None
        else:
            usable = type(layer) in (DynamicLayer, KeyValueLayer) and layer.get_seq_length() > 0
        if not usable:
            raise InputError(
                "draft trees need a filled cache of states, or of keys and values that grow; layer "
                f"{index}, a {type(layer).__name__}, is empty or of another kind (a window, a static cache, "
                "recurrent states?)"
            )
    if not layers:
        raise InputError("draft trees need a filled cache, and this one has no layers: run a prompt first")
    for index, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = KeyValueLayer(layer)
    return list(cache.layers)


def _check_masks(model: nn.Module) -> None:
    """Raise InputError unless keys and values can be masked node by node, at positions that are told."""
    if not _takes_positions(type(model).forward):
        raise InputError(f"draft trees need position_ids, which {type(model).__name__} does not take")
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        raise InputError(
            f"draft trees on keys and values need attention that takes a mask, not {attention!r}: load the "
            "model with attn_implementation='sdpa'"
        )


@functools.cache
def _takes_positions(forward: Callable[..., Any]) -> bool:
    return "position_ids" in inspect.signature(forward).parameters
