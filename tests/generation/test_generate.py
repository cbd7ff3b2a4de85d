"""Generation with a converted model gives what running the whole prefix again gives, whatever the cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from live_models import VOCAB, converted, llama, recompute, tokens, wake
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

from linearize.convert.linearize import linearize
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
    model: Any = wake(
        linearize(mistral(), mechanism="augmented_paper", group_size=4, approximate=("window",))
    )
    prompt, mask = tokens(2, 11), left_padding(2, 11)
    out = model.generate(prompt, attention_mask=mask, **GREEDY)
    for row, keep in enumerate(mask.bool()):
        assert torch.equal(
            out[row, 11:], recompute(model, prompt[row : row + 1, keep], STEPS)[0, keep.sum() :]
        )
    static = model.generate(prompt, attention_mask=mask, cache_implementation="static", **GREEDY)
    assert torch.equal(static, out)
    with torch.no_grad(), pytest.raises(InputError, match="sliding window.*DynamicCache"):
        model(prompt, past_key_values=StaticCache(config=model.config, max_cache_len=30))


def test_a_window_is_not_dropped_beside_layers_that_keep_theirs() -> None:
    with pytest.raises(RefusedError, match="can only be dropped when every attention"):
        linearize(mistral(), mechanism="augmented_paper", approximate=("window",), layers=(0,))
    with pytest.raises(RefusedError, match="their masks are one"):  # a window that is carried
        linearize(mistral(), layers=(0,))


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
    assert model._linearize.plan.sites[0].route == "graph"
    for row, keep in enumerate(mask.bool()):
        assert torch.equal(
            out[row, 9:], recompute(model, prompt[row : row + 1, keep], STEPS)[0, keep.sum() :]
        )
    assert int(out.max()) < VOCAB


# --- the state of constant size


def layers_of(out: Any) -> list[str]:
    return [type(layer).__name__ for layer in out.past_key_values.layers]


def test_generation_keeps_a_state_of_one_size(model: Any) -> None:
    sizes = []
    for steps in (5, 60):
        settings = {**GREEDY, "max_new_tokens": steps, "return_dict_in_generate": True}
        out = model.generate(tokens(2, 9), **settings)
        assert set(layers_of(out)) == {"StateLayer"}
        assert out.past_key_values.get_seq_length() == 9 + steps - 1
        sizes.append(sum(layer.states.nbytes for layer in out.past_key_values.layers))
    assert sizes[0] == sizes[1]


def test_compiled_steps_are_one_graph_for_all_tokens_and_equal_eager_ones(model: Any) -> None:
    prompt = tokens(1, 9)
    settings = {**GREEDY, "max_new_tokens": 40, "cache_implementation": "static"}
    eager = model.generate(prompt, **settings)
    # transformers compiles by itself on accelerators only.
    how = CompileConfig(fullgraph=True, backend="eager", mode=None)
    how._compile_all_devices = True
    counters.clear()
    out = model.generate(prompt, **{**settings, "disable_compile": False}, compile_config=how)
    assert torch.equal(out, eager)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("helper", ["lookup", "itself", "another"])
def test_speculation_by_transformers_equals_greedy(model: Any, helper: str) -> None:
    """Rejected tokens are taken back from the states of the model and of a converted assistant, exactly."""
    prompt = tokens(1, 9).repeat(1, 3)
    greedy = {**GREEDY, "max_new_tokens": 40}
    wanted = model.generate(prompt, **greedy)
    settings: dict[str, Any] = {"prompt_lookup_num_tokens": 4}
    if helper != "lookup":
        settings = {"assistant_model": model if helper == "itself" else converted("llama")}
    assert torch.equal(model.generate(prompt, **greedy, **settings), wanted)


def test_layers_that_keep_softmax_share_the_cache() -> None:
    model: Any = wake(linearize(llama(), mechanism="augmented_paper", group_size=4, keep_softmax=(0,)))
    prompt, mask = tokens(2, 11), left_padding(2, 11)
    out = model.generate(prompt, attention_mask=mask, **GREEDY, return_dict_in_generate=True)
    kinds = layers_of(out)
    assert kinds[0] == "DynamicLayer" and set(kinds[1:]) == {"StateLayer"}
    static = model.generate(prompt, attention_mask=mask, **GREEDY, cache_implementation="static")
    assert torch.equal(static, out.sequences)
    for row, keep in enumerate(mask.bool()):
        alone = recompute(model, prompt[row : row + 1, keep], STEPS)
        assert torch.equal(out.sequences[row, 11:], alone[0, keep.sum() :])


def test_a_cache_for_another_batch_size_or_model_is_refused_and_stays_as_it_was(model: Any) -> None:
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens(2, 90), past_key_values=cache)
        before = [x.clone() for layer in cache.layers for x in layer.states.tensors()]
        with pytest.raises(InputError, match="holds 2 sequences"):
            model(tokens(3, 1), past_key_values=cache)
        with pytest.raises(InputError, match="another model"):
            converted("llama")(tokens(2, 1), past_key_values=cache)
        with pytest.raises(InputError, match="take back"):
            cache.crop(-80)
    after = [x for layer in cache.layers for x in layer.states.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert cache.get_seq_length() == 90


def test_a_call_that_needs_gradients_attends_keys_and_values(model: Any) -> None:
    out = model(tokens(2, 9), use_cache=True)
    assert layers_of(out)[0] == "DynamicLayer"
    out.logits.sum().backward()
    model.zero_grad()
    with torch.no_grad():
        more = model(tokens(2, 1), past_key_values=out.past_key_values)
        whole = model(torch.cat([tokens(2, 9), tokens(2, 1)], 1), use_cache=False)
    torch.testing.assert_close(more.logits[:, -1], whole.logits[:, -1], atol=1e-5, rtol=1e-4)


def test_rows_of_a_cache_can_be_repeated_selected_reset_and_copied(model: Any) -> None:
    prompt, following = tokens(2, 9), tokens(2, 12)[:, 9:]

    def whole(rows: list[int]) -> Tensor:
        return model(torch.cat([prompt, following], 1)[rows], use_cache=False).logits[:, 9:]

    with torch.no_grad():
        cache = DynamicCache()
        model(prompt, past_key_values=cache)
        twice, second = copy.deepcopy(cache), copy.deepcopy(cache)
        twice.batch_repeat_interleave(2)
        second.batch_select_indices(torch.tensor([1]))
        for kept, rows in ((cache, [0, 1]), (twice, [0, 0, 1, 1]), (second, [1])):
            out = model(following[rows], past_key_values=kept).logits
            torch.testing.assert_close(out, whole(rows), atol=1e-4, rtol=1e-4)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(prompt, past_key_values=cache).logits
        torch.testing.assert_close(again, model(prompt, use_cache=False).logits, atol=1e-4, rtol=1e-4)


def test_a_config_that_another_model_shares_is_not_touched() -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    first, other = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    before = config.to_dict()
    linearize(first)
    assert config.to_dict() == before
    other(tokens(1, 5))
