"""Models that keep more than keys and values decode as without a cache once converted, or say why not."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from live_models import VOCAB, converted, llama, snapshot, tokens
from torch import Tensor, nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from linearize.cache.adopt import state_layer
from linearize.cache.draft_tree import tree_logits
from linearize.cache.key_value_layer import KeyValueLayer
from linearize.cache.mixed_layer import MixedStateLayer
from linearize.cache.state_layer import StateLayer
from linearize.convert.linearize import linearize
from linearize.errors import InputError, VerificationError
from linearize.mechanisms.softmax_window import SoftmaxWindowAttention

SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MAMBA: dict[str, Any] = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=16)
ZAMBA: dict[str, Any] = dict(n_mamba_heads=4, mamba_d_state=8, num_key_value_heads=4, chunk_size=16)
MODELS: dict[str, dict[str, Any]] = {
    # Attention and Mamba in one layer of the cache.
    "falcon_h1": dict(num_hidden_layers=1, mamba_d_ssm=64, **MAMBA),
    # One attention that two layers share, which says that its layer is -1.
    "zamba2": dict(num_hidden_layers=2, layers_block_type=["hybrid", "hybrid"], num_mem_blocks=1, **ZAMBA),
    # A layer that keeps nothing has a cache layer without a length.
    "nemotron_h": dict(
        layers_block_type=["full_attention", "mlp"], num_hidden_layers=2, head_dim=8, mamba_num_heads=4,
        mamba_head_dim=16, ssm_state_size=8, n_groups=1, chunk_size=16,
    ),
    # A cache whose first layer counts no tokens, by which the model sizes its masks.
    "minimax": dict(
        num_hidden_layers=2, head_dim=8, block_size=16, layer_types=["linear_attention", "full_attention"],
        num_local_experts=2, num_experts_per_tok=1,
    ),
}  # fmt: skip
QUICK = ("falcon_h1", "minimax")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@cache
def hybrid(name: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**SIZES, **MODELS[name]})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return linearize(model, mechanism="softmax_window", options={"window": 4})


def scores(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """Of six greedy steps, [steps, B, vocabulary]."""
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    return torch.stack(model.generate(ids, output_logits=True, **options, **more).logits)


@pytest.mark.parametrize("name", EVERY)
def test_a_model_with_other_states_decodes_as_without_a_cache(name):
    model, ids = hybrid(name), tokens(2, 9)
    # Zamba2's scan over a prompt and its single steps differ by as much before the conversion.
    allowed = 2e-3 if name == "zamba2" else 1e-4
    found, expected = scores(model, ids), scores(model, ids, use_cache=False)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=allowed)


@pytest.mark.parametrize("name", ["falcon_h1", pytest.param("nemotron_h", marks=pytest.mark.slow)])
def test_padding_on_the_left_changes_nothing_beside_other_states(name):
    ids = tokens(1, 9)
    padded, mask = torch.zeros(1, 12, dtype=torch.long), torch.zeros(1, 12, dtype=torch.long)
    padded[:, 3:], mask[:, 3:] = ids, 1
    found = scores(hybrid(name), padded, attention_mask=mask)
    torch.testing.assert_close(found, scores(hybrid(name), ids), rtol=1e-3, atol=1e-4)


def test_padding_that_a_models_masks_lose_is_refused():
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(InputError, match=r"1 column\(s\) for a cache of 9 tokens.*without padding"):
        scores(hybrid("minimax"), tokens(2, 9), attention_mask=mask)


def test_the_other_part_of_a_layer_follows_its_rows():
    """Beams reorder the cache, several answers repeat it: the Mamba states go along."""
    model, ids = hybrid("falcon_h1"), tokens(2, 9)
    beams = dict(max_new_tokens=6, min_new_tokens=6, num_beams=3, do_sample=False)
    torch.testing.assert_close(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        twin = copy.deepcopy(past)
        past.batch_repeat_interleave(2)
        past.batch_select_indices(torch.tensor([3, 0]))
        swapped = model(ids.flip(0)[:, :1], past_key_values=past).logits.flip(0)
        torch.testing.assert_close(swapped, model(ids[:, :1], past_key_values=twin).logits)


def test_what_a_layer_with_recurrent_states_cannot_do_is_refused():
    model = hybrid("falcon_h1")
    with torch.no_grad():
        past = model(tokens(1, 9), use_cache=True).past_key_values
        assert isinstance(past.layers[0], MixedStateLayer) and not past.is_croppable
        assert past.layers[0].nbytes > past.layers[0].states.nbytes
        with pytest.raises(InputError, match="recurrent states"):
            past.crop(-1)
        with pytest.raises(InputError, match="recurrent states"):
            tree_logits(model, past, tokens(1, 3), torch.tensor([-1, 0, 0]))
        past.reset()
        again = model(tokens(1, 9), past_key_values=past).logits
        torch.testing.assert_close(again, model(tokens(1, 9), use_cache=False).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "layer, kind",
    (
        (DynamicLayer(), StateLayer),
        (DynamicSlidingWindowLayer(8), StateLayer),
        (StaticLayer(16), StateLayer),
        (KeyValueLayer(DynamicLayer()), StateLayer),
        (LinearAttentionAndFullAttentionLayer(), MixedStateLayer),
        (LinearAttentionAndSlidingWindowAttentionLayer(8), MixedStateLayer),
        (LinearAttentionAndStaticFullAttentionLayer(16), MixedStateLayer),
        (DynamicIndexedLayer(), None),  # keeps the keys of an indexer too
        (LinearAttentionLayer(), None),
    ),
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
@torch.no_grad()
def test_a_state_takes_the_place_of_what_it_can_do(layer, kind):
    past = DynamicCache()
    past.layers = [layer]
    state_layer(past, 0, converted("llama").model.layers[0].self_attn.linear_attention)
    assert past.layers[0] is layer if kind is None else type(past.layers[0]) is kind


# --- the proof of it


def forgetful(self: Any, query: Tensor, key: Tensor, value: Tensor, states: Any, **more: Any) -> Tensor:
    """An `extend` that sees the new tokens only."""
    states.length.add_(key.shape[2])
    return self(query, key, value, **more)


@pytest.mark.parametrize("generates", (True, False))
def test_a_state_that_decodes_wrongly_is_rolled_back(generates, monkeypatch):
    model = llama(num_hidden_layers=1)
    model = model if generates else model.model
    before = snapshot(model)
    monkeypatch.setattr(SoftmaxWindowAttention, "extend", forgetful)
    with pytest.raises(
        VerificationError, match="with a cache differs from decoding without one.*nothing was"
    ):
        linearize(model, mechanism="softmax_window")
    assert snapshot(model) == before


def test_a_model_that_no_longer_generates_is_rolled_back_with_the_cause(monkeypatch):
    def broken(*args: Any, **kwargs: Any) -> Tensor:
        raise ValueError("no conv state in a StateLayer")

    model = llama(num_hidden_layers=1)
    before = snapshot(model)
    monkeypatch.setattr(SoftmaxWindowAttention, "extend", broken)
    with pytest.raises(
        VerificationError, match="no longer generates: ValueError: no conv state in a StateLa"
    ):
        linearize(model, mechanism="softmax_window")
    assert snapshot(model) == before
