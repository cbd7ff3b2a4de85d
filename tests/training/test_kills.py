"""Training that is killed (SIGKILL) at 20 random moments and goes on: the result is that of one run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training_worker
from live_models import llama
from torch import Tensor
from training_worker import RECIPE, ids, original, settings

import linearize as lz
from linearize.common.checkpoints import newest_checkpoint
from linearize.errors import TrainingError

Weights = dict[str, Tensor]


def in_a_process(work: Callable[[], Weights], out: Path, seconds: float) -> bool:
    """Whether the work came to its end; it leaves its weights in a file. After so long it is killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.save(work(), out.with_suffix(".part"))
            out.with_suffix(".part").rename(out)
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert status == 0, "it failed by itself"
            return True
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def killed_often(work: Callable[[Path], Weights], place: Path, stages: tuple[str, ...]) -> Counter[str]:
    """20 kills of runs that continue one another; every run that comes to its end gives what one in peace
    gives. Counted is how far a run had come: the newest whole checkpoint, by stage."""
    started = time.monotonic()
    assert in_a_process(lambda: work(place / "peace"), place / "wanted.pt", 600)
    whole = time.monotonic() - started
    wanted, draw = torch.load(place / "wanted.pt"), random.Random(0)
    counts: Counter[str] = Counter()
    runs = kills = 0
    while kills < 20:
        folder, out = place / f"{runs}", place / f"{runs}.pt"
        if not in_a_process(lambda: work(folder), out, draw.uniform(0.3, 1.0) * whole):  # noqa: B023
            kills += 1
            found = [stage for stage in stages if newest_checkpoint(folder / stage) is not None]
            counts[f"in {found[-1] or 'training'}" if found else "before the first checkpoint"] += 1
            continue
        runs += 1
        counts["came to the end"] += 1
        same(torch.load(out), wanted)
    if not counts["came to the end"]:
        assert in_a_process(lambda: work(folder), out, 600)
        same(torch.load(out), wanted)
    return counts


def same(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def distilled(folder: Path) -> Weights:
    run = settings(save_steps=2, output_dir=folder, resume=True)
    model = lz.distill(original(), ids(), recipe=RECIPE, **run).model
    return {name: x.detach() for name, x in model.named_parameters()}


def heads(folder: Path) -> Weights:
    data = torch.randint(40, (24, 16), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = dict(num_heads=2, targets="text", context=16, epochs=8, held_out=0.1)
    torch.manual_seed(0)
    made = lz.train_heads(llama(), data, output_dir=folder, resume=True, **options)
    return dict(made.named_parameters())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("work", "stages"), [(distilled, ("transfer", "tune")), (heads, ("",))], ids=["distill", "heads"]
)
def test_twenty_kills(work: Callable[[Path], Weights], stages: tuple[str, ...], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    training_worker.converted()  # what would be slow in every process
    print(f"20 kills: {dict(killed_often(work, tmp_path, stages))}")


def test_heads_without_a_whole_checkpoint_start_anew(tmp_path: Path) -> None:
    """As a run that was killed before its first one, or while it wrote that, leaves it."""
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/model.safetensors").write_bytes(b"cut")
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/trainer_state.json").write_text("[" * 100_000)
    found = heads(tmp_path)
    wanted = heads(tmp_path / "other")
    same(found, wanted)


def test_checkpoints_of_other_heads_are_one_error(tmp_path: Path) -> None:
    heads(tmp_path)
    data = torch.randint(40, (24, 16))
    with pytest.raises(TrainingError, match="checkpoint-"):
        lz.train_heads(
            llama(), data, num_heads=3, targets="text", context=16, output_dir=tmp_path, resume=True
        )


@pytest.mark.parametrize("name", ("a\0b", "x" * 5000, "file/below", "/proc/self/x"))
def test_a_folder_for_checkpoints_is_tried_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot write checkpoints"):
        heads(tmp_path / name)
