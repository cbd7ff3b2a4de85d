"""Layers that settings name are there, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import linearize as lz
from linearize.convert.linearize import planned
from linearize.errors import RefusedError


def three_layers() -> Any:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("layers", [(0, 9), (0, 10**6)])
@pytest.mark.parametrize("name", ["layers", "keep_softmax"])
def test_a_layer_that_is_not_there_is_refused_by_name(name: str, layers: tuple[int, ...]) -> None:
    with pytest.raises(RefusedError, match=f"{name} names {layers[-1]}, .*layers with attention are 0 to 2"):
        lz.linearize(three_layers(), **{name: layers})


@pytest.mark.parametrize("path", ["model.layers.9", "lm_head", "model.layers.0.mlp", "self_attn", "0", ""])
def test_a_path_without_attention_is_refused_wherever_layers_are_named(path: str) -> None:
    model = three_layers()
    for act in (lz.linearize, lz.inspect, planned):
        settings: Any = {"keep_softmax": (path,)}
        with pytest.raises(RefusedError, match="no attention is there"):
            act(model, config=lz.LinearizeConfig(**settings))
    lz.linearize(model, keep_softmax=("model.layers.1",))
    with pytest.raises(RefusedError, match="no attention is there"):
        lz.linearize(model, keep_softmax=("model.layers.1", path))
    lz.linearize(model, keep_softmax=("model.layers.1", "model.layers.0.self_attn"))
