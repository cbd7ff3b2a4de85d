"""Every way transformers generates works on the state or is refused in one sentence, never silently wrong."""

from __future__ import annotations

import copy
import pickle
from threading import Thread
from typing import Any

import pytest
import torch
import transformers
from live_models import VOCAB, converted, llama, recompute, tokens, wake
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerFast, StaticCache, TextIteratorStreamer, pipeline

from linearize.convert.linearize import linearize
from linearize.errors import InputError

SETTINGS: dict[str, Any] = dict(max_new_tokens=10, eos_token_id=None, disable_compile=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return converted("llama")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = {f"w{i}": i for i in range(VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", padding_side="left")


def filled(model: Any, text: Tensor, **inputs: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(text, past_key_values=cache, **inputs)
    return cache


@torch.no_grad()
def following(model: Any, text: Tensor, cache: Any, **inputs: Any) -> Tensor:
    return model(text, past_key_values=cache, **inputs).logits


@torch.no_grad()
def whole(model: Any, text: Tensor, start: int) -> Tensor:
    return model(text, use_cache=False).logits[:, start:]


# --- ways to generate


@pytest.mark.parametrize(
    "how",
    [
        dict(do_sample=True, temperature=0.8, top_k=20),
        dict(do_sample=True, top_p=0.9, num_return_sequences=3),
        dict(do_sample=True, num_beams=3),
        dict(do_sample=False, num_beams=4, num_return_sequences=2, length_penalty=0.5),
    ],
    ids=["sampling", "several", "beam sampling", "several beams"],
)
def test_with_the_same_seed_the_cache_changes_nothing(model: Any, how: dict[str, Any]) -> None:
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(tokens(2, 9), use_cache=use_cache, **how, **SETTINGS))
    assert torch.equal(*found)


def test_scores_and_logits_are_those_of_the_whole_text(model: Any) -> None:
    asked = dict(output_scores=True, output_logits=True, return_dict_in_generate=True, do_sample=False)
    out = model.generate(tokens(2, 9), **asked, **SETTINGS)
    logits = whole(model, out.sequences, 8)[:, :-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(out.scores, 1), logits, atol=1e-4, rtol=1e-4)


def test_attention_weights_are_never_made_up(model: Any) -> None:
    assert not any(
        isinstance(w, Tensor) for w in model(tokens(1, 5), output_attentions=True).attentions or ()
    )
    out = model.generate(
        tokens(1, 5), output_attentions=True, return_dict_in_generate=True, do_sample=False, **SETTINGS
    )
    assert not any(isinstance(w, Tensor) for step in out.attentions or () for w in step or ())


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_cache_implementations_by_name(model: Any, name: str) -> None:
    prompt = tokens(2, 9)
    out = model.generate(prompt, cache_implementation=name, do_sample=False, **SETTINGS)
    assert torch.equal(out, recompute(model, prompt, 10))


@pytest.mark.parametrize(
    "how",
    [dict(penalty_alpha=0.6, top_k=4), dict(dola_layers="low"), dict(num_beams=4, num_beam_groups=2)],
    ids=["contrastive", "dola", "group beams"],
)
def test_what_transformers_took_out_is_refused_by_transformers(model: Any, how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(tokens(1, 5), do_sample=False, **how, **SETTINGS)


def test_a_streamer_is_given_the_tokens_as_they_come(model: Any, tokenizer: Any) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    prompt = tokens(1, 7)
    settings = dict(streamer=streamer, do_sample=False, **SETTINGS)
    thread = Thread(target=model.generate, args=(prompt,), kwargs=settings)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert tokenizer(text)["input_ids"] == recompute(model, prompt, 10)[0, 7:].tolist()


def test_a_pipeline_generates_batches_of_texts(model: Any, tokenizer: Any) -> None:
    texts = ["w5 w9 w11 w20 w7", "w8 w30"]
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    found = generate(texts, do_sample=False, return_full_text=False, **SETTINGS)
    for text, (out,) in zip(texts, found, strict=True):
        prompt = torch.tensor([tokenizer(text)["input_ids"]])
        wanted = recompute(model, prompt, 10)[0, prompt.shape[1] :].tolist()
        assert tokenizer(out["generated_text"])["input_ids"] == [
            t for t in wanted if t != tokenizer.pad_token_id
        ]


# --- caches


def test_a_cache_survives_a_pickle_and_a_copy_beside_its_model(model: Any) -> None:
    text = tokens(2, 12)
    cache = filled(model, text[:, :9])
    loaded = pickle.loads(pickle.dumps(cache))
    twin, copied = copy.deepcopy((model, cache))
    wanted = whole(model, text, 9)
    for who, what in ((model, loaded), (twin, copied), (model, cache)):
        torch.testing.assert_close(following(who, text[:, 9:], what), wanted, atol=1e-4, rtol=1e-4)


def test_an_unpickled_cache_of_another_form_is_refused(model: Any) -> None:
    loaded = pickle.loads(pickle.dumps(filled(model, tokens(2, 9))))
    other = linearize(llama(), mechanism="augmented_paper", group_size=8)
    with pytest.raises(InputError, match="another model"):
        following(other, tokens(2, 1), loaded)
    assert torch.isfinite(following(model, tokens(2, 1), loaded)).all()


def test_a_cache_is_reordered_cropped_and_offloaded(model: Any) -> None:
    text = tokens(2, 12)
    cache = filled(model, text[:, :9])
    cache.activate_past_recording()
    following(model, text[:, :2], cache)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    for layer in cache.layers:
        layer.offload()
    wanted = whole(model, text[[1, 0]], 9)
    torch.testing.assert_close(following(model, text[[1, 0], 9:], cache), wanted, atol=1e-4, rtol=1e-4)


WRONG: dict[str, tuple[Any, str]] = {
    "layers": (lambda model: linearize(llama(num_hidden_layers=3)), "another model"),
    "heads": (lambda model: linearize(llama(num_key_value_heads=4)), "another model"),
    "sizes": (lambda model: linearize(llama(hidden_size=64)), "another model"),
    "mechanism": (lambda model: linearize(llama(), mechanism="relu"), "another model"),
    "unconverted": (lambda model: llama(), "belongs to a converted model"),
    "dtype": (lambda model: model.bfloat16(), "filled in torch.float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_cache_given_to_the_wrong_model_is_refused_and_stays_as_it_was(name: str) -> None:
    build, message = WRONG[name]
    model = converted("llama")
    text = tokens(2, 12)
    wanted = whole(model, text, 9)
    cache = filled(model, text[:, :9])
    before = [x.clone() for layer in cache.layers for x in layer.states.tensors()]
    wrong = build(model)
    with pytest.raises(InputError, match=message):
        following(wrong, text[:, 9:], cache)
    after = [x for layer in cache.layers for x in layer.states.tensors()]
    assert len(cache.layers) == 2 and cache.get_seq_length() == 9
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if name != "dtype":
        torch.testing.assert_close(following(model, text[:, 9:], cache), wanted, atol=1e-4, rtol=1e-4)


def test_a_call_that_fails_for_its_mask_leaves_the_cache_as_it_was(model: Any) -> None:
    text = tokens(1, 12)
    cache = filled(model, text[:, :8])
    mask = torch.ones(1, 1, 4, 12, dtype=torch.bool)  # sees the future
    with pytest.raises(InputError, match="not a causal mask"):
        following(model, text[:, 8:], cache, attention_mask=mask)
    assert cache.get_seq_length() == 8
    torch.testing.assert_close(
        following(model, text[:, 8:], cache), whole(model, text, 8), atol=1e-4, rtol=1e-4
    )


def test_gradients_after_a_state_are_refused_and_a_new_cache_takes_them(model: Any) -> None:
    text = tokens(2, 12)
    cache = filled(model, text[:, :9])
    with pytest.raises(InputError, match="carries no gradients"):
        model(text[:, 9:], past_key_values=cache)
    torch.testing.assert_close(
        following(model, text[:, 9:], cache), whole(model, text, 9), atol=1e-4, rtol=1e-4
    )
    cache.reset()
    model(text, past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.any()
    model.zero_grad()


# --- padding


@pytest.mark.parametrize("mechanism", ["augmented_paper", "relu", "softmax_window", "hedgehog"])
@pytest.mark.parametrize("lengths", [(3, 8), (4, 5), (9, 2), (7, 12)], ids=str)
def test_left_padding_never_changes_a_real_token(mechanism: str, lengths: tuple[int, int]) -> None:
    """Groups of 4: contexts of 0, 1 and -1 modulo the group, and shorter than the convolution of 5 taps."""
    model: Any = converted("llama", mechanism=mechanism, conv_taps=5, augmentation=True)
    width = max(lengths)
    text = tokens(2, width)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    out = model.generate(text, attention_mask=mask, do_sample=False, **SETTINGS)
    for row, length in enumerate(lengths):
        alone = recompute(model, text[row : row + 1, width - length :], 10)
        assert torch.equal(out[row, width:], alone[0, length:])


def test_right_padding_inside_a_conversation_never_changes_a_real_token(model: Any) -> None:
    text, more = tokens(2, 12), tokens(2, 5)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:] = 0
    cache = filled(model, text, attention_mask=mask)
    longer = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
    positions = (longer.cumsum(-1) - 1)[:, 12:]
    found = following(model, more, cache, attention_mask=longer, position_ids=positions)
    for row, length in enumerate((7, 12)):
        alone = torch.cat([text[row : row + 1, :length], more[row : row + 1]], 1)
        torch.testing.assert_close(found[row], whole(model, alone, length)[0], atol=1e-4, rtol=1e-4)


# --- static caches that keep a window


def gemma() -> nn.Module:
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def windowed() -> Any:
    return wake(linearize(gemma(), mechanism="augmented_paper", group_size=4, approximate=("window",)))


@pytest.mark.parametrize("length", [4, 11])
def test_a_dropped_window_is_dropped_in_static_caches_too(windowed: Any, length: int) -> None:
    prompt = tokens(2, length)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    settings = dict(cache_implementation="static", do_sample=False, **SETTINGS)
    out = windowed.generate(prompt, attention_mask=mask, return_dict_in_generate=True, **settings)
    assert {type(layer).__name__ for layer in out.past_key_values.layers} == {"StateLayer"}
    for row, keep in enumerate(mask.bool()):
        alone = recompute(windowed, prompt[row : row + 1, keep], 10)
        assert torch.equal(out.sequences[row, length:], alone[0, keep.sum() :])


def test_a_static_cache_of_the_users_own_works_when_its_length_can_be_told(windowed: Any) -> None:
    text = tokens(2, 14)
    store = StaticCache(config=windowed.config, max_cache_len=20)
    found = torch.cat([following(windowed, piece, store) for piece in text.split([5, 1, 4, 4], 1)], 1)
    torch.testing.assert_close(found, whole(windowed, text, 0), atol=1e-4, rtol=1e-4)


def test_two_attentions_of_one_owner_share_keys_and_values() -> None:
    """DiffLlama's differential attention: keys are shared by pairs of heads, each half of values by all."""
    torch.manual_seed(0)
    config = transformers.DiffLlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    model: Any = wake(
        linearize(transformers.DiffLlamaForCausalLM(config).eval(), mechanism="augmented_paper", group_size=4)
    )
    prompt, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    for settings in ({}, {"cache_implementation": "static"}):
        out = model.generate(prompt, attention_mask=mask, do_sample=False, **SETTINGS, **settings)
        for row, keep in enumerate(mask.bool()):
            alone = recompute(model, prompt[row : row + 1, keep], 10)
            assert torch.equal(out[row, 9:], alone[0, keep.sum() :])
