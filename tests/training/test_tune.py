"""Tuning: what is trained, what stays, checkpoints, and what happens when a run breaks."""

from __future__ import annotations

import builtins
import errno
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from live_models import bert, converted, llama, snapshot, t5, tokens
from torch import Tensor, nn

import linearize as lz
from linearize.common.checkpoints import newest_checkpoint
from linearize.errors import ConfigError, InputError, InvalidModelError, MissingExtraError, TrainingError
from linearize.training.guarded import GuardedTrainer
from linearize.training.objective import Objective

IDS = tokens(12, 16)
SHORT: dict[str, Any] = dict(context=16, batch_size=4, held_out=0.0)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def counted(model: nn.Module) -> list[bool]:
    """Grows by one with every batch that the model is trained on."""
    found: list[bool] = []
    head = model.get_submodule("lm_head")
    head.register_forward_hook(lambda module, *_: found.append(True) if module.training else None)
    return found


def flags(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def test_lora_trains_projections_and_new_parameters_and_leaves_no_trace() -> None:
    model = converted("llama")
    before, picture, needs = weights(model), snapshot(model), flags(model)
    stage = lz.tune(model, IDS, **SHORT, epochs=10, learning_rate=1e-2)
    assert stage.after < stage.before and stage.steps == 30 and stage.tokens == 10 * IDS.numel()
    assert stage.model is model
    projections = {f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(2) for p in "qkvo"}
    new = {name for name in before if "linear_attention" in name}
    assert moved(model, before) == projections | new
    assert snapshot(model) == picture and flags(model) == needs


def test_the_adapter_can_be_kept_and_merged_later() -> None:
    model, merged = converted("llama"), converted("llama")
    stage: Any = lz.tune(model, IDS, **SHORT, max_steps=3, learning_rate=1e-2, merge=False, lora={"r": 2})
    assert isinstance(stage.model, peft.PeftModel) and stage.model.peft_config["default"].r == 2
    lz.tune(merged, IDS, **SHORT, max_steps=3, learning_rate=1e-2, lora={"r": 2})
    with torch.no_grad():
        wanted = merged(IDS).logits
        torch.testing.assert_close(stage.model.eval()(IDS).logits, wanted, atol=1e-5, rtol=1e-4)
        assert lz.merge(stage.model) is model
        torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=1e-4)


def test_full_tuning_trains_all_that_is_not_frozen() -> None:
    model = converted("llama")
    model.get_parameter("model.norm.weight").requires_grad_(False)
    before, picture, needs = weights(model), snapshot(model), flags(model)
    lz.tune(model, IDS, **SHORT, method="full", max_steps=2)
    assert moved(model, before) == set(before) - {"model.norm.weight"}
    assert snapshot(model) == picture and flags(model) == needs


@pytest.mark.parametrize("method", ("lora", "full"))
def test_new_parameters_learn_at_their_own_rate(method: str) -> None:
    model = converted("llama")
    before = weights(model)
    lz.tune(
        model,
        IDS,
        **SHORT,
        method=method,
        max_steps=2,
        learning_rate=1e-12,
        new_learning_rate=1e-2,
        warmup=0.0,
    )
    for name, value in model.state_dict().items():
        distance = (value - before[name]).abs().max()
        assert (distance > 1e-3) == ("linear_attention" in name), name


def test_a_teacher_is_followed_and_not_changed() -> None:
    teacher, model = llama().train(), converted("llama")
    known, needs = weights(teacher), flags(teacher)
    stage = lz.tune(
        model,
        IDS,
        **SHORT,
        teacher=teacher,
        method="full",
        lm_weight=0.0,
        distill_weight=1.0,
        max_steps=25,
        learning_rate=5e-3,
    )
    assert stage.after < 0.5 * stage.before
    assert not moved(teacher, known) and flags(teacher) == needs
    assert all(module.training for module in teacher.modules())
    with torch.no_grad():
        distance = Objective(True, 0.0, 1.0, teacher=teacher.eval())(model, {"input_ids": IDS})
    assert stage.after == pytest.approx(float(distance), rel=1e-4)


