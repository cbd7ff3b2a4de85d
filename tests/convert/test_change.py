"""A converted model that changes its settings is the model that a first conversion by them makes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import activations, bart, converted, llama, plain, snapshot, tokens, wake
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import linearize as lz
from linearize.errors import ConfigError, InputError, InvalidModelError, RefusedError, VerificationError
from linearize.mechanisms.module import AttentionModule
from linearize.planning.state import state_of

MASK = torch.ones(2, 9, dtype=torch.long)
MASK[0, :4] = 0


@torch.no_grad()
def output(model: Any) -> Tensor:
    """On two rows, of which one is padded on the left where the model takes a mask."""
    if not hasattr(model, "config"):
        return model(activations())
    if model.config.is_encoder_decoder:
        return model(tokens(2, 11), decoder_input_ids=tokens(2, 9)).logits
    return model(tokens(2, 9), attention_mask=MASK, use_cache=False).logits * MASK[..., None]


def decoded(model: Any) -> Tensor:
    return model.generate(
        tokens(2, 9), attention_mask=MASK, max_new_tokens=6, do_sample=False, eos_token_id=None
    )


@pytest.mark.parametrize(
    ("name", "first", "then"),
    [
        ("llama", {"mechanism": "augmented_paper"}, {"mechanism": "augmented", "options": {"window": 4}}),
        ("llama", {"mechanism": "hedgehog"}, {"mechanism": "softmax"}),
        ("llama", {"mechanism": "softmax"}, {"mechanism": "softmax_window"}),
        ("llama", {"mechanism": "augmented"}, {"keep_softmax": (0,)}),
        ("llama", {"mechanism": "augmented"}, {"mechanism": "relu", "layers": (1,)}),
        pytest.param(
            "bart",
            {"mechanism": "augmented"},
            {"mechanism": "softmax_window", "on_refusal": "keep"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "windowed",
            {"mechanism": "softmax"},
            {"mechanism": "relu", "approximate": ("window",)},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "plain",
            {"mechanism": "augmented"},
            {"mechanism": "hedgehog", "augmentation": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "plain", {"mechanism": "augmented"}, {"keep_softmax": ("blocks.1",)}, marks=pytest.mark.slow
        ),
    ],
)
def test_it_is_what_a_first_conversion_makes(name: str, first: Any, then: Any) -> None:
    inputs = activations() if name == "plain" else None
    make: Any = {"llama": llama, "windowed": windowed, "bart": bart, "plain": plain}[name]
    changed = lz.linearize(make(), inputs, **first)
    assert lz.linearize(changed, inputs, **then) is changed
    wanted = lz.linearize(make(), inputs, **{"mechanism": first["mechanism"], **then})
    assert state_of(changed).config == state_of(wanted).config
    assert state_of(changed).plan.sites == state_of(wanted).plan.sites
    assert state_of(changed).plan.compact_masks == state_of(wanted).plan.compact_masks
    assert {s.path for s in state_of(changed).plan.skipped} == {s.path for s in state_of(wanted).plan.skipped}
    wake(wanted)
    changed.load_state_dict(wanted.state_dict())
    assert torch.equal(output(changed), output(wanted))
    if name in ("llama", "windowed"):
        assert torch.equal(decoded(changed), decoded(wanted))


def test_back_to_softmax_it_is_the_original_with_padding_and_a_cache() -> None:
    model: Any = lz.linearize(llama(), mechanism="hedgehog")
    original: Any = llama()
    assert (output(model) - output(original)).abs().max() > 1e-3
    lz.linearize(model, mechanism="softmax")
    # Square masks again: what stays softmax follows them to the letter.
    assert model.config._attn_implementation == original.config._attn_implementation
    assert torch.allclose(output(model), output(original), atol=1e-5)
    assert torch.equal(decoded(model), decoded(original))


def test_a_layer_that_becomes_softmax_again_is_untouched_transformers_code() -> None:
    model: Any = lz.linearize(llama(), mechanism="augmented")
    lz.linearize(model, keep_softmax=(0,))
    owner = model.model.layers[0].self_attn
    assert type(owner) is LlamaAttention and not any(isinstance(m, AttentionModule) for m in owner.modules())
    assert owner.config._attn_implementation == model.config._attn_implementation == "sdpa"
    alone = model.generate(tokens(2, 9)[:1, 4:], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(decoded(model)[0, 9:], alone[0, 5:])


def test_nothing_is_searched_or_exported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("llama")

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("searched")

    for name in ("capture", "find_attention", "record"):
        monkeypatch.setattr(f"linearize.convert.linearize.{name}", never)
    lz.linearize(model, mechanism="relu")
    assert state_of(model).config.mechanism == "relu"


def test_settings_that_are_not_named_stay_and_those_of_the_mechanism_go_with_it() -> None:
    settings = dict(mechanism="augmented", conv_taps=3, options={"window": 5}, keep_softmax=(0,))
    model = lz.linearize(llama(), **settings)
    lz.linearize(model, augmentation=False)
    config = state_of(model).config
    assert config.options == {"window": 5} and config.keep_softmax == (0,) and not config.augments
    lz.linearize(model, mechanism="hedgehog")
    config = state_of(model).config
    assert config.options == {} and config.augmentation is None
    assert config.keep_softmax == (0,) and config.conv_taps == 3


def test_new_parameters_are_fresh_and_old_figures_are_gone(tmp_path: Path) -> None:
    model: Any = converted("llama")
    lz.evaluate(model, tokens(1, 40), lengths=(8,), speed=False).attach(model)
    lz.linearize(model, group_size=8)
    assert not state_of(model).measured and "measured" not in model.config.linearize
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("conv_weight"))
    weights = {n: p for n, p in model.named_parameters() if "linear_attention" not in n}
    for name, weight in llama().named_parameters():
        assert torch.equal(weights[name], weight)
    loaded = lz.load(lz.save(wake(model), tmp_path / "model"))
    assert state_of(loaded).config == state_of(model).config and state_of(loaded).config.group_size == 8
    assert torch.equal(output(loaded), output(model))
    lz.linearize(loaded, mechanism="softmax")
    assert torch.allclose(output(loaded), output(llama()), atol=1e-5)


def test_batches_calibrate_what_it_became() -> None:
    model = converted("llama")
    lz.linearize(model, group_size=4, calibrate=[tokens(2, 40)])
    assert any(p.any() for n, p in model.named_parameters() if n.endswith("conv_weight"))


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def windowed() -> nn.Module:
    torch.manual_seed(0)
    settings = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=40)
    return MistralForCausalLM(MistralConfig(**settings, **heads)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "settings", "error", "match"),
    [
        (lambda: converted("llama"), {}, InvalidModelError, "already linearized; name the settings"),
        (lambda: converted("llama", keep_softmax=(0,)), {"keep_softmax": ()}, InvalidModelError, "layers.0"),
        (lambda: converted("llama"), {"layers": (7,)}, RefusedError, "no attention is there"),
        (lambda: converted("llama"), {"mechanism": "linformer"}, RefusedError, "cannot carry causal"),
        (lambda: converted("llama"), {"mechanism": "magic"}, ConfigError, "magic"),
        (lambda: converted("llama"), {"options": {"window": -1}}, ConfigError, "window"),
        (lambda: converted("plain"), {"mechanism": "relu"}, InputError, "linearize\\(model, inputs\\)"),
        (
            lambda: lz.linearize(windowed(), mechanism="softmax"),
            {"mechanism": "relu"},
            RefusedError,
            "no attention is left to rewrite: .* own window of 40 tokens",
        ),
        (
            lambda: converted("bart", mechanism="softmax_window", on_refusal="keep"),
            {"mechanism": "relu", "on_refusal": "error"},
            InvalidModelError,
            "encoder_attn",
        ),
    ],
)
def test_what_cannot_change_is_one_clear_error_and_nothing_changes(
    build: Any, settings: Any, error: type[Exception], match: str
) -> None:
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        lz.linearize(model, **settings)
    assert snapshot(model) == before


def test_a_change_that_is_stopped_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lz.linearize(llama(), mechanism="augmented")
    before, wanted = snapshot(model), decoded(model)
    monkeypatch.setattr("linearize.convert.change.verify_cache", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        lz.linearize(model, mechanism="softmax", keep_softmax=(0,))
    assert snapshot(model) == before and torch.equal(decoded(model), wanted)


def test_a_mechanism_that_decodes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize.mechanisms.augmented import AugmentedAttention

    model = converted("llama")
    real = AugmentedAttention.extend
    monkeypatch.setattr(AugmentedAttention, "extend", lambda *args, **more: real(*args, **more) * 2)
    before = snapshot(model)
    with pytest.raises(VerificationError, match="decoding with a cache"):
        lz.linearize(model, mechanism="augmented")
    assert snapshot(model) == before


def test_adapters_stay_and_those_that_hold_new_parameters_are_merged_first() -> None:
    peft = pytest.importorskip("peft")
    base = converted("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(InvalidModelError, match="wraps a model that is already linearized"):
        lz.linearize(model, mechanism="softmax")
    lz.linearize(model.get_base_model(), mechanism="softmax")
    plain_model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    adapter = peft.get_peft_model_state_dict(model)
    assert adapter
    peft.set_peft_model_state_dict(plain_model, adapter)
    assert torch.allclose(output(model), output(plain_model), atol=1e-5)

    trained = peft.get_peft_model(converted("llama"), lz.lora_config(converted("llama")))
    inside = trained.get_base_model()
    with pytest.raises(InvalidModelError, match="linearize.merge"):
        lz.linearize(inside, mechanism="softmax")
    merged = lz.merge(trained)
    lz.linearize(merged, mechanism="softmax")
    assert torch.allclose(output(merged), output(llama()), atol=1e-5)


def test_a_copy_changes_alone() -> None:
    model = lz.linearize(llama(), mechanism="augmented")
    wanted = output(model)
    lz.linearize(copy.deepcopy(model), mechanism="relu")
    assert torch.equal(output(model), wanted) and state_of(model).config.mechanism == "augmented"


def test_training_flags_and_random_state_are_left_alone() -> None:
    model: Any = lz.linearize(plain(), activations()).train()
    model.blocks[0].eval()
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    lz.linearize(model, activations(), mechanism="relu")
    assert torch.equal(torch.rand(3), wanted)
    assert model.training and not model.blocks[0].linear_attention.training
    assert model.blocks[1].linear_attention.training
