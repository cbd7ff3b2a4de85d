"""Recipes from beginning to end, and the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import bert, converted, llama, snapshot, t5, tokens
from rich.console import Console
from torch import Tensor, nn

import linearize as lz
from linearize.errors import ConfigError, InputError, RefusedError, TrainingError
from linearize.mechanisms.module import AttentionModule
from linearize.planning.state import state_of
from linearize.training.objective import hidden_distance
from linearize.training.recipes import recipe_of

IDS = tokens(16, 16)
SMALL: dict[str, Any] = dict(context=16, batch_size=4)
CONFIG: dict[str, Any] = dict(mechanism="augmented_paper", group_size=4)
FOLLOW: dict[str, Any] = dict(lm_weight=0.0, distill_weight=1.0, learning_rate=3e-3, new_learning_rate=3e-3)
SLOW: dict[str, Any] = dict(learning_rate=3e-4, new_learning_rate=3e-4)


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def divergence(model: Any, original: Any) -> float:
    with torch.no_grad():
        p, q = (m(IDS, use_cache=False).logits.double().log_softmax(-1) for m in (original, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_quick_converts_calibrates_and_tunes_in_place() -> None:
    model, original = llama(), llama()
    children = dict(model.named_modules())
    report = lz.distill(model, IDS, **SMALL, config=CONFIG, epochs=10, tune_settings=FOLLOW)
    assert report.model is model and [stage.name for stage in report.stages] == ["tune"]
    assert report.calibration is not None and report.stages[0].after < report.stages[0].before
    assert state_of(model).config == lz.LinearizeConfig(**CONFIG)
    assert all(dict(model.named_modules())[name] is module for name, module in children.items())
    fitted = lz.linearize(llama(), **CONFIG)
    lz.calibrate(fitted, [IDS])
    assert divergence(model, original) < 0.8 * divergence(fitted, original)
    console = Console(record=True, width=100)
    console.print(report)
    shown = console.export_text()
    assert "tune" in shown and "2,400" in shown


def test_every_recipe_runs_all_its_stages() -> None:
    wanted = {"quick": ["tune"], "paper": ["tune"], "lolcats-like": ["transfer", "tune"]}
    assert list(lz.RECIPES) == list(wanted)
    for name, stages in wanted.items():
        model = llama()
        report = lz.distill(model, IDS, recipe=name, **SMALL, max_steps=2, gradient_accumulation=1)
        assert [stage.name for stage in report.stages] == stages
        assert (report.calibration is not None) == (lz.RECIPES[name].calibrate > 0)
        assert state_of(model).config.mechanism == lz.RECIPES[name].config["mechanism"]
        assert lz.RECIPES[name].about
        out = model.generate(IDS[:1, :8], max_new_tokens=3, do_sample=False)  # type: ignore[operator]
        assert out.shape == (1, 11)


def test_the_paper_recipe_has_the_papers_settings() -> None:
    recipe = lz.RECIPES["paper"]
    tune = dict(recipe.tune or {})
    assert tune["lora"] == {"r": 8, "lora_alpha": 16} and tune["method"] == "lora"
    assert tune["batch_size"] * tune["gradient_accumulation"] == 64 and tune["context"] == 4096
    assert tune["max_steps"] == 1000 and tune["learning_rate"] == 2e-5
    assert tune["warmup"] * tune["max_steps"] == 20 and tune["schedule"] == "constant_with_warmup"
    assert not tune.get("distill_weight") and recipe.calibrate == 0
    assert recipe.context(llama()) == 128, "no more than the model has positions for"


def test_a_recipe_of_ones_own() -> None:
    recipe = dataclasses.replace(lz.RECIPES["quick"], calibrate=0, tune=None, transfer=dict(max_steps=2))
    model = llama()
    report = lz.distill(model, IDS, recipe=recipe, **SMALL, config=CONFIG)
    assert [stage.name for stage in report.stages] == ["transfer"] and report.calibration is None
    with pytest.raises(ConfigError, match="unknown recipe 'q'; known: quick, paper, lolcats-like"):
        recipe_of("q")


def test_an_encoder_follows_its_original() -> None:
    original, model = bert(), bert()
    mask = torch.ones_like(IDS)
    mask[::2, 10:] = 0
    data = {"input_ids": IDS, "attention_mask": mask}
    settings: dict[str, Any] = dict(epochs=8, batch_size=4, held_out=0.0, tune_settings=SLOW)
    report = lz.distill(model, data, config=CONFIG, **settings)
    assert report.stages[0].after < report.stages[0].before
    with torch.no_grad():
        fitted = lz.linearize(bert(), **CONFIG)
        lz.calibrate(fitted, [data])
        distances = [float(hidden_distance(m(**data), original(**data), mask)) for m in (model, fitted)]
    assert distances[0] < distances[1]
    # Recipes of a language-model loss have nothing else to learn from here either.
    report = lz.distill(bert(), data, recipe="lolcats-like", config=CONFIG, max_steps=1)
    assert [stage.name for stage in report.stages] == ["transfer", "tune"]


def test_an_encoder_decoder_learns_pairs() -> None:
    model = t5()
    data = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": tokens(16, 7)}
    config = dict(group_size=4, approximate=("bias",))
    report = lz.distill(model, data, config=config, epochs=8, batch_size=4, tune_settings=FOLLOW | SLOW)
    assert report.stages[0].after < report.stages[0].before
    assert sum(isinstance(m, AttentionModule) for m in model.modules()) == 6


def test_a_converted_model_needs_its_original_where_the_recipe_does() -> None:
    model = converted("llama")
    before = snapshot(model)
    with pytest.raises(ConfigError, match="converted model is no longer: give teacher="):
        lz.distill(model, IDS, **SMALL)
    assert snapshot(model) == before
    report = lz.distill(model, IDS, **SMALL, teacher=llama(), epochs=4)
    assert report.calibration is None and report.stages[0].after < report.stages[0].before
    lz.distill(converted("llama"), IDS, recipe="lolcats-like", **SMALL, max_steps=1)


def test_an_error_names_its_stage_and_leaves_the_model_as_that_found_it() -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(InputError, match="^data: .*another tokenizer"):
        lz.distill(model, IDS + 96, **SMALL)
    with pytest.raises(RefusedError, match="^convert: "):
        lz.distill(model, IDS, **SMALL, config={"layers": (9,)})
    assert snapshot(model) == before
    with pytest.raises(TrainingError, match="^tune: the loss is"):
        lz.distill(model, IDS, **SMALL, config=CONFIG, learning_rate=1e30, max_grad_norm=1e30)
    fitted = llama()
    lz.distill(
        fitted, IDS, **SMALL, config=CONFIG, recipe=dataclasses.replace(lz.RECIPES["quick"], tune=None)
    )
    assert same(model, fitted)
    with pytest.raises(TrainingError, match="^transfer: the loss is"):
        lz.distill(
            model,
            IDS,
            **SMALL,
            recipe="lolcats-like",
            transfer_settings=dict(learning_rate=1e30, max_grad_norm=1e30),
        )
    assert same(model, fitted)


def test_a_cut_off_recipe_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(
        **SMALL, recipe="lolcats-like", max_steps=4, save_steps=2, config=CONFIG | dict(mechanism="hedgehog")
    )
    whole, resumed, again = llama(), llama(), llama()
    lz.distill(whole, IDS, **settings, output_dir=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"transfer", "tune"}
    (tmp_path / "tune" / "checkpoint-4" / "trainer_state.json").unlink()
    report = lz.distill(resumed, IDS, **settings, output_dir=tmp_path, resume=True)
    assert [stage.steps for stage in report.stages] == [4, 4] and same(resumed, whole)
    for path in (tmp_path / "tune").iterdir():
        (path / "trainer_state.json").unlink()
    lz.distill(again, IDS, **settings, output_dir=tmp_path, resume=True)
    assert same(again, whole)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text(Path(__file__).read_text())
    return path


def test_the_command_writes_a_folder_that_works(run: Any, folder: Path, text: Path, tmp_path: Path) -> None:
    options = ("--context", 64, "--tokens", 2000, "--max-steps", 3, "--checkpoints", tmp_path / "c")
    result = run("distill", folder, "--data", text, "--out", tmp_path / "out", *options)
    assert result.code == 0, result.err
    assert "tune" in result.out and f"written to {tmp_path / 'out'}" in result.out.replace("\n", "")
    model: Any = lz.load(tmp_path / "out")
    assert state_of(model).config.mechanism == "augmented"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    result = run("distill", folder, "--data", text, "--out", tmp_path / "again", *options, "--resume")
    assert result.code == 0, result.err
    assert same(lz.load(tmp_path / "again"), model)


def test_the_command_takes_the_mechanism_and_how_to_tune(
    run: Any, folder: Path, text: Path, tmp_path: Path
) -> None:
    options: tuple[Any, ...] = ("--mechanism", "softmax_window", "--option", "window=16", "--augmentation")
    options += ("--method", "lora", "--learning-rate", 1e-3, "--batch-size", 2, "--context", 64)
    result = run(
        "distill",
        folder,
        "--data",
        text,
        "--out",
        tmp_path / "out",
        *options,
        "--tokens",
        600,
        "--max-steps",
        4,
    )
    assert result.code == 0, result.err
    config = state_of(lz.load(tmp_path / "out")).config
    assert config.mechanism == "softmax_window" and config.option("window") == 16 and config.augments
    from transformers import AutoModelForCausalLM

    original = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    now = lz.load(tmp_path / "out").state_dict()
    changed = {name for name in original if not torch.equal(now[name], original[name])}
    assert changed and all("self_attn" in name for name in changed), "LoRA is beside the attention alone"


def test_the_command_says_what_is_wrong_in_one_line(
    run: Any, folder: Path, text: Path, tmp_path: Path
) -> None:
    for options, words in (
        (("--data", tmp_path / "none"), "cannot read the text"),
        (("--data", text, "--recipe", "best"), "unknown --recipe 'best'"),
        (("--data", text, "--method", "all"), "unknown --method 'all'"),
        (("--data", text, "--resume"), "resume continues from a checkpoint"),
    ):
        result = run("distill", folder, "--out", tmp_path / "out", "--context", 64, *options)
        assert result.code == 1 and words in result.err and result.err.count("error:") == 1
        assert not (tmp_path / "out").exists()
    result = run("distill", folder, "--data", text, "--out", folder)
    assert result.code == 1 and "write to another folder" in result.err


def test_files_are_read_as_the_models_kind_asks(tmp_path: Path) -> None:
    from linearize.training.data import training_data
    from linearize.training.files import read_files

    tokenizer = lz.load_demo()[1]
    lines = tmp_path / "lines.txt"
    lines.write_text("def one():\n\n    return 1\n")
    wide = dict(vocab_size=4096)
    found = training_data(
        bert(), read_files(bert(), tokenizer, [lines], None, 32, 0), lambda t, **_: {"input_ids": [5]}
    )
    assert len(found) == 2, "an encoder takes every line that is not blank"
    decoder = llama(**wide)
    ids = read_files(decoder, tokenizer, [lines], None, 32, 0)
    assert tokenizer.decode(torch.cat(ids)) == lines.read_text()
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"input": "one two", "target": "three"}) + "\n")
    row: dict[str, Tensor] = read_files(t5(), tokenizer, [pairs], None, 32, 0)[0]
    assert tokenizer.decode(row["input_ids"]) == "one two" and tokenizer.decode(row["labels"]) == "three"
    pairs.write_text("no json\n")
    with pytest.raises(InputError, match="lines of JSON.*'no json'"):
        read_files(t5(), tokenizer, [pairs], None, 32, 0)
