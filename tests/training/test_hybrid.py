"""Hybrids: figures are those of models that a user gets, and the model asked about stays as it was."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import activations, bart, bert, llama, plain, snapshot, tokens
from rich.console import Console
from torch import Tensor, nn
from transformers import DynamicCache

import linearize as lz
from linearize.errors import ConfigError, InputError, InvalidModelError, NoAttentionError
from linearize.planning.config import LinearizeConfig
from linearize.planning.state import state_of
from linearize.training.hybrid import _most
from linearize.training.layers import Meter
from linearize.training.sensitivity import Sensitivity

PATHS = [f"model.layers.{i}.self_attn" for i in range(4)]

PAPER: dict[str, Any] = {"mechanism": "augmented_paper"}


def decoder() -> nn.Module:
    """Four layers, of which the second matters little and the third much."""
    model: Any = llama(num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight *= 0.05
        model.model.layers[2].self_attn.q_proj.weight *= 3
    return model


def batches(count: int = 3) -> list[Tensor]:
    return [tokens(2, 20 + i) for i in range(count)]


def kl(original: nn.Module, model: nn.Module, ids: list[Any]) -> float:
    """Mean over real positions, as a user would work it out."""
    total, count = 0.0, 0
    for batch in ids:
        inputs = batch if isinstance(batch, dict) else {"input_ids": batch}
        with torch.no_grad():
            p, q = (m(**inputs).logits.double().log_softmax(-1) for m in (original, model))
        terms = (p.exp() * (p - q)).sum(-1)
        mask = inputs.get("attention_mask", torch.ones(terms.shape)).bool()
        total, count = total + float(terms[mask].sum()), count + int(mask.sum())
    return total / count


def converted_with(model: nn.Module, keep: Any, ids: list[Any], **settings: Any) -> nn.Module:
    linear = lz.linearize(copy.deepcopy(model), keep_softmax=tuple(keep), **settings)
    lz.calibrate(linear, ids, sequential=False)
    return linear


class Asked:
    """A plan for two layers of the decoder, and what models that keep other layers are worth."""

    def __init__(self) -> None:
        self.model, self.ids = decoder(), batches()
        self.found = lz.plan(self.model, self.ids, budget=2, **PAPER, group_size=8)
        self.known: dict[frozenset[int], float] = {}

    def keeping(self, *layers: int) -> float:
        """Of a model that was converted so; each is converted once."""
        kept = frozenset(layers)
        if kept not in self.known:
            linear = converted_with(self.model, sorted(kept), self.ids, **PAPER, group_size=8)
            self.known[kept] = kl(self.model, linear, self.ids)
        return self.known[kept]


@pytest.fixture(scope="module")
def asked() -> Asked:
    return Asked()


def test_every_figure_is_that_of_a_model_converted_so(asked: Asked) -> None:
    model, ids, found = asked.model, asked.ids, asked.found
    assert found.measure == "kl" and found.calibrated and found.tokens == 2 * (20 + 21 + 22)
    assert [layer.path for layer in found.layers] == PATHS and [x.keep for x in found.layers] == [0, 1, 2, 3]
    for layer in (found.layers[0], found.layers[2]):
        alone = asked.keeping(*{0, 1, 2, 3} - {layer.keep})
        assert layer.alone == pytest.approx(alone, rel=1e-3)
    assert [len(choice.kept) for choice in found.choices] == [0, 1, 2]
    assert found.choices[0].divergence == pytest.approx(asked.keeping(), rel=1e-3)
    linear = lz.linearize(copy.deepcopy(model), config=found.config)
    lz.calibrate(linear, ids, sequential=False)
    assert found.divergence == pytest.approx(kl(model, linear, ids), rel=1e-3)
    assert found.config.group_size == 8
    left = {skip.path for skip in state_of(linear).plan.skipped}
    assert left == set(found.kept) and len(left) == 2


def test_the_layer_given_back_is_the_one_that_helps_most(asked: Asked) -> None:
    found = asked.found
    best = min(range(4), key=asked.keeping)
    assert found.choices[1].kept == (PATHS[best],)
    second = min({0, 1, 2, 3} - {best}, key=lambda layer: asked.keeping(best, layer))
    assert set(found.choices[2].kept) == {PATHS[best], PATHS[second]}
    divergences = [choice.divergence for choice in found.choices]
    assert divergences[0] > divergences[1] > divergences[2]


def state_bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def unchanged(model: nn.Module, before: Any, bits: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    same = all(torch.equal(now[name], x) for name, x in bits.items())
    return snapshot(model) == before and now.keys() == bits.keys() and same


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = llama().train()
    model.get_submodule("model.layers.1").eval()
    before, bits = snapshot(model), state_bits(model)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    lz.plan(model, batches(1), budget=1, **PAPER, group_size=8)
    assert torch.equal(torch.rand(3), expected)
    assert unchanged(model, before, bits)
    assert not any(p.grad is not None for p in model.parameters())
    lz.linearize(model)  # as any model that was never touched


@pytest.mark.parametrize("at", (1, 9))
def test_whatever_stops_it_leaves_the_model_as_it_was(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    before, bits = snapshot(model), state_bits(model)
    calls = itertools.count(1)
    real = Meter._output

    def stop(*args: Any) -> Tensor:
        if next(calls) == at:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(Meter, "_output", stop)
    with pytest.raises(KeyboardInterrupt):
        lz.plan(model, batches(1), budget=2, **PAPER, group_size=8)
    assert unchanged(model, before, bits)


def test_batches_that_do_not_run_are_refused_and_change_nothing() -> None:
    model = llama()
    before, bits = snapshot(model), state_bits(model)
    wrong = {"input_ids": tokens(1, 9) + 1000}
    padding = {"input_ids": tokens(1, 9), "attention_mask": torch.zeros(1, 9, dtype=torch.int64)}
    for given, words in (
        ([], "no batch"),
        ([torch.zeros(0, 4, dtype=torch.int64)], "a batch is empty"),
        ([wrong], "does not run on a batch"),
        ([padding], "nothing but padding"),
    ):
        with pytest.raises(InputError, match=words):
            lz.plan(model, given, budget=1, **PAPER, group_size=8)
        assert unchanged(model, before, bits)
    with torch.no_grad():
        model.get_submodule("lm_head").weight[0, 0] = math.nan
    with pytest.raises(InputError, match="gives NaN"):
        lz.plan(model, batches(1), budget=1, **PAPER, group_size=8)


def test_a_budget_is_a_number_of_layers_or_a_share_rounded_down() -> None:
    for budget, kept in ((0, 0), (1, 1), (0.0, 0), (0.49, 1), (0.5, 2), (0.99, 3), (3, 3)):
        assert _most(budget, None, 4) == kept
    found = lz.plan(decoder(), batches(1), budget=0.74, **PAPER, group_size=8)
    assert len(found.kept) == 2 == len(found.config.keep_softmax) == len(found.choices) - 1


def test_a_search_by_ranking_gives_back_in_the_order_of_what_layers_cost_alone() -> None:
    model, ids = decoder(), batches(1)
    passes = []
    handle = model.get_submodule("lm_head").register_forward_hook(lambda *_: passes.append(1))
    calls = []
    for search in ("greedy", "ranking"):
        found = lz.plan(model, ids, budget=2, **PAPER, group_size=8, search=search)
        calls.append(len(passes))
        passes.clear()
    handle.remove()
    # Both: the original, each layer alone, none. Then the original and 4, the original and 3; or 1 each time.
    assert calls[0] - calls[1] == 5
    costs = sorted(found.layers, key=lambda layer: -layer.alone)
    assert [set(choice.kept) for choice in found.choices] == [{x.path for x in costs[:n]} for n in range(3)]
    linear = lz.linearize(copy.deepcopy(model), config=found.config)
    lz.calibrate(linear, ids, sequential=False)
    assert found.divergence == pytest.approx(kl(model, linear, ids), rel=1e-3)


def test_limits_that_make_no_sense_are_refused() -> None:
    model = decoder()
    for limits, words in (
        ({}, "one of the two, or state_bytes"),
        (dict(budget=1, max_divergence=0.1), "one of the two"),
        (dict(budget=4), "leaves none of 4 layers"),
        (dict(budget=1.0), "budget must be"),
        (dict(budget=-1), "budget must be"),
        (dict(budget=True), "budget must be"),
        (dict(budget="1"), "budget must be"),
        (dict(max_divergence=0), "above 0"),
        (dict(max_divergence=math.nan), "above 0"),
        (dict(max_divergence=1e-12), "cannot be reached: with 3 of 4"),
        (dict(budget=1, max_tokens=0), "max_tokens"),
        (dict(budget=1, mechanism="nothing"), "unknown mechanism"),
        (dict(budget=1, search="all"), "search must be"),
    ):
        with pytest.raises(ConfigError, match=words):
            lz.plan(model, batches(1), **PAPER | limits)
    with pytest.raises(InvalidModelError, match="already linearized"):
        lz.plan(lz.linearize(llama()), batches(1), budget=1)
    with pytest.raises(NoAttentionError):
        lz.plan(nn.Sequential(nn.Linear(4, 4)), batches(1), budget=1, inputs=torch.ones(1, 4))


def test_a_divergence_to_reach_takes_as_few_layers_as_do() -> None:
    model, ids = decoder(), batches(1)
    steps = [choice.divergence for choice in lz.plan(model, ids, budget=3, **PAPER, group_size=8).choices]
    for count in (0, 2):
        found = lz.plan(model, ids, max_divergence=steps[count] * 1.001, **PAPER, group_size=8)
        assert len(found.kept) == count and found.divergence == pytest.approx(steps[count])


def test_layers_that_the_config_leaves_are_none_of_the_budget() -> None:
    config = LinearizeConfig(mechanism="augmented_paper", group_size=8, keep_softmax=("model.layers.2",))
    found = lz.plan(decoder(), batches(1), budget=1, config=config)
    assert [layer.keep for layer in found.layers] == [0, 1, 3]
    assert found.config.keep_softmax[0] == "model.layers.2" and len(found.config.keep_softmax) == 2


def test_padding_counts_for_nothing() -> None:
    model, ids = llama(), tokens(1, 12)
    padded = torch.nn.functional.pad(ids, (0, 5), value=7)
    mask = torch.ones_like(padded)
    mask[:, 12:] = 0
    plain_, with_padding = (
        lz.plan(model, [batch], budget=1, **PAPER, group_size=8)
        for batch in (ids, {"input_ids": padded, "attention_mask": mask})
    )
    assert with_padding.tokens == plain_.tokens == 12 and with_padding.kept == plain_.kept
    for one, other in zip(plain_.choices, with_padding.choices, strict=True):
        assert one.divergence == pytest.approx(other.divergence, rel=1e-3)


def test_divergence_is_measured_on_no_more_than_asked_for_and_batches_may_come_from_a_generator() -> None:
    found = lz.plan(llama(), (x for x in batches(3)), budget=1, **PAPER, group_size=8, max_tokens=41)
    assert found.tokens == 40 + 42


def test_an_encoder_is_measured_by_its_hidden_states() -> None:
    model, ids = bert(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    before, bits = snapshot(model), state_bits(model)
    found = lz.plan(model, [batch], budget=1, **PAPER, group_size=8)
    assert unchanged(model, before, bits)
    assert found.measure == "distance" and found.tokens == 31
    linear = lz.linearize(copy.deepcopy(model), config=found.config)
    lz.calibrate(linear, [batch], sequential=False)
    with torch.no_grad():
        was, now = (m(**batch).last_hidden_state[mask.bool()] for m in (model, linear))
    assert found.divergence == pytest.approx(float((now - was).norm() / was.norm()), rel=1e-3)


def test_an_encoder_decoder_names_its_layers_by_path() -> None:
    model = bart()
    batch = {"input_ids": tokens(2, 15), "decoder_input_ids": tokens(2, 9)}
    before, bits = snapshot(model), state_bits(model)
    found = lz.plan(model, [batch], budget=2, **PAPER, group_size=4)
    assert unchanged(model, before, bits)
    assert len(found.layers) == 5 and found.measure == "kl" and found.tokens == 18
    assert {layer.keep for layer in found.layers} == {layer.path for layer in found.layers}
    linear = lz.linearize(copy.deepcopy(model), config=found.config)
    lz.calibrate(linear, [batch], sequential=False)
    assert len(state_of(linear).plan.sites) == 3
    assert found.divergence == pytest.approx(kl(model, linear, [batch]), rel=1e-3)


def test_modules_that_are_rewritten_as_graphs_are_switched_too() -> None:
    model, batch = plain(), {"x": activations()}
    before, bits = snapshot(model), state_bits(model)
    found = lz.plan(model, [batch], budget=1, inputs=activations(), **PAPER, group_size=4)
    assert unchanged(model, before, bits)
    linear = lz.linearize(copy.deepcopy(model), activations(), config=found.config)
    lz.calibrate(linear, [batch], sequential=False)
    with torch.no_grad():
        was, now = (m(**batch) for m in (model, linear))
    assert found.divergence == pytest.approx(float((now - was).norm() / was.norm()), rel=1e-3)
    assert 0 < found.divergence < found.choices[0].divergence


def test_a_mechanism_without_anything_to_fit_is_measured_as_it_is() -> None:
    model, ids = decoder(), batches(1)
    found = lz.plan(model, ids, budget=1, mechanism="power_window", options={"window": 4})
    assert not found.calibrated
    linear = lz.linearize(copy.deepcopy(model), config=found.config)
    assert found.divergence == pytest.approx(kl(model, linear, ids), rel=1e-3)


SPEND = (
    *("--state-bytes", 20_000, "--lengths", "100,150", "--tokens", 600, "--no-augmentation"),
    *("--option", "window=8", "--option", "salient=8"),
)
SMALL: dict[str, Any] = {"options": {"window": 8, "sinks": 1, "salient": 8}, "augmentation": False}


class Spent:
    """Bytes spent on the layers of a decoder, of which the second needs least."""

    def __init__(self) -> None:
        self.model = decoder()
        self.ids = [tokens(2, 200), tokens(2, 230)]
        linear = lz.linearize(copy.deepcopy(self.model), **SMALL)
        self.limit = sum(sizes_in_bytes(linear))
        self.found = lz.plan(self.model, self.ids, state_bytes=self.limit, lengths=(120, 200), **SMALL)


def sizes_in_bytes(model: Any) -> list[int]:
    """Bytes of the state of each layer, as a cache holds them."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 4), use_cache=True, past_key_values=cache)
    layers: Any = cache.layers
    return [layer.states.nbytes for layer in layers]


