"""A converted model trains like any other: new parameters, LoRA, gradient checkpointing, Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from live_models import activations, converted, llama, tokens
from torch import nn
from transformers import Trainer, TrainingArguments

from linearize.convert.linearize import linearize


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "linear_attention" in n}


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, labels=ids, use_cache=False).loss


def test_gradients_reach_old_and_new_parameters() -> None:
    model = converted("llama").train()
    loss_of(model, tokens(2, 12)).backward()
    assert len(new_parameters(model)) == 6  # alpha, local_scale and taps of two layers
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradients_reach_the_parameters_of_a_grafted_model() -> None:
    model = converted("plain").train()
    model(activations()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if "k_proj.bias" not in name:
            assert parameter.grad.abs().sum() > 0, name


def test_a_grafted_model_has_dropout_in_training_only() -> None:
    model = converted("plain")
    x = activations()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_gradients_of_softmax_through_the_seam_equal_the_original_gradients() -> None:
    original, exact = llama().train(), converted("llama", mechanism="softmax").train()
    ids = tokens(2, 12)
    loss_of(original, ids).backward()
    loss_of(exact, ids).backward()
    theirs = dict(exact.named_parameters())
    for name, parameter in original.named_parameters():
        torch.testing.assert_close(theirs[name].grad, parameter.grad, atol=1e-5, rtol=1e-3)


def test_softmax_through_the_seam_drops_as_much_as_the_original_in_training() -> None:
    original = llama(attention_dropout=0.5)
    exact = linearize(llama(attention_dropout=0.5), mechanism="softmax")
    ids, outputs = tokens(2, 12), []
    for model in (original, exact):
        model.train()
        torch.manual_seed(1)
        outputs.append(model(ids).logits)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-4)
    model.eval()
    torch.testing.assert_close(exact(ids).logits, original.eval()(ids).logits, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    ids = tokens(2, 12)
    grads = []
    for checkpointing in (False, True):
        model: Any = converted("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss_of(model, ids).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "plain"])
def test_lora_on_q_proj_added_after_conversion_changes_the_output_and_trains(name: str) -> None:
    model = converted(name)
    inputs = activations() if name == "plain" else tokens(2, 12)
    pick = (lambda out: out) if name == "plain" else (lambda out: out.logits)
    before = pick(model(inputs)).detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[]))
    assert torch.equal(pick(adapted(inputs)), before)  # B starts at zero
    matrices = {n: p for n, p in adapted.named_parameters() if "lora_B" in n}
    assert len(matrices) == 2
    pick(adapted(inputs)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in matrices.values())
    torch.optim.SGD(matrices.values(), lr=1.0).step()
    changed = pick(adapted(inputs))
    assert (changed - before).abs().max() > 1e-4
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(pick(merged(inputs)), changed, atol=1e-5, rtol=1e-4)


def test_lora_added_before_conversion_survives_it() -> None:
    base = llama()
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    linearize(base, mechanism="augmented_paper", group_size=4)
    ids = tokens(2, 12)
    before = adapted(ids).logits.detach()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert (adapted(ids).logits - before).abs().max() > 1e-4


def test_a_peft_model_can_be_converted_as_a_whole() -> None:
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    ids = tokens(2, 12)
    linearize(adapted, {"input_ids": ids}, mechanism="augmented_paper", group_size=4)
    assert len(new_parameters(adapted)) == 6
    out = adapted.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 2 and torch.isfinite(adapted(ids).logits).all()


def test_new_parameters_can_be_saved_with_an_adapter() -> None:
    model = converted("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["linear_attention"])
    adapted = peft.get_peft_model(model, config)
    loss_of(adapted, tokens(2, 12)).backward()
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad and "linear_attention" in n}
    assert len(trained) == 6
    assert all(p.grad is not None for n, p in adapted.named_parameters() if n in trained)


def test_one_trainer_step_changes_the_new_parameters(tmp_path: Path) -> None:
    model = converted("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        gradient_checkpointing=True,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert set(new_parameters(model)) <= set(moved)


def test_compiled_training_equals_eager_training() -> None:
    ids = tokens(2, 12)
    grads = []
    for compiled in (False, True):
        model = converted("llama").train()
        step = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        loss_of(step, ids).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-3)