@pytest.mark.parametrize("name", ("bert", "t5"))
def test_encoders_and_pairs(name: str) -> None:
    settings: dict[str, Any] = dict(method="full", epochs=6, batch_size=4, learning_rate=3e-3)
    if name == "bert":
        model, data = converted("bert"), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        stage = lz.tune(model, data, teacher=bert(), distill_weight=1.0, **settings)
    else:
        model = lz.linearize(t5(), mechanism="augmented_paper", group_size=4, approximate=("bias",))
        stage = lz.tune(model, {"input_ids": IDS, "labels": tokens(12, 7)}, **settings)
    assert stage.after < stage.before


def test_accumulated_batches_are_one_larger_batch() -> None:
    one, two = converted("llama"), converted("llama")
    settings: dict[str, Any] = dict(context=16, held_out=0.0, method="full", max_steps=2, learning_rate=1e-3)
    lz.tune(one, IDS, batch_size=4, **settings)
    lz.tune(two, IDS, batch_size=2, gradient_accumulation=2, **settings)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, atol=2e-4, rtol=1e-3)


def test_less_memory_and_half_precision_keep_the_model_as_it_is() -> None:
    plain, spared, half = converted("llama"), converted("llama"), converted("llama")
    picture = snapshot(half)
    settings: dict[str, Any] = dict(**SHORT, method="full", max_steps=2, learning_rate=1e-3)
    lz.tune(plain, IDS, **settings)
    lz.tune(spared, IDS, **settings, gradient_checkpointing=True)
    stage = lz.tune(half, IDS, **settings, bf16=True)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(spared.state_dict()[name], value, atol=2e-4, rtol=1e-3)
    assert snapshot(half) == picture and {p.dtype for p in half.parameters()} == {torch.float32}
    assert stage.after < stage.before


