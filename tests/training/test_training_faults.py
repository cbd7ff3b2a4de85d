"""Training that is killed, or has no room on the disk, or finds another run's files: nothing is lost."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training_worker
from torch import Tensor, nn
from training_worker import converted, ids, original, settings

import linearize as lz
from linearize.common.checkpoints import newest_checkpoint
from linearize.errors import InputError, TrainingError


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    """All of `distill`: the first stage is done and the second in the middle when SIGKILL comes."""
    job = f"training_worker.work('distill', dies_at=8 * 4 + 22, save_steps=2, output_dir={str(tmp_path)!r})"
    code = f"import torch; torch.set_num_threads(1); import training_worker; {job}"
    command = [sys.executable, "-c", code]
    folder = Path(training_worker.__file__).parent
    killed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoints(tmp_path / "transfer") == {"checkpoint-6", "checkpoint-8"}
    assert checkpoints(tmp_path / "tune") == {"checkpoint-2", "checkpoint-4"}
    # Half of tuning is left, 16 rows; a run that starts again reads 64.
    left = training_worker.interrupted(ids(), 33, lambda: pytest.fail("it started again"))
    run = settings(save_steps=2, output_dir=tmp_path, resume=True)
    resumed = lz.distill(original(), left, recipe=training_worker.RECIPE, **run)
    whole = training_worker.work("distill")
    assert same(dict(resumed.model.named_parameters()), whole["weights"])
    assert (resumed.stages[-1].steps, resumed.stages[-1].after) == (8, whole["after"])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_checkpoint_of_which_the_end_is_missing_is_passed_over(name: str, tmp_path: Path) -> None:
    run = settings(method="full", save_steps=2, max_steps=4, output_dir=tmp_path)
    model, again = converted(), converted()
    lz.tune(model, ids(), **run)
    cut = tmp_path / "checkpoint-4" / name
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    lz.tune(again, ids(), **run, resume=True)
    assert same(weights(again), weights(model))
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


@contextlib.contextmanager
def restored_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [4000, 100_000], ids=["weights", "optimizer"])
def test_without_room_for_a_checkpoint_the_earlier_one_and_the_model_stay(most: int, tmp_path: Path) -> None:
    """The operating system refuses to write on, in the middle of the file that is over the limit."""
    run = settings(method="full", save_steps=2, max_steps=6, output_dir=tmp_path)
    model = converted()
    before = weights(model)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with restored_limit(), pytest.raises(TrainingError, match="step 4 cannot be written.*resume=True"):
        lz.tune(model, training_worker.interrupted(ids(), 13, fill), **run)
    assert checkpoints(tmp_path) == {"checkpoint-2"} and newest_checkpoint(tmp_path) is not None
    assert same(weights(model), before)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir()}
    assert (sizes["model.safetensors"] > most) == (most == 4000) and sizes["optimizer.pt"] > most
    lz.tune(model, ids(), **run, resume=True)
    whole = converted()
    lz.tune(whole, ids(), **{**run, "output_dir": None})
    assert same(weights(model), weights(whole))


def test_a_checkpoint_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = settings(save_steps=2, max_steps=2, output_dir=tmp_path)
    lz.tune(converted(), ids(), method="full", **run)
    files = {path: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}
    other = lz.linearize(original(), mechanism="augmented_paper", group_size=8, conv_taps=8)
    for model, call, more in (
        (converted(), lz.tune, dict(method="lora")),
        (other, lz.tune, dict(method="full")),
        (converted(), lz.transfer, {}),
    ):
        before = weights(model)
        with pytest.raises(TrainingError, match="checkpoint-2.*another"):
            call(model, ids(), **{**run, "max_steps": 4}, **more, resume=True)
        assert same(weights(model), before)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == files
    assert checkpoints(tmp_path) == {"checkpoint-2"}


def test_the_least_data_is_trained_on_and_less_is_refused() -> None:
    stage = lz.tune(converted(), torch.tensor([3, 5]), context=512, max_steps=2)
    assert (stage.steps, stage.tokens) == (2, 4)
    model = converted()
    before = weights(model)
    for data, match in ((torch.tensor([3]), "give more"), ([], "give"), ("", "token")):
        with pytest.raises(InputError, match=match):
            lz.tune(model, data, tokenizer=None if data != "" else lz.load_demo()[1], max_steps=2)
        with pytest.raises(InputError, match=f"^data: .*{match}"):
            lz.distill(model, data, tokenizer=None if data != "" else lz.load_demo()[1], recipe="paper")
    assert same(weights(model), before)


def test_a_teacher_of_another_vocabulary_is_refused_and_the_model_stays() -> None:
    model = converted()
    before = weights(model)
    with pytest.raises(InputError, match="logits.*one vocabulary"):
        lz.tune(model, ids(), teacher=lz.load_demo()[0], distill_weight=1.0, **settings())
    assert same(weights(model), before)


def test_the_command_line_says_at_once_that_it_cannot_write_and_trains_nothing(
    run: Any, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.py").write_text("def f(x):\n    return x\n" * 200)
    taken = tmp_path / "taken"
    taken.write_text("a file")
    command = ["distill", folder, "--data", tmp_path / "text.py", "--checkpoints", tmp_path / "checkpoints"]
    result = run(*command, "--out", taken)
    assert result.code == 1 and "cannot write" in result.err
    assert taken.read_text() == "a file" and not (tmp_path / "checkpoints").exists()
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"cut short")
    result = run(*command[:1], tmp_path / "other", *command[2:], "--out", tmp_path / "out")
    assert result.code == 1 and "cannot load" in result.err and not (tmp_path / "out").exists()
