"""Models with a sliding window that the mechanism covers give what they gave, at any length."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from live_models import VOCAB, tokens
from torch import Tensor, nn

import linearize as lz
from linearize.errors import RefusedError

WINDOW, LENGTH, STEPS = 6, 30, 12
OPTIONS = {"window": 48, "salient": 8}


def _settings(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=32, initializer_range=0.2, pad_token_id=0, bos_token_id=1)
    return {**sizes, "eos_token_id": 2, **changes}


def _llama_like(**changes: Any) -> dict[str, Any]:
    sizes = dict(intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return _settings(**{**sizes, "sliding_window": WINDOW, **changes})


def mistral(**changes: Any) -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_llama_like(**changes))).eval()


def phi3() -> nn.Module:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**_llama_like())).eval()


def gemma3(**changes: Any) -> nn.Module:
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**_llama_like(head_dim=8, layer_types=layers, **changes))
    return transformers.Gemma3ForCausalLM(config).eval()


def gemma2(**changes: Any) -> nn.Module:
    layers = ["sliding_attention", "full_attention"]
    own = dict(head_dim=8, layer_types=layers, attn_logit_softcapping=1.5, query_pre_attn_scalar=4)
    config = transformers.Gemma2Config(**_llama_like(**own, **changes))
    return transformers.Gemma2ForCausalLM(config).eval()


def gpt_neo() -> nn.Module:
    config = transformers.GPTNeoConfig(
        **_settings(),
        num_layers=2,
        num_heads=4,
        window_size=WINDOW,
        attention_types=[[["global", "local"], 1]],
    )
    return transformers.GPTNeoForCausalLM(config).eval()


def modernbert() -> nn.Module:
    layers = dict(num_hidden_layers=2, num_attention_heads=4, global_attn_every_n_layers=2)
    special = dict(local_attention=WINDOW, cls_token_id=1, sep_token_id=2, intermediate_size=48)
    return transformers.ModernBertModel(
        transformers.ModernBertConfig(**_settings(**layers, **special))
    ).eval()


def padded(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :5] = 0
    return tokens(2, length), mask


def close(actual: Tensor, wanted: Tensor, mask: Tensor) -> None:
    real = mask[..., None].bool()
    torch.testing.assert_close(actual * real, wanted * real, atol=2e-5, rtol=1e-4)


def converted(model: nn.Module, **settings: Any) -> Any:
    settings = {"mechanism": "augmented", "options": OPTIONS, **settings}
    return lz.linearize(copy.deepcopy(model), **settings)


@pytest.mark.parametrize(
    "make", (mistral, gemma3, *(pytest.param(make, marks=pytest.mark.slow) for make in (phi3, gpt_neo)))
)
@torch.no_grad()
def test_a_decoder_decodes_as_before_beyond_its_window(make: Any) -> None:
    original = make()
    model = converted(original)
    ids, mask = padded()
    wanted = original(ids, attention_mask=mask).logits
    close(model(ids, attention_mask=mask).logits, wanted, mask)
    cache, found = None, []
    for start, stop in ((0, 12), (12, 13), (13, 20), (20, LENGTH)):
        out = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    close(torch.cat(found, 1), wanted, mask)
    settings = dict(max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    expected = original.generate(ids, attention_mask=mask, **settings)
    for more in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        if "num_beams" in more:
            expected = original.generate(ids, attention_mask=mask, **settings, **more)
        out = model.generate(
            ids, attention_mask=mask, **settings, **more, disable_compile=True, return_dict_in_generate=True
        )
        assert torch.equal(out.sequences, expected)
        assert {type(layer).__name__ for layer in out.past_key_values.layers} == {"StateLayer"}


def test_windows_and_full_attention_are_told_apart() -> None:
    sites = {site.path: site.spec.window for site in converted(gemma3())._linearize.plan.sites}
    assert sites == {"model.layers.0.self_attn": WINDOW, "model.layers.1.self_attn": None}


@torch.no_grad()
def test_an_encoder_keeps_its_windows() -> None:
    original = modernbert()
    ids, mask = padded()
    out = converted(original)(ids, attention_mask=mask).last_hidden_state
    close(out, original(ids, attention_mask=mask).last_hidden_state, mask)


@torch.no_grad()
def test_the_full_layers_may_stay_softmax_and_the_windows_with_them() -> None:
    original = gemma3()
    ids, mask = padded()
    wanted = original(ids, attention_mask=mask).logits
    settings = dict(max_new_tokens=STEPS, do_sample=False, eos_token_id=None, disable_compile=True)
    text = original.generate(ids, attention_mask=mask, **settings)
    for layer in (0, 1):
        model = converted(original, layers=(layer,))
        close(model(ids, attention_mask=mask).logits, wanted, mask)
        for more in ({}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(ids, attention_mask=mask, **settings, **more), text)


def test_layers_with_one_mask_are_rewritten_together() -> None:
    with pytest.raises(RefusedError, match="have windows, and only one of them"):
        converted(mistral(), layers=(0,))


@torch.no_grad()
def test_layers_with_a_window_wider_than_ours_stay_as_they_are_and_the_others_are_rewritten() -> None:
    original: Any = gemma3(sliding_window=20)
    told = lz.inspect(original, config={"options": {"window": 8, "salient": 4}})
    assert [row.verdict for row in told.rows] == ["keep", "rewrite"]
    assert "own window of 20 tokens" in told.rows[0].message
    model = converted(original, options={"window": 8, "salient": 4})
    assert [site.path for site in model._linearize.plan.sites] == ["model.layers.1.self_attn"]
    assert [row.verdict for row in lz.inspect(model).rows] == ["converted", "keep"]
    ids = tokens(2, 90)
    text, settings = ids, dict(max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    for _ in range(STEPS):
        text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **settings)
    assert torch.equal(out.sequences, text)
    assert out.past_key_values.layers[0].keys.shape[2] < 20, "such a layer keeps its window alone"
    wider = lz.linearize(model, options={"window": 4, "salient": 4})
    assert [site.path for site in wider._linearize.plan.sites] == ["model.layers.1.self_attn"]


@torch.no_grad()
@pytest.mark.parametrize("window", [6, 20])
def test_capped_scores_are_carried_where_all_is_seen_and_kept_where_a_window_is(window: int) -> None:
    """Gemma 2. Whatever the window of the layers that have one, and whether all tokens fit or not."""
    original: Any = gemma2(sliding_window=window)
    ids = tokens(2, 90)
    fits = converted(original, options={"window": 128, "salient": 4})
    torch.testing.assert_close(fits(ids).logits, original(ids).logits, atol=2e-5, rtol=1e-4)
    model = converted(original, options={"window": 8, "salient": 4})
    assert [site.path for site in model._linearize.plan.sites] == ["model.layers.1.self_attn"]
    text, settings = ids, dict(max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    for _ in range(STEPS):
        text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **settings), text)


def test_a_model_of_nothing_but_wider_windows_is_refused_with_what_would_cover_them() -> None:
    original = mistral(sliding_window=60)
    advice = r'own window of 60 tokens.*options=\{"window": \.\.\.\} as wide'
    with pytest.raises(RefusedError, match=advice):
        converted(original)
    assert converted(original, approximate=("window",))._linearize.plan.sites[0].spec.window == 60
    assert converted(original, options={"window": 59})._linearize.plan.sites[0].spec.window == 60


@torch.no_grad()
def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    model = converted(gemma3())
    model.save_pretrained(tmp_path)
    ids, mask = padded()
    again = lz.load(tmp_path)
    assert torch.equal(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