@pytest.fixture(scope="module")
def spent() -> Spent:
    return Spent()


def test_bytes_are_spent_where_they_take_off_most_divergence(spent: Spent) -> None:
    found = spent.found
    simple, best = found.choices
    assert best.divergence < simple.divergence and found.lengths == (120, 200)
    assert best.state_bytes is not None and best.state_bytes <= spent.limit
    windows = [best.options[path]["window"] for path in PATHS]
    needs = [layer.sizes[0].alone for layer in found.layers]
    assert windows[needs.index(max(needs))] == max(windows) > 8 and windows[1] == min(windows) < 8
    assert len(found.layers[0].sizes) == 25, "window and salient tokens are chosen apart"
    for layer in found.layers:
        costs = [size.alone for size in layer.sizes]
        assert costs[-1] < costs[0], "a larger state costs less"


def test_the_settings_give_a_model_of_that_divergence_and_that_many_bytes(
    spent: Spent, tmp_path: Path
) -> None:
    found = spent.found
    linear = lz.linearize(copy.deepcopy(spent.model), config=found.config)
    each = [kl(spent.model, linear, [ids[:, :n] for ids in spent.ids]) for n in (120, 200)]
    assert found.divergence == pytest.approx(sum(each) / 2, rel=1e-3)
    assert sum(sizes_in_bytes(linear)) == found.choices[-1].state_bytes
    own = {layer.keep: layer.path for layer in found.layers}
    for layer, options in found.config.layer_options.items():
        assert options == found.choices[-1].options[own[layer]]
    loaded = lz.load(lz.save(linear, tmp_path / "saved"))
    assert torch.equal(loaded(spent.ids[0]).logits, linear(spent.ids[0]).logits)
    assert state_of(loaded).config == found.config
    card = (tmp_path / "saved" / "README.md").read_text()
    assert all(f"in layer `{layer}`" in card for layer in found.config.layer_options)


