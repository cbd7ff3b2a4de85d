"""What a command will need at its end is tried before the work; and a stop or a failed save loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import linearize as lz
from linearize.cli import sources
from linearize.common import files

Run = Any


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("def f(x):\n    return x + 1\n\n" * 400)
    return file


@pytest.fixture(scope="module")
def done(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model, on disk."""
    target = tmp_path_factory.mktemp("done") / "m"
    lz.save(lz.linearize(sources.load_source(folder)), target)
    sources.copy_companions(folder, target)
    return target


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """To load a model is to fail: what is checked before says so before."""

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded first")

    monkeypatch.setattr(sources, "load_source", load)
    for module in ("convert", "generation", "onnx", "training"):
        monkeypatch.setattr(f"linearize.cli.{module}.load_source", load)
    for module in ("evaluation", "hybrid", "training"):
        monkeypatch.setattr(f"linearize.cli.{module}.load_model", load)
    monkeypatch.setattr("linearize.cli.generation.load_decoder", load)


MISTAKES = (
    ("convert {folder} {file}/m", "no folder"),
    ("convert {folder} {file}", "no folder"),
    ("convert {folder} {out} --calibrate {none}", "none.txt"),
    ("convert {folder} {out} --calibrate {empty}", "no files"),
    ("convert {folder} {out} --calibrate /dev/zero", "is a device"),
    ("convert {folder} {out} --calibrate {blank}", "is empty"),
    ("convert {folder} /dev/full", "no folder"),
    ("convert {folder} /proc/m", "cannot write"),
    ("convert {folder} {loop}", "loop"),
    ("convert {folder} {link}", "is the model to start from"),
    ("eval {done} --data /dev/zero", "is a device"),
    ("export {folder} {file}/m.onnx", "no folder"),
    ("export {folder} {none}/m.onnx", "no folder"),
    ("export {folder} {out} --bits 3", "bits must be"),
    ("export {folder} {out} --opset 3", "opset must be"),
    ("export {folder} {out} --dtype int8", "dtype must be"),
    ("export {folder} {empty}.onnx", "is a folder"),
    ("plan {folder} --data {text} --budget 1 --json {none}/x.json", "no folder"),
    ("plan {folder} --data {none} --budget 1", "none.txt"),
    ("eval {done} --data {text} --plot {out}.gif", "png, svg, pdf"),
    ("eval {done} --data {text} --plot {none}/x.png", "no folder"),
    ("eval {done} --data {text} --plot {out}.png --lengths 64", "two --lengths"),
    ("eval {done} --data {text} --json {none}/x.json --card", "no folder"),
    ("eval {done} --card --data {none} --plot {out}.png", "none.txt"),
    ("eval {folder} --card --data {text} --plot {out}.png", "not converted"),
    ("eval {done} --data {text} --reference {none}", "no such folder"),
    ("distill {folder} --data {text} --out {out} --resume", "--checkpoints"),
    ("distill {folder} --data {text} --out {out} --checkpoints {file}/c", "no folder"),
    ("distill {folder} --data {none} --out {out}", "none.txt"),
    ("distill {folder} --data {text} --out {file}/m", "no folder"),
    ("distill {folder} --data {text} --out {out} --report-to nowhere", "unknown --report-to 'nowhere'"),
    ("distill {folder} --data {text} --out {out} --recipe slow", "unknown --recipe 'slow'"),
    ("distill {folder} --data {text} --out {out} --teacher {none}", "no such folder"),
    ("train-heads {done} --data {none} --out {out}", "none.txt"),
    ("train-heads {done} --data {text} --out {out} --resume", "--checkpoints"),
    ("train-heads {done} --data {text} --out {file}/m", "no folder"),
    ("demo --plot {out}.gif", "png, svg, pdf"),
    ("demo --plot {none}/x.png", "no folder"),
)


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_what_cannot_be_written_or_read_is_said_before_a_model_is_loaded(
    command: str, message: str, run: Run, folder: Path, done: Path, text: Path, tmp_path: Path, no_model: None
) -> None:
    places = dict(folder=folder, done=done, text=text, none=tmp_path / "none.txt", out=tmp_path / "out")
    places |= {"file": tmp_path / "file", "empty": tmp_path / "empty"}
    places |= {"loop": tmp_path / "loop", "link": tmp_path / "link", "blank": tmp_path / "blank"}
    places["loop"].symlink_to(places["loop"])
    places["link"].symlink_to(folder)
    places["blank"].write_text("")
    places["file"].write_text("a file")
    places["empty"].mkdir()
    (tmp_path / "empty.onnx").mkdir()
    result = run(*(word.format(**places) for word in command.split()))
    assert result.code == 1 and message in result.err, result.err
    assert len(result.err.strip().splitlines()) == 1 and "Traceback" not in result.err
    assert not places["out"].exists() and not list(tmp_path.glob(".linearize*"))


