"""The model card: what a folder says about the model in it, and never more than was measured of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import activations, converted, llama, plain, tokens, wake
from torch import nn

import linearize as lz
from linearize.errors import CheckpointError, InputError, InvalidModelError
from linearize.evaluation import Evaluation
from linearize.evaluation.card import MARK, card
from linearize.planning.state import state_of

DATA = tokens(1, 64)


def measure(model: nn.Module, name: str = "held-out text") -> Evaluation:
    return lz.evaluate(model, DATA, lengths=(8, 32), speed=False, name=name)


@pytest.fixture
def model() -> Any:
    return converted("llama")


def perplexity(evaluation: Evaluation) -> str:
    return f"{evaluation.rows[-1].model.perplexity:.2f}"


def test_without_a_measurement_it_says_so_and_what_was_converted(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "# LlamaForCausalLM with augmented_paper attention" in text and "at 2 places" in text
    assert "Not measured" in text and "linearize eval" in text and "| length |" not in text
    assert "group size: 4" in text and "32 taps" in text and "kept as softmax: nothing" in text
    assert 'lz.load("this/folder")' in text
    assert text.startswith("---\nlibrary_name: transformers\n")


def test_options_and_layers_that_were_kept_are_named() -> None:
    model = lz.linearize(
        llama(), mechanism="performer", options={"features": 6}, keep_softmax=(1,), augmentation=False
    )
    text = card(model)
    assert "features: 6" in text and "at 1 place by" in text and "convolution over values: none" in text
    assert "kept as softmax: `model.layers.1.self_attn`" in text


def test_what_was_measured_goes_with_the_checkpoint(model: Any, tmp_path: Path) -> None:
    evaluation = measure(model)
    evaluation.attach(model)
    first = lz.save(model, tmp_path / "first")
    assert perplexity(evaluation) in (first / "README.md").read_text()
    again = lz.load(first)
    assert state_of(again).measured == (evaluation.to_dict(),)
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "README.md").read_text() == (first / "README.md").read_text()
    assert "Not measured" not in (first / "README.md").read_text()


def test_every_line_of_the_table_has_as_many_cells(model: Any) -> None:
    evaluation = lz.evaluate(model, DATA, reference=llama(), lengths=(8, 32), decode_tokens=2)
    evaluation.attach(model)
    lines = [line for line in card(model).splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 and len({line.count("|") for line in lines}) == 1


def test_figures_of_other_weights_are_not_told(model: Any, tmp_path: Path) -> None:
    evaluation = measure(model)
    evaluation.attach(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.linear_attention.alpha[0] += 1e-3
    lz.save(model, tmp_path / "model")
    assert "Not measured" in (tmp_path / "model" / "README.md").read_text()
    with pytest.raises(InputError, match="evaluate the model again"):
        evaluation.attach(model)


def test_another_device_order_or_copy_is_the_same_weights_and_another_dtype_is_not(model: Any) -> None:
    weights = measure(model).weights
    assert measure(converted("llama")).weights == weights
    assert measure(model.bfloat16()).weights != weights
    assert (
        measure(wake(lz.linearize(llama(), mechanism="augmented_paper", group_size=4, conv_taps=8))).weights
        != weights
    )


def test_rows_that_change_places_are_other_weights(model: Any) -> None:
    weights = measure(model).weights
    with torch.no_grad():
        layer = model.model.layers[0].mlp.up_proj.weight
        layer.copy_(layer.flip(0))
    assert measure(model).weights != weights


def test_evaluations_by_several_names_stand_side_by_side(model: Any) -> None:
    for name in ("one", "two", "one"):
        measure(model, name).attach(model)
    assert [record["name"] for record in state_of(model).measured] == ["two", "one"]
    assert "On one:" in card(model) and "On two:" in card(model)


def test_only_converted_models_carry_figures() -> None:
    model = llama()
    with pytest.raises(InvalidModelError, match="not converted"):
        measure(model).attach(model)


@pytest.mark.parametrize("save", (lz.save, lambda model, folder: model.save_pretrained(folder)))
def test_a_text_by_hand_is_kept_and_ours_is_replaced(save: Any, model: Any, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("mine\n")
    save(model, tmp_path)
    assert readme.read_text() == "mine\n" and (tmp_path / "config.json").is_file()
    readme.write_text(f"{MARK}\nyesterday's")
    save(model, tmp_path)
    assert "augmented_paper" in readme.read_text() and "yesterday" not in readme.read_text()
    readme.write_text(readme.read_text().replace(MARK, "") + "taken over")
    save(model, tmp_path)
    assert readme.read_text().endswith("taken over")
    readme.write_bytes(b"\xff\xfe")
    save(model, tmp_path)
    assert readme.read_bytes() == b"\xff\xfe"


def test_a_plain_module_has_a_card_too(tmp_path: Path) -> None:
    folder = lz.save(lz.linearize(plain(), activations()), tmp_path / "model")
    text = (folder / "README.md").read_text()
    assert "# PlainNet with augmented attention" in text and "model=fresh" in text
    assert "transformers" not in text


def test_one_process_writes_it(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_figures_of_another_release_are_left_out_and_lose_nothing(model: Any, tmp_path: Path) -> None:
    measure(model).attach(model)
    folder = lz.save(model, tmp_path / "model")
    for damaged in ([{"version": 99}, 3], "figures", None):
        config = json.loads((folder / "config.json").read_text())
        config["linearize"]["measured"] = damaged
        (folder / "config.json").write_text(json.dumps(config))
        again = lz.load(folder)
        assert "Not measured" in card(again)


def test_a_folder_that_cannot_be_written_is_an_error_and_keeps_its_card(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    measure(model).attach(model)

    def full(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="README.md.*No space left"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
