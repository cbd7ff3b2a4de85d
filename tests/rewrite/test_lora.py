"""LoRA on converted models: adapters hold the new parameters, and merging keeps them."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from live_models import activations, converted, llama, recompute, snapshot, tokens
from torch import Tensor, nn

import linearize as lz
from linearize.errors import InvalidModelError, MissingExtraError


def new_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if "linear_attention" in n}


@torch.no_grad()
def trained(model: Any, names: tuple[str, ...] = ("lora_", "modules_to_save")) -> Any:
    """Every parameter whose name has one of `names` moves, as training would do it; evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=tokens(2, 21)).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def restores(model: nn.Module, folder: Path) -> None:
    """Saved as a converted checkpoint, it comes back bit for bit, with no trace of PEFT."""
    again = lz.load(lz.save(model, folder))
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after) and not [name for name in after if "lora" in name]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_holds_the_new_parameters_and_comes_back_the_same(tmp_path: Path) -> None:
    base = converted("llama")
    adapted = trained(peft.get_peft_model(base, lz.lora_config(base)))
    assert (logits(adapted) - logits(converted("llama"))).abs().max() > 0.1
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(converted("llama"), tmp_path).eval()
    assert torch.equal(logits(again), logits(adapted))
    merged = lz.merge(again)
    for name, value in new_parameters(merged).items():
        assert not torch.equal(value, converted("llama").get_parameter(name)), name


def test_training_with_the_config_moves_projections_and_new_parameters_only() -> None:
    base = converted("llama")
    adapted: Any = peft.get_peft_model(base, lz.lora_config(base, modules_to_save=["embed_tokens"]))
    adapted(tokens(2, 12), labels=tokens(2, 12), use_cache=False).loss.backward()
    moved = {name for name, p in adapted.named_parameters() if p.grad is not None and p.requires_grad}
    projections = {f"layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"}
    adapters = {name.split(".lora_")[0] for name in moved if "lora_" in name}
    assert adapters == {f"base_model.model.model.{name}" for name in projections}
    assert sum("linear_attention.modules_to_save" in name for name in moved) == 6
    assert sum("embed_tokens.modules_to_save" in name for name in moved) == 1 and len(moved) == 16 + 6 + 1


def test_an_adapted_model_keeps_a_constant_state_and_the_base_under_it_its_own() -> None:
    base = converted("llama")
    ids = tokens(1, 11)
    settings = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
    plain = base.generate(ids, **settings).sequences
    adapted: Any = trained(peft.get_peft_model(base, lz.lora_config(base)))
    out = adapted.generate(input_ids=ids, **settings)
    assert {type(layer).__name__ for layer in out.past_key_values.layers} == {"StateLayer"}
    assert torch.equal(out.sequences, recompute(adapted, ids, 12))
    speculation = lz.TreeSpeculation(lz.PromptLookup())
    drafted = adapted.generate(input_ids=ids, **settings, speculative=speculation)
    assert torch.equal(drafted.sequences, out.sequences)
    with adapted.disable_adapter():
        assert torch.equal(adapted.generate(input_ids=ids, **settings).sequences, plain)
    assert torch.equal(lz.merge(adapted).generate(ids, **settings).sequences, out.sequences)
    assert not torch.equal(plain, out.sequences)


def test_names_that_the_attention_shares_with_the_rest_of_a_layer_are_told_apart() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = lz.linearize(GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4)).eval())
    config = lz.lora_config(model, r=2)
    assert config.target_modules == {"attn.c_attn", "attn.c_proj"}
    assert config.r == 2 and config.lora_alpha == 16 and config.modules_to_save == ["linear_attention"]


def test_merging_keeps_what_modules_to_save_trained(tmp_path: Path) -> None:
    base = converted("llama")
    adapted = trained(peft.get_peft_model(base, lz.lora_config(base)))
    wanted, taught = logits(adapted), {n: p.clone() for n, p in new_parameters(adapted).items()}
    merged = lz.merge(adapted)
    assert merged is base
    close(logits(merged), wanted)
    for name, value in new_parameters(merged).items():
        stem, leaf = name.rsplit(".", 1)
        assert torch.equal(value, taught[f"base_model.model.{stem}.modules_to_save.default.{leaf}"])
    restores(merged, tmp_path)


