"""Draft trees on a converted model: every branch verified in one forward pass, then one of them accepted.

A node's logits are exactly those of decoding its branch token by token (You et al., section 4.3, exact at
group borders as well): attention modules score each node against the state and its own ancestors, and the
state is not changed before a path is accepted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .ops import lineage
from .state_layer import StateLayer


@torch.no_grad()
def tree_logits(model: nn.Module, cache: Any, tokens: Tensor, parents: Tensor) -> Tensor:
    """Logits `[B, N, vocabulary]` of N draft tokens that follow what `cache` holds; the cache is not changed.

    tokens: int64 `[B, N]`. parents: int `[N]` or `[B, N]`, the index of each node's parent, -1 for one that
    follows the last committed token; parents come before children. cache: of a converted decoder, with every
    layer rewritten, after at least one token. Raises InputError when it is not, or for what is no tree.
    """
    layers = state_layers(cache)
    depth, _ = lineage(parents, tokens.shape[0], tokens.shape[1], tokens.device)
    assert layers[0].states is not None
    length = layers[0].states.length.to(tokens.device)
    for layer in layers:
        layer.tree = parents
    try:
        call: Any = model
        out = call(
            input_ids=tokens, position_ids=length[:, None] + depth, past_key_values=cache, use_cache=True
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
    for layer in state_layers(cache):
        layer.accept(path)


def state_layers(cache: Any) -> list[StateLayer]:
    """The layers of a cache that holds states alone. Raises InputError for any other, or an empty one."""
    layers = list(getattr(cache, "layers", ()))
    wrong = [i for i, layer in enumerate(layers) if not isinstance(layer, StateLayer) or layer.states is None]
    if wrong or not layers:
        raise InputError(
            "draft trees need a filled cache with a state in every layer; layer "
            f"{wrong[0] if wrong else 0} has none (a layer that kept its softmax, or no prompt yet?)"
        )
    return layers
