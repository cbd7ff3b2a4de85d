"""Attention transfer: it lowers what it says it lowers, and touches nothing but the new parameters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import activations, converted, llama, snapshot, tokens
from torch import Tensor, nn

import linearize as lz
from linearize.calibration.observers import Observation, watching
from linearize.errors import ConfigError, InputError, InvalidModelError, TrainingError
from linearize.mechanisms.module import AttentionModule
from linearize.planning.state import state_of


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def flags(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def ids(count: int = 16, length: int = 20) -> Tensor:
    return tokens(count, length)


def test_it_lowers_the_distance_and_changes_new_parameters_alone() -> None:
    model = converted("llama", mechanism="hedgehog")
    model.get_submodule("model.norm").requires_grad_(False)  # type: ignore[operator]
    before, picture, needs = weights(model), snapshot(model), flags(model)
    stage = lz.transfer(model, ids(), context=20, epochs=8)
    assert stage.after < 0.9 * stage.before
    assert stage.name == "transfer" and stage.steps == 32 and stage.tokens == 15 * 20 * 8
    assert snapshot(model) == picture and flags(model) == needs
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("linear_attention" not in name), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ("llama", "bert"))
def test_the_loss_is_the_squared_relative_error_of_every_site(name: str) -> None:
    """|linear - softmax|^2 / |softmax|^2 of each site, on what it gets in the original."""
    rows = {"input_ids": ids(4)}
    stage = lz.transfer(converted(name), rows, max_steps=1, learning_rate=1e-12, held_out=0.0, batch_size=4)
    model, found = converted(name), list[float]()

    class Errors:
        def __init__(self, module: Any) -> None:
            self.module = module

        def see(self, call: Observation) -> None:
            out = self.module(call.query, call.key, call.value, key_mask=call.key_mask)
            found.append(float((out - call.target).square().sum() / call.target.square().sum()))

    sites = state_of(model).plan.sites
    with torch.no_grad(), watching(model, {s: Errors(model.get_submodule(s.name)) for s in sites}):
        model.eval()(**rows)
    assert len(found) == len(sites)
    assert stage.before == pytest.approx(sum(found), rel=1e-4)
    assert stage.after == pytest.approx(stage.before, rel=1e-4)


def test_padding_changes_nothing() -> None:
    short = ids(4)
    mask = torch.cat([torch.ones_like(short), torch.zeros(4, 7, dtype=torch.long)], 1)
    padded = {"input_ids": torch.nn.functional.pad(short, (0, 7), value=5), "attention_mask": mask}
    settings: dict[str, Any] = dict(max_steps=3, held_out=0.0, batch_size=4)
    plain, filled = converted("llama"), converted("llama")
    one, other = lz.transfer(plain, {"input_ids": short}, **settings), lz.transfer(filled, padded, **settings)
    assert one.before == pytest.approx(other.before, rel=1e-5)
    assert one.tokens == other.tokens == 4 * 20 * 3
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(filled.state_dict()[name], value, atol=1e-4, rtol=1e-4)


PAIRS = {"input_ids": ids(8), "attention_mask": torch.ones(8, 20).long(), "labels": tokens(8, 11)}


@pytest.mark.parametrize(
    "name, data, sites",
    (
        ("bert", {"input_ids": ids(8), "labels": torch.zeros(8).long()}, 2),
        ("bart", PAIRS, 5),
        ("gptj", {"input_ids": ids(8)}, 1),
        ("plain", {"x": activations(8, 20)}, 2),
    ),
)
def test_encoders_pairs_and_grafts(name: str, data: Any, sites: int) -> None:
    model = converted(name)
    children = {n: m for n, m in model.named_modules() if isinstance(m, AttentionModule)}
    assert len(children) == sites
    before = {n: {k: p.clone() for k, p in m.named_parameters()} for n, m in children.items()}
    stage = lz.transfer(model, data, epochs=6)
    assert stage.after < 0.9 * stage.before
    assert {n: m for n, m in model.named_modules() if isinstance(m, AttentionModule)} == children
    for n, module in children.items():
        assert any(not torch.equal(p, before[n][k]) for k, p in module.named_parameters()), n


def test_the_softmax_that_is_matched_drops_nothing() -> None:
    dropping, plain = converted("bart"), converted("bart")
    for module in plain.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    for model in (dropping, plain):
        lz.transfer(model, PAIRS, max_steps=2, held_out=0.0, warmup=0.0)
    for name, value in plain.state_dict().items():
        assert torch.equal(dropping.state_dict()[name], value), name


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(context=20, max_steps=6, save_steps=3, output_dir=tmp_path)
    whole, resumed = converted("llama"), converted("llama")
    lz.transfer(whole, ids(), **settings)
    stored = (tmp_path / "checkpoint-3" / "model.safetensors").stat().st_size
    assert stored < 4 * sum(p.numel() for p in whole.parameters()) / 2, "only what is trained is stored"
    shutil.rmtree(tmp_path / "checkpoint-6")
    batches: list[bool] = []
    resumed.register_forward_hook(lambda *_: batches.append(torch.is_grad_enabled()))
    stage = lz.transfer(resumed, ids(), **settings, resume=True)
    assert stage.steps == 6 and len(batches) == 3 + 2, "three steps, and the loss before and after"
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_what_goes_wrong_leaves_the_model_as_it_was() -> None:
    model = converted("llama").train()
    before, picture, needs = weights(model), snapshot(model), flags(model)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d.*learning_rate"):
        lz.transfer(model, ids(), context=20, max_steps=8, learning_rate=1e30)
    assert snapshot(model) == picture and flags(model) == needs
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "make, data, settings, error, match",
    (
        (llama, ids(), {}, InvalidModelError, "not converted"),
        (lambda: converted("llama", mechanism="softmax"), ids(), {}, InvalidModelError, "no parameters"),
        (lambda: converted("llama"), ids() + 96, {}, InputError, "another tokenizer"),
        (lambda: converted("llama"), ids(), dict(learning_rat=1), ConfigError, "mean 'learning_rate'"),
        (lambda: converted("llama"), ids(), dict(learning_rate=-1.0), ConfigError, "learning_rate must be"),
        (lambda: converted("bart"), {"input_ids": ids(2)[:, :0]}, {}, InputError, "empty|first axis"),
    ),
)
def test_what_cannot_be_transferred_is_refused(
    make: Any, data: Any, settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        lz.transfer(make(), data, **settings)