def test_merging_keeps_what_was_trained_directly(tmp_path: Path) -> None:
    base = converted("llama")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    trained(adapted, ("lora_", "linear_attention"))
    wanted, taught = logits(adapted), {n: p.clone() for n, p in new_parameters(adapted).items()}
    merged = lz.merge(adapted)
    close(logits(merged), wanted)
    for name, value in new_parameters(merged).items():
        assert torch.equal(value, taught[f"base_model.model.{name}"])
    restores(merged, tmp_path)


@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.slow), False])
def test_lora_from_before_the_conversion_merges_too(whole: bool, tmp_path: Path) -> None:
    base = llama()
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    if whole:
        lz.linearize(adapted, {"input_ids": tokens(2, 12)}, mechanism="augmented_paper", group_size=4)
    else:
        lz.linearize(base, mechanism="augmented_paper", group_size=4)
    trained(adapted, ("lora_", "linear_attention"))
    wanted = logits(adapted)
    merged = lz.merge(adapted)
    close(logits(merged), wanted)
    restores(merged, tmp_path)
    ids = tokens(1, 9)
    out = merged.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert type(out.past_key_values.layers[0]).__name__ == "StateLayer"


def test_the_shipped_decoder_merges_and_generates_the_same_text(tmp_path: Path) -> None:
    model, tokenizer = lz.load_demo()
    base = lz.linearize(model)
    adapted = trained(peft.get_peft_model(base, lz.lora_config(base)), ("lora_B", "modules_to_save"))
    ids = tokenizer("def main(", return_tensors="pt").input_ids
    settings = dict(max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():
        wanted, text = adapted(input_ids=ids).logits, adapted.generate(input_ids=ids, **settings)
        merged = lz.merge(adapted)
        scale = wanted.abs().max()
        assert (merged(input_ids=ids).logits - wanted).abs().max() <= 1e-5 * scale
        assert torch.equal(merged.generate(ids, **settings), text)
        again = lz.load(lz.save(merged, tmp_path))
        assert torch.equal(again(input_ids=ids).logits, merged(input_ids=ids).logits)


def test_a_plain_module_with_lora_merges_as_well() -> None:
    base = converted("plain")
    adapted = trained(peft.get_peft_model(base, lz.lora_config(base)))
    x = activations()
    with torch.no_grad():
        wanted = adapted(x)
        close(lz.merge(adapted)(x), wanted)


def test_what_cannot_be_merged_is_refused_and_stays_as_it_was() -> None:
    with pytest.raises(InvalidModelError, match="peft.PeftModel, got LlamaForCausalLM"):
        lz.merge(converted("llama"))
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InvalidModelError, match="not converted"):
        lz.merge(adapted)
    with pytest.raises(InvalidModelError, match="not converted"):
        lz.lora_config(llama())
    base = converted("llama")
    with pytest.raises(InvalidModelError, match=r"wraps a converted model.*linearize.merge.model."):
        lz.save(peft.get_peft_model(base, lz.lora_config(base)), "nowhere")
    prompt = peft.get_peft_model(
        converted("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(InvalidModelError, match="cannot be merged: PROMPT_TUNING adds no weights"):
        lz.merge(prompt)
    base = converted("llama")
    biased = peft.get_peft_model(base, lz.lora_config(base, lora_bias=True))
    wanted, before = logits(biased), snapshot(biased)
    with pytest.raises(InvalidModelError, match="cannot be merged: .*lora_bias"):
        lz.merge(biased)
    assert snapshot(biased) == before and torch.equal(logits(biased), wanted)


def test_a_merge_that_fails_midway_changes_nothing() -> None:
    base = converted("llama")
    adapted = trained(peft.get_peft_model(base, lz.lora_config(base)))
    broken = adapted.get_parameter("base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight")
    kept = broken.detach().clone()
    wanted, before = logits(adapted), snapshot(adapted)
    values = {name: value.clone() for name, value in adapted.state_dict().items()}
    with torch.no_grad():
        broken[0, 0] = torch.nan
    with pytest.raises(InvalidModelError, match="cannot be merged.*NaN"):
        lz.merge(adapted)
    with torch.no_grad():
        broken.copy_(kept)
    assert snapshot(adapted) == before and torch.equal(logits(adapted), wanted)
    assert all(torch.equal(value, values[name]) for name, value in adapted.state_dict().items())
    close(logits(lz.merge(adapted)), wanted)


def test_without_peft_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (lz.merge, lz.lora_config):
        with pytest.raises(MissingExtraError, match=r"linearize\[train\]"):
            call(converted("llama"))