def test_softmax_is_bought_where_it_is_allowed_and_affordable(spent: Spent) -> None:
    half = [ids[:, :100] for ids in spent.ids]
    found = lz.plan(spent.model, half, state_bytes=10**7, budget=1, **SMALL)
    assert len(found.kept) == 1 and set(found.choices[-1].options) == set(PATHS) - set(found.kept)
    assert found.config.keep_softmax == (PATHS.index(found.kept[0]),)
    none = lz.plan(spent.model, half, state_bytes=10**7, **SMALL)
    assert not none.kept


def test_bytes_that_cannot_be_spent_are_refused(spent: Spent) -> None:
    few, model = [ids[:1, :40] for ids in spent.ids], spent.model
    for limits, words in (
        (dict(state_bytes=10), "too little: the smallest sizes tried need [0-9,]+ bytes"),
        (dict(state_bytes=0), "int above 0"),
        (dict(state_bytes=True), "int above 0"),
        (dict(state_bytes=10**6, max_divergence=1.0), "one of the two"),
        (dict(state_bytes=10**6, mechanism="hedgehog", options={}), "its state has one size"),
        (dict(state_bytes=10**6, options={"window": 0, "salient": 0}), "all of them are 0"),
        (dict(state_bytes=10**6, layer_options={0: {"window": 9}}), "no layer_options"),
        (dict(budget=1, lengths=(50,)), "no batch has 50 tokens"),
        (dict(budget=1, lengths=()), "lengths must be"),
        (dict(budget=1, lengths=(8, 8)), "lengths must be"),
    ):
        with pytest.raises(ConfigError, match=words):
            lz.plan(model, few, **SMALL | limits)