@pytest.mark.parametrize("seed", (-1, 2**40))
@pytest.mark.parametrize(
    "command", ("distill {folder} --data {text} --out {out}", "eval {done} --data {text}")
)
def test_a_seed_that_no_generator_takes_is_a_mistake_in_typing(
    command: str, seed: int, run: Run, folder: Path, done: Path, text: Path, tmp_path: Path, no_model: None
) -> None:
    places = dict(folder=folder, done=done, text=text, out=tmp_path / "out")
    result = run(*(word.format(**places) for word in command.split()), "--seed", seed)
    assert result.code == 2 and "--seed" in result.err and "Traceback" not in result.err


EMPTY = (
    ("convert", "{folder}", ""),
    ("convert", "", "{out}"),
    ("export", "{folder}", ""),
    ("distill", "{folder}", "--data", "{text}", "--out", ""),
    ("distill", "{folder}", "--data", "", "--out", "{out}"),
    ("distill", "{folder}", "--data", "{text}", "--out", "{out}", "--checkpoints", ""),
    ("inspect", "{folder}", "--html", ""),
    ("eval", "", "--data", "{text}"),
)


@pytest.mark.parametrize("words", EMPTY, ids=" ".join)
def test_an_empty_name_is_not_the_current_folder(
    words: tuple[str, ...],
    run: Run,
    folder: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: Any,
    no_model: None,
) -> None:
    """As `"$OUT"` is in a shell where OUT is not set."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    result = run(*(word.format(folder=folder, text=text, out=tmp_path / "out") for word in words))
    assert result.code in (1, 2) and "empty" in result.err, result.err
    assert not list(here.iterdir()) and "Traceback" not in result.err


def test_a_folder_is_tried_by_writing(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: Any, no_model: None
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = run("convert", folder, tmp_path / "out")
    assert result.code == 1 and "No space left" in result.err and not (tmp_path / "out").exists()


def test_extras_are_asked_for_before_a_model_is_loaded(
    run: Run, folder: Path, done: Path, text: Path, tmp_path: Path, monkeypatch: Any, no_model: None
) -> None:
    monkeypatch.setattr("linearize.cli.before.find_spec", lambda name: None)
    for command, extra in (
        (("eval", done, "--data", text, "--plot", tmp_path / "x.png"), "eval"),
        (("distill", folder, "--data", text, "--out", tmp_path / "o"), "train"),
        (("train-heads", done, "--data", text, "--out", tmp_path / "o"), "train"),
        (("export", folder, tmp_path / "o"), "onnx"),
    ):
        result = run(*command)
        assert result.code == 1 and f"linearize[{extra}]" in result.err


def test_a_save_that_fails_at_the_end_goes_to_a_second_place(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    target = tmp_path / "out"
    staged = files.staged

    def full(home: Path, *args: Any, **kwargs: Any) -> Any:
        if home == target and (tmp_path / "now").exists():
            raise OSError(28, "No space left on device")
        return staged(home, *args, **kwargs)

    monkeypatch.setattr("linearize.common.replacing.staged", full)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "now").touch()
    result = run("convert", folder, target)
    assert result.code == 1 and "No space left" in result.err and not target.exists()
    (second,) = tmp_path.glob("out-*")
    assert str(second) in result.err
    assert torch.isfinite(lz.load(second)(torch.arange(4)[None]).logits).all()
    assert (second / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["out", pytest.param("out.onnx", marks=pytest.mark.slow)])
def test_an_export_that_cannot_be_written_at_the_end_goes_to_a_second_place(
    name: str, run: Run, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from linearize.onnx import OrtModel

    target = tmp_path / name
    staged = files.staged

    def full(home: Path, *args: Any, **kwargs: Any) -> Any:
        if home == (target if name == "out" else tmp_path) and (tmp_path / "now").exists():
            raise OSError(28, "No space left on device")
        return staged(home, *args, **kwargs)

    monkeypatch.setattr("linearize.onnx.file.files.staged", full)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "now").touch()
    result = run("export", folder, target)
    assert result.code == 1 and "No space left" in result.err and not target.exists()
    (second,) = (tmp_path / "elsewhere").glob("out-*")
    assert str(second) in result.err and second.suffix == target.suffix
    assert torch.isfinite(OrtModel(second)(torch.arange(4)[None]).logits).all()


def test_figures_of_one_kind_that_cannot_be_written_do_not_lose_the_others(
    run: Run, done: Path, text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    import shutil

    own = tmp_path / "own"
    shutil.copytree(done, own)

    def broken(*args: object, **kwargs: object) -> None:
        raise lz.LinearizeError("the plot is broken")

    monkeypatch.setattr("linearize.evaluation.result.Evaluation.plot", broken)
    found = tmp_path / "f.json"
    where = ("--plot", tmp_path / "x.png", "--card", "--json", found)
    result = run("eval", own, "--data", text, "--lengths", "16,32", "--tokens", 200, "--no-speed", *where)
    assert result.code == 1 and "the plot is broken" in result.err
    assert json.loads(found.read_text())["rows"]
    assert json.loads((own / "config.json").read_text())["linearize"]["measured"]
    assert "perplexity" in (own / "README.md").read_text()


@pytest.mark.parametrize(
    ("command", "where", "said"),
    [
        ("convert {folder} {out}", "linearize.convert.linearize.linearize", "nothing was written"),
        ("distill {folder} --data {text} --out {out}", "linearize.training.distill", "--checkpoints"),
        ("train-heads {done} --data {text} --out {out}", "linearize.cli.generation.load_decoder", "no heads"),
        ("export {folder} {out}", "linearize.onnx.command.export_onnx", "as it was"),
        ("eval {done} --data {text}", "linearize.evaluation.evaluate", "nothing was measured"),
        ("plan {folder} --data {text} --budget 1", "linearize.training.hybrid.plan", "nothing was written"),
    ],
)
def test_a_stop_says_what_was_kept(
    command: str, where: str, said: str, run: Run, folder: Path, done: Path, text: Path, tmp_path: Path,
    monkeypatch: Any,
) -> None:  # fmt: skip
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, stop)
    places = dict(folder=folder, done=done, text=text, out=tmp_path / "out")
    result = run(*(word.format(**places) for word in command.split()))
    assert result.code == 130 and "stopped: " in result.err and said in result.err
    assert not (tmp_path / "out").exists()


def test_a_stopped_training_says_how_to_go_on(
    run: Run, folder: Path, text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def stop(*args: object, output_dir: Any, **kwargs: object) -> None:
        (Path(output_dir) / "tune" / "checkpoint-3").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("linearize.training.distill", stop)
    checkpoints = tmp_path / "c"
    result = run("distill", folder, "--data", text, "--out", tmp_path / "o", "--checkpoints", checkpoints)
    assert result.code == 130 and "--resume" in result.err and str(checkpoints) in result.err
