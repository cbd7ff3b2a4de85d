"""Generation with a converted model gives what running the whole prefix again gives, whatever the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from live_models import VOCAB, converted, llama, recompute, tokens, wake
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from linearize.api import linearize
from linearize.errors import InputError, RefusedError

STEPS = 10
GREEDY: dict[str, Any] = dict(max_new_tokens=STEPS, do_sample=False, eos_token_id=None, disable_compile=True)


def left_padding(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :5] = 0
    mask[-1, :1] = 0
    return mask


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return converted("llama")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation_equals_recomputing_every_prefix(model: Any, cache: str) -> None:
    prompt = tokens(2, 9)
    settings = {} if cache == "dynamic" else {"cache_implementation": "static"}
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY, **settings)
    assert torch.equal(out, recompute(model, prompt, STEPS))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_rows_generate_what_they_generate_alone(model: Any, cache: str) -> None:
    prompt, mask = tokens(3, 11), left_padding(3, 11)
    settings = {} if cache == "dynamic" else {"cache_implementation": "static"}
    out = model.generate(prompt, attention_mask=mask, **GREEDY, **settings)
    for row, keep in enumerate(mask.bool()):
        alone = recompute(model, prompt[row : row + 1, keep], STEPS)
        assert torch.equal(out[row, 11:], alone[0, keep.sum() :])


def test_logits_of_padded_rows_equal_those_without_padding(model: Any) -> None:
    prompt, mask = tokens(2, 11), left_padding(2, 11)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(prompt, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row, keep in enumerate(mask.bool()):
        alone = model(prompt[row : row + 1, keep], use_cache=False).logits[0]
        torch.testing.assert_close(padded[row, keep], alone, atol=1e-5, rtol=1e-4)


def test_beam_search_with_a_cache_equals_beam_search_without(model: Any) -> None:
    prompt = tokens(2, 7)
    settings = dict(GREEDY, num_beams=3, attention_mask=torch.ones_like(prompt))
    with_cache = model.generate(prompt, **settings)
    assert torch.equal(with_cache, model.generate(prompt, **settings, use_cache=False))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(model: Any, cache: str) -> None:
    prompt = tokens(2, 14)
    store = DynamicCache(config=model.config)
    if cache == "static":
        store = StaticCache(config=model.config, max_cache_len=20)
    pieces, start = [], 0
    for length in (5, 1, 4, 3, 1):
        piece = prompt[:, start : start + length]
        pieces.append(model(piece, past_key_values=store, use_cache=True).logits)
        start += length
    whole = model(prompt, use_cache=False).logits
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-4)


def test_a_conversation_continues_from_its_own_cache(model: Any) -> None:
    prompt = tokens(1, 6)
    store = DynamicCache(config=model.config)
    first = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=store, **GREEDY)
    second = torch.cat([first, tokens(1, 4)], 1)
    out = model.generate(second, attention_mask=torch.ones_like(second), past_key_values=store, **GREEDY)
    assert torch.equal(out, recompute(model, second, STEPS))


def test_a_cache_filled_by_another_model_is_an_error(model: Any) -> None:
    foreign = DynamicCache()
    llama()(tokens(1, 6), past_key_values=foreign)
    with pytest.raises(InputError, match="already holds 6 keys and values"):
        model(tokens(1, 1), past_key_values=foreign)


def test_sampling_with_assisted_prompt_lookup_equals_greedy(model: Any) -> None:
    prompt = tokens(1, 8).repeat(1, 2)
    mask = torch.ones_like(prompt)
    plain = model.generate(prompt, attention_mask=mask, **GREEDY)
    assert torch.equal(
        model.generate(prompt, attention_mask=mask, prompt_lookup_num_tokens=3, **GREEDY), plain
    )


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_decoder_generation_equals_recomputing_every_prefix(name: str) -> None:
    options = {"approximate": ("bias",)} if name == "t5" else {}
    model: Any = converted(name, **options)
    source = tokens(2, 13)
    mask = torch.ones_like(source)
    mask[0, -4:] = 0
    begin = torch.full((2, 1), model.config.decoder_start_token_id)
    ids = begin
    for _ in range(STEPS):
        out = model(input_ids=source, attention_mask=mask, decoder_input_ids=ids, use_cache=False)
        ids = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], 1)
    settings = dict(GREEDY, num_beams=1, forced_eos_token_id=None)
    assert torch.equal(model.generate(source, attention_mask=mask, **settings), ids)
    static = model.generate(source, attention_mask=mask, cache_implementation="static", **settings)
    assert torch.equal(static, ids)


def mistral(**changes: Any) -> nn.Module:
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**{**settings, **changes})).eval()


def test_a_dropped_window_is_dropped_in_the_cache_and_the_masks_too() -> None:
    model: Any = wake(linearize(mistral(), group_size=4, approximate=("window",)))
    prompt, mask = tokens(2, 11), left_padding(2, 11)
    out = model.generate(prompt, attention_mask=mask, **GREEDY)
    for row, keep in enumerate(mask.bool()):
        assert torch.equal(
            out[row, 11:], recompute(model, prompt[row : row + 1, keep], STEPS)[0, keep.sum() :]
        )
    with pytest.raises(InputError, match="sliding window"):
        model.generate(prompt, attention_mask=mask, cache_implementation="static", **GREEDY)


def test_a_window_is_not_dropped_beside_layers_that_keep_theirs() -> None:
    with pytest.raises(RefusedError, match="can only be dropped when every attention"):
        linearize(mistral(), approximate=("window",), layers=(0,))


def test_softmax_through_the_seam_keeps_the_window_while_decoding() -> None:
    original: Any = mistral()
    exact: Any = linearize(mistral(), mechanism="softmax")
    prompt = tokens(2, 11)
    for settings in (GREEDY, dict(GREEDY, cache_implementation="static")):
        mask = left_padding(2, 11)
        expected = original.generate(prompt, attention_mask=mask, **settings)
        assert torch.equal(exact.generate(prompt, attention_mask=mask, **settings), expected)


def test_an_eager_only_decoder_generates_through_its_graph() -> None:
    model: Any = converted("gptj")
    prompt, mask = tokens(2, 9), left_padding(2, 9)
    out = model.generate(prompt, attention_mask=mask, **GREEDY)
    assert model._linearize.plan.sites[0].rung == "graft"
    for row, keep in enumerate(mask.bool()):
        assert torch.equal(
            out[row, 9:], recompute(model, prompt[row : row + 1, keep], STEPS)[0, keep.sum() :]
        )
    assert int(out.max()) < VOCAB