@pytest.mark.parametrize("method", ("lora", "full"))
def test_a_run_goes_on_from_its_newest_whole_checkpoint(method: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(**SHORT, method=method, max_steps=6, save_steps=2, output_dir=tmp_path)
    whole, resumed, again = converted("llama"), converted("llama"), converted("llama")
    first = lz.tune(whole, IDS, **settings, resume=True)  # nothing there yet: from the start
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()  # killed while it was written
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    steps = counted(resumed)
    stage = lz.tune(resumed, IDS, **settings, resume=True)
    assert len(steps) == 2 and same(resumed, whole)
    assert (stage.steps, stage.before, stage.after) == (6, first.before, first.after)
    steps = counted(again)
    lz.tune(again, IDS, **settings, resume=True)  # nothing left to do
    assert not steps and same(again, whole)
    with pytest.raises(ConfigError, match="resume=True, or name another folder"):
        lz.tune(again, IDS, **settings)
    assert same(again, whole)


@pytest.mark.parametrize("method", ("lora", "full"))
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_model_and_checkpoints(
    method: str, tmp_path: Path
) -> None:
    model = converted("llama")
    before, picture, needs = weights(model), snapshot(model), flags(model)
    rates: dict[str, Any] = dict(learning_rate=1e30, max_grad_norm=1e30, schedule="linear", warmup=0.0)
    with pytest.raises(TrainingError, match=r"at step \d.*learning_rate"):
        lz.tune(model, IDS, **SHORT, method=method, max_steps=8, **rates)
    assert not moved(model, before) and snapshot(model) == picture and flags(model) == needs

    calls = []

    def breaks(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        calls.append(module.training)
        return output * torch.nan if sum(calls) == 4 else output

    handle = model.get_submodule("lm_head").register_forward_hook(breaks, with_kwargs=True)
    with pytest.raises(TrainingError, match=r"loss is nan at step 4 \(the checkpoint .*checkpoint-3 is kept"):
        lz.tune(model, IDS, **SHORT, method=method, max_steps=8, save_steps=1, output_dir=tmp_path)
    handle.remove()
    assert not moved(model, before) and flags(model) == needs
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3"}
    lz.tune(model, IDS, **SHORT, method=method, max_steps=8, output_dir=tmp_path, resume=True)
    other = converted("llama")
    lz.tune(other, IDS, **SHORT, method=method, max_steps=8)
    assert same(model, other), "and then it goes on as if nothing had been"


def test_weights_that_are_no_numbers_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = GuardedTrainer._save_checkpoint

    def poisoned(self: Any, model: nn.Module, trial: Any) -> None:
        with torch.no_grad():
            model.get_parameter("model.norm.weight")[0] = torch.nan
        real(self, model, trial)

    monkeypatch.setattr(GuardedTrainer, "_save_checkpoint", poisoned)
    with pytest.raises(TrainingError, match=r"model.norm.weight is no longer finite at step 2"):
        lz.tune(
            converted("llama"), IDS, **SHORT, method="full", max_steps=4, save_steps=2, output_dir=tmp_path
        )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("llama")
    before = weights(model)
    real = GuardedTrainer._save_rng_state

    def full(self: Any, folder: str) -> None:
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, folder)

    monkeypatch.setattr(GuardedTrainer, "_save_rng_state", full)
    settings: dict[str, Any] = dict(
        **SHORT, method="full", max_steps=6, save_steps=2, output_dir=tmp_path, save_total_limit=5
    )
    with pytest.raises(TrainingError, match=r"step 4 cannot be written.*No space left.*resume=True"):
        lz.tune(model, IDS, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}
    assert not moved(model, before)
    monkeypatch.undo()
    lz.tune(model, IDS, **settings, resume=True)
    whole = converted("llama")
    lz.tune(whole, IDS, **{**settings, "output_dir": None})
    assert same(model, whole)


def test_an_interrupt_leaves_the_model_as_it_was() -> None:
    model = converted("llama")
    before, picture = weights(model), snapshot(model)
    count = []

    def interrupt(*_: Any) -> None:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt

    handle = model.get_submodule("lm_head").register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        lz.tune(model, IDS, **SHORT, method="full", max_steps=8)
    handle.remove()
    assert not moved(model, before) and snapshot(model) == picture


def test_settings_beyond_ours_reach_the_trainer(tmp_path: Path) -> None:
    stage = lz.tune(
        converted("llama"),
        IDS,
        **SHORT,
        max_steps=4,
        output_dir=tmp_path,
        trainer_args=dict(save_strategy="steps", save_steps=3, optim="adamw_torch"),
    )
    assert stage.steps == 4 and (tmp_path / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    "settings, match",
    (
        (dict(method="all"), "unknown method 'all'; known: lora, full"),
        (dict(method="full", lora={"r": 2}), "lora= is for method='lora'"),
        (dict(batch=3), "unknown setting 'batch'; did you mean 'batch_size'"),
        (dict(batch_size=0), "batch_size must be an int, 1 or more, got 0"),
        (dict(epochs=0), "epochs must be a number above 0"),
        (dict(learning_rate=0.0), "learning_rate must be a number above 0"),
        (dict(new_learning_rate=float("inf")), "new_learning_rate must be"),
        (dict(warmup=1.0), "warmup must be a share"),
        (dict(held_out=1.0), "held_out must be a share"),
        (dict(save_steps=0), "save_steps must be an int, 1 or more, or None"),
        (dict(resume=True), "resume continues from a checkpoint in output_dir"),
        (dict(distill_weight=1.0), "give teacher="),
        (dict(trainer_args=dict(no_such_thing=1)), "unknown field of TrainingArguments 'no_such_thing'"),
        (dict(schedule="up"), "unknown schedule 'up'; known: linear"),
    ),
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], match: str) -> None:
    model = converted("llama")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=match):
        lz.tune(model, IDS, **settings)
    assert snapshot(model) == before


def test_what_cannot_be_tuned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="not converted"):
        lz.tune(llama(), IDS)
    with pytest.raises(InputError, match="another tokenizer"):
        lz.tune(converted("llama"), IDS + 96)
    frozen = converted("llama").requires_grad_(False)
    with pytest.raises(InvalidModelError, match="no parameter requires gradients"):
        lz.tune(frozen, IDS, method="full")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        lz.tune(converted("llama"), IDS, output_dir=tmp_path / "file" / "folder")


def test_without_accelerate_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "accelerate":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    model = converted("llama")
    before = snapshot(model)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"linearize\[train\]"):
        lz.tune(model, IDS, method="full")
    assert snapshot(model) == before
