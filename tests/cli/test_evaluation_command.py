"""`linearize eval`, as a user types it."""

from __future__ import annotations

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import linearize as lz
from linearize.evaluation import Evaluation
from linearize.evaluation.card import card
from linearize.evaluation.parts import Parts
from linearize.evaluation.recall import Recall

FLAGS = ("--lengths", "32,64", "--tokens", 200, "--no-speed")


@pytest.fixture(scope="module")
def data() -> Path:
    return Path(lz.__file__)


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama, converted, on disk with its tokenizer. Not to be written to."""
    model = lz.linearize(
        LlamaForCausalLM.from_pretrained(folder), mechanism="augmented_paper", group_size=8, conv_taps=4
    )
    path = lz.save(model, tmp_path_factory.mktemp("linear") / "model")
    lz.load_demo()[1].save_pretrained(path)
    return path


@pytest.fixture
def own(converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(converted, tmp_path / "own")


def test_it_prints_the_table_and_writes_the_figures_and_the_plot(
    run: Any, folder: Path, converted: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    files = ("--json", tmp_path / "figures.json", "--plot", tmp_path / "curves.png")
    result = run("eval", converted, "--reference", folder, "--data", data, *FLAGS, *files)
    assert result.code == 0, result.err
    evaluation = Evaluation.from_dict(json.loads((tmp_path / "figures.json").read_text()))
    assert [row.length for row in evaluation.rows] == [32, 64] and evaluation.name == data.name
    for row in evaluation.rows:
        assert f"{row.model.perplexity:.2f}" in result.out and f"{row.agreement:.1%}" in result.out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_shipped_model_is_measured_as_it_is(run: Any, data: Path) -> None:
    result = run("eval", "demo", "--data", data, "--lengths", "64", "--tokens", 128, "--no-speed")
    assert result.code == 0 and "LlamaForCausalLM, softmax" in result.out and "float32" in result.out


def test_the_card_gets_the_figures_and_the_weights_stay(
    run: Any, own: Path, data: Path, tmp_path: Path
) -> None:
    weights = (own / "model.safetensors").read_bytes()
    result = run("eval", own, "--data", data, *FLAGS, "--card", "--name", "a test")
    assert result.code == 0, result.err
    text = (own / "README.md").read_text()
    assert "On a test:" in text and "Not measured" not in text
    assert (own / "model.safetensors").read_bytes() == weights
    again = lz.load(own)
    assert card(again) == text
    assert (lz.save(again, tmp_path / "again") / "README.md").read_text() == text


def test_a_readme_by_hand_stays_and_the_figures_are_kept_beside_it(run: Any, own: Path, data: Path) -> None:
    (own / "README.md").write_text("mine")
    result = run("eval", own, "--data", data, *FLAGS, "--card")
    assert result.code == 0 and "config.json" in result.err
    assert (own / "README.md").read_text() == "mine" and "| 64 |" in card(lz.load(own))


def test_an_encoder_is_compared_line_by_line(run: Any, tmp_path: Path, data: Path) -> None:
    encoder = BertModel(
        BertConfig(
            vocab_size=4096,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
    )
    encoder.save_pretrained(tmp_path / "bert")
    lz.load_demo()[1].save_pretrained(tmp_path / "bert")
    result = run("eval", tmp_path / "bert", "--reference", tmp_path / "bert", "--data", data, "--no-speed")
    assert result.code == 0 and "rank correlation" in result.out and "1.0000" in result.out


def test_mistakes_are_one_line_and_leave_the_folder_alone(
    run: Any, folder: Path, own: Path, data: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "t5"
    T5ForConditionalGeneration(
        T5Config(vocab_size=4096, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(pairs)
    lz.load_demo()[1].save_pretrained(pairs)
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    for arguments, words in (
        ((own, "--data", data, "--lengths", "64,no"), "lengths must be numbers"),
        ((own, "--data", tmp_path / "none.txt"), "none.txt"),
        ((own, "--data", data, "--lengths", "100000"), "fewer than a window"),
        ((own, "--data", data, "--card", "--dtype", "bfloat16"), "leave out --dtype"),
        ((folder, "--data", data, "--card", *FLAGS), "not converted"),
        (("demo", "--data", data, "--card", *FLAGS), "--card"),
        ((pairs, "--data", data), "linearize.evaluate with dicts"),
        ((own, "--data", data, *FLAGS, "--json", tmp_path), str(tmp_path)),
        ((own,), "give --data"),
        ((own, "--recall", "--parts"), "--parts needs --data"),
        ((own, "--recall", "--plot", tmp_path / "a.png"), "--plot needs --data"),
        ((folder, "--data", data, "--parts"), "not converted"),
    ):
        result = run("eval", *arguments)
        assert result.code == 1 and words in result.err, (arguments, result.err)
        assert len(result.err.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


def test_parts_and_recall_are_printed_written_and_put_on_the_card(
    run: Any, own: Path, folder: Path, data: Path, tmp_path: Path
) -> None:
    files = ("--json", tmp_path / "figures.json", "--card")
    result = run("eval", own, "--reference", folder, "--data", data, *FLAGS, "--parts", *files)
    assert result.code == 0, result.err
    parts = Parts.from_dict(json.loads((tmp_path / "figures.json").read_text())["parts"])
    assert parts is not None and parts.rows[0].name == "original" and "no attention" in result.out
    result = run("eval", own, "--recall", "--lengths", 256, *files)
    assert result.code == 0, result.err
    recalled = Recall.from_dict(json.loads((tmp_path / "figures.json").read_text())["recall"])
    assert recalled is not None and recalled.length == 256 and "passkey" in result.out
    text = (own / "README.md").read_text()
    assert "What each part gives" in text and "What it recalls" in text
    assert card(lz.load(own)) == text


def test_without_the_harness_the_extra_is_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    result = run("lm-eval", "run", "--model", "hf")
    assert result.code == 1 and "linearize[eval]" in result.err


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra `eval` is not installed")
def test_help_is_the_harness_own(run: Any) -> None:
    result = run("lm-eval", "--help")
    assert result.code == 0 and "Language Model Evaluation Harness" in result.out