def test_the_result_can_be_printed_and_stored(spent: Spent) -> None:
    found = lz.plan(decoder(), batches(1), budget=1, **PAPER, group_size=8)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    text = console.export_text()
    for layer in found.layers:
        becomes = "softmax" if layer.path in found.kept else "augmented_paper"
        assert re.search(rf"{re.escape(layer.path)}\W+{re.escape(f'{layer.alone:.4g}')}\W+{becomes}", text)
    stored = json.loads(json.dumps(found.to_dict()))
    assert LinearizeConfig.from_dict(stored["config"]) == found.config
    assert stored["kept"] == list(found.kept) and stored["divergence"] == found.divergence
    assert isinstance(found, Sensitivity)
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(spent.found)
    text = console.export_text()
    for layer in spent.found.layers:
        own = spent.found.choices[-1].options[layer.path]
        cost = next(size.alone for size in layer.sizes if size.options == own)
        cells = (layer.path, f"{layer.alone:.4g}", " / ".join(map(str, own.values())), f"{cost:.4g}")
        assert re.search(r"\W+".join(map(re.escape, cells)), text)
    stored = json.loads(json.dumps(spent.found.to_dict()))
    assert LinearizeConfig.from_dict(stored["config"]) == spent.found.config


def test_the_command_prints_a_line_that_converts_so(run, folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words of text to look at " * 40)
    told = run(
        *(
            "plan",
            folder,
            "--data",
            text,
            "--budget",
            "1",
            "--group-size",
            8,
            "--json",
            tmp_path / "plan.json",
        )
    )
    assert told.code == 0, told.err
    stored = json.loads((tmp_path / "plan.json").read_text())
    line = re.search("to convert it so: linearize (.*)", told.out)
    assert line is not None and len(stored["kept"]) == 1
    words = [str(tmp_path / "out") if word == "OUT" else word for word in shlex.split(line[1])]
    assert run(*words).code == 0
    state = state_of(lz.load(tmp_path / "out"))
    assert state.config.to_dict() == stored["config"] and state.config.group_size == 8
    spent = run("plan", folder, "--data", text, *SPEND, "--json", tmp_path / "spent.json")
    assert spent.code == 0, spent.err
    line = re.search("to convert it so: linearize (.*)", spent.out)
    assert line is not None and "--layer-option" in line[1]
    words = [str(tmp_path / "other") if word == "OUT" else word for word in shlex.split(line[1])]
    assert run(*words).code == 0
    stored = json.loads((tmp_path / "spent.json").read_text())
    assert state_of(lz.load(tmp_path / "other")).config.to_dict() == stored["config"]
    for wrong in ("half", "9", "-1"):
        failed = run("plan", folder, "--data", text, "--budget", wrong)
        assert failed.code == 1 and "budget" in failed.err
