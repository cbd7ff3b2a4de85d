"""Caches after faults: exact, or a clear error with the cache as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import linearize as lz
from linearize.cache.state_layer import StateLayer
from linearize.errors import InputError


def llama(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return lz.linearize(LlamaForCausalLM(config).eval(), **settings)


@pytest.fixture(
    scope="module",
    params=[
        dict(options={"window": 4, "sinks": 2, "salient": 4}),
        dict(mechanism="augmented_paper", group_size=4, conv_taps=3),
        dict(mechanism="softmax_window", options={"window": 4}),
        dict(keep_softmax=(1,), options={"window": 4}),
    ],
    ids=["augmented", "paper", "softmax_window", "hybrid"],
)
def model(request: pytest.FixtureRequest) -> Any:
    return llama(**request.param)


IDS = torch.randint(3, 60, (2, 30), generator=torch.Generator().manual_seed(1))
MODES: dict[str, Callable[[], Any]] = {"inference": torch.inference_mode, "no_grad": torch.no_grad}


def whole(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.clone(), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("modes", [("inference", "no_grad"), ("no_grad", "inference")])
def test_a_prompt_in_one_mode_is_continued_in_the_other(modes: tuple[str, str], model: Any) -> None:
    with MODES[modes[0]]():
        cache = model(IDS[:, :20], use_cache=True).past_key_values
    for start, end, mode in ((20, 21, modes[1]), (21, 26, modes[1]), (26, 27, modes[0]), (27, 30, modes[1])):
        with MODES[mode]():
            found = model(IDS[:, start:end], past_key_values=cache).logits
        close(found, whole(model)[:, start:end])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("recorded", [False, True])
def test_crop_needs_no_mode_of_its_own(recorded: bool, mode: str, model: Any) -> None:
    with MODES[mode]():
        cache = model(IDS[:, :20], use_cache=True).past_key_values
    if recorded:
        cache.activate_past_recording()
    with MODES[mode]():
        model(IDS[:, 20:26], past_key_values=cache)
    assert torch.is_grad_enabled()
    try:
        for layer in cache.layers:
            layer.crop(-3)
    except lz.LinearizeError:
        assert not recorded  # a state that was not asked to go back says so, and stays
        with torch.no_grad():
            close(model(IDS[:, 26:], past_key_values=cache).logits, whole(model)[:, 26:])
        return
    with torch.no_grad():
        found = model(IDS[:, 23:], past_key_values=cache).logits
    close(found, whole(model)[:, 23:])
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            assert not any(x.requires_grad for x in layer.states.tensors())


def test_what_is_done_to_rows_after_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        cache = model(IDS[:, :20], use_cache=True).past_key_values
    twin = copy.deepcopy(cache)
    twin.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        close(model(IDS[:, 20:].flip(0), past_key_values=twin).logits, whole(model)[:, 20:].flip(0))
        close(model(IDS[:, 20:], past_key_values=cache).logits, whole(model)[:, 20:])
        cache.reset()
        close(model(IDS[:, :5], past_key_values=cache).logits, whole(model)[:, :5])


def test_a_static_cache_leaves_inference_mode_too() -> None:
    model = llama(options={"window": 4, "sinks": 2, "salient": 4})
    cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.inference_mode():
        model(IDS[:, :20], past_key_values=cache)
    with torch.no_grad():
        found = model(IDS[:, 20:], past_key_values=cache).logits
    close(found, whole(model)[:, 20:])


def test_a_layer_taken_back_alone_is_noticed(model: Any) -> None:
    with torch.no_grad():
        cache = model(IDS[:, :20], use_cache=True).past_key_values
        cache.activate_past_recording()
        model(IDS[:, 20:24], past_key_values=cache)
        cache.layers[1].crop(-2)
        with pytest.raises(lz.LinearizeError, match="layer"):
            model(IDS[:, 24:], past_key_values=cache)


def moved(cache: Any, layer: int, places: Callable[[int], bool]) -> None:
    """Some tensors of a layer's state, or its keys and values, to a device that holds no numbers."""
    found, count = cache.layers[layer], iter(range(100))
    if getattr(found, "states", None) is not None:
        found.states = found.states.map(lambda x: x.to("meta") if places(next(count)) else x)
    else:
        found.keys, found.values = (
            x.to("meta") if places(i) else x for i, x in enumerate((found.keys, found.values))
        )


@pytest.mark.parametrize("layer", (0, 1))
@pytest.mark.parametrize(
    "places", (lambda i: True, lambda i: i == 0, lambda i: i == 1), ids=("all", "0", "1")
)
@torch.no_grad()
def test_a_cache_that_was_moved_in_part_is_refused_and_stays_as_it_was(
    places: Callable[[int], bool], layer: int, model: Any
) -> None:
    cache = model(IDS[:, :20]).past_key_values
    kept = copy.deepcopy(cache)
    moved(cache, layer, places)
    with pytest.raises(InputError, match=f"layer {layer} of the cache is on .*meta"):
        model(IDS[:, 20:], past_key_values=cache)
    assert [int(x.get_seq_length()) for x in cache.layers] == [20, 20]
    # With the layer's own numbers again nothing is amiss.
    cache.layers[layer] = kept.layers[layer]
    close(model(IDS[:, 20:], past_key_values=cache).logits, whole(model)[:, 20:])


@torch.no_grad()
def test_a_cache_that_was_moved_with_its_model_goes_on(model: Any) -> None:
    """As one that was stored on a GPU and read on the CPU: its layers still say where they were."""
    cache = model(IDS[:, :20]).past_key_values
    for layer in cache.layers:
        if getattr(layer, "states", None) is not None:
            layer.device = torch.device("cuda", 0)
    close(model(IDS[:, 20:], past_key_values=cache).logits, whole(model)[:, 20:])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
@torch.no_grad()
def test_a_state_that_was_cast_is_refused(dtype: torch.dtype, model: Any) -> None:
    """Its sums in another dtype are other numbers, and of another size than a kernel reads."""
    cache = model(IDS[:, :20]).past_key_values
    kept = copy.deepcopy(cache)
    cast = cache.layers[0]
    cast.states = cast.states.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
    with pytest.raises(InputError, match="was cast"):
        model(IDS[:, 20:], past_key_values=cache)
    cache.layers[0] = kept.layers[0]
    close(model(IDS[:, 20:], past_key_values=cache).logits, whole(model)[:, 20:])
