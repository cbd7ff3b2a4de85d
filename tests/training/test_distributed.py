"""Training in two processes of this machine (gloo): as in one, sharded or not; what is killed goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import training_worker
from torch import Tensor

import linearize as lz

KINDS = ("full", "lora", "transfer")
SHARDED = dict(
    fsdp=True, fsdp_config={"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
)


def launch(*command: object, code: int = 0) -> str:
    """A program in two processes that know of each other; what they said."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            *map(str, command),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert (done.returncode == 0) == (code == 0), done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def two(out: Path, jobs: dict[str, dict[str, Any]], code: int = 0) -> dict[str, list[dict[str, Any]]]:
    """What each process found, by job."""
    launch(training_worker.__file__, out, json.dumps(jobs), code=code)
    if code:
        return {}
    return {name: [torch.load(out / f"{name}-{rank}.pt") for rank in (0, 1)] for name in jobs}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0, msg=name)


@cache
def alone(kind: str) -> dict[str, Any]:
    return training_worker.work(kind)


@dataclass
class Together:
    """What two processes found: the jobs of some kinds, and where their models are."""

    kinds: tuple[str, ...]
    out: Path
    found: dict[str, list[dict[str, Any]]]


# Each job starts from a conversion in both processes. The other kinds differ from the first in what is
# trained, not in how processes work together.
RUNS = {"ddp": (False, ("full",)), "ddp others": (False, ("lora", "transfer")), "fsdp": (True, KINDS)}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) for name in RUNS],
)
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Half the batch in each of two processes, and a run that goes on from half of the first."""
    out = tmp_path_factory.mktemp("together")
    sharded, kinds = RUNS[request.param]
    trainer = SHARDED if sharded else {}
    jobs: dict[str, Any] = {kind: dict(kind=kind, batch_size=2, trainer_args=trainer) for kind in kinds}
    if "full" in kinds:
        jobs["full"] |= dict(output_dir=str(out / "checkpoints"), save_steps=4)
        jobs["resumed"] = {**jobs["full"], "without": "checkpoint-8", "resume": True}
    found = two(out, jobs)
    assert {one["sharded"] for pair in found.values() for one in pair} == {sharded}
    return Together(kinds, out, found)


def test_two_processes_train_what_one_does(together: Together) -> None:
    for kind in together.kinds:
        wanted, (first, second) = alone(kind), together.found[kind]
        # Transfer's loss is relative to all of a batch, so halves of it give a slightly different mean.
        near = 1e-2 if kind == "transfer" else 1e-5
        for one in (first, second):
            assert (one["steps"], one["tokens"]) == (wanted["steps"], wanted["tokens"]) == (8, 8 * 4 * 32)
            assert one["before"] == pytest.approx(wanted["before"], rel=near)
            assert one["after"] == pytest.approx(wanted["after"], rel=near)
        close(second["weights"], first["weights"], atol=0)
        close(first["weights"], wanted["weights"], atol=near)
        fresh = dict(training_worker.converted().named_parameters())
        moved = [name for name in fresh if not torch.equal(fresh[name], first["weights"][name])]
        new = {name for name in fresh if "linear_attention" in name}
        assert len(new) == 6 and new <= set(moved)
        assert (set(moved) == new) == (kind == "transfer")
        loaded = lz.load(together.out / kind)
        close(dict(loaded.named_parameters()), first["weights"], atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("together", ["ddp", "fsdp"], indirect=True)
def test_two_processes_go_on_from_a_checkpoint_to_the_same_weights(together: Together) -> None:
    for whole, resumed in zip(together.found["full"], together.found["resumed"], strict=True):
        assert resumed["steps"] == 8
        close(resumed["weights"], whole["weights"], atol=0)


@pytest.mark.slow
def test_when_one_of_two_processes_is_killed_the_run_can_go_on(tmp_path: Path) -> None:
    job = dict(kind="full", batch_size=2, save_steps=3, output_dir=str(tmp_path / "checkpoints"))
    whole = two(tmp_path, {"whole": {**job, "output_dir": str(tmp_path / "whole-run")}})["whole"][0]
    two(tmp_path, {"killed": {**job, "dies_at": 12}}, code=1)
    assert (tmp_path / "checkpoints" / "checkpoint-3").is_dir() and not (tmp_path / "killed-0.pt").exists()
    resumed = two(tmp_path, {"resumed": {**job, "resume": True}})["resumed"][0]
    close(resumed["weights"], whole["weights"], atol=0)


@pytest.mark.slow
def test_the_command_line_trains_in_two_processes(run: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.py").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400)))
    command = ["distill", folder, "--data", tmp_path / "text.py", "--context", 64, "--tokens", 4096]
    command += ["--max-steps", 4]
    said = launch("-m", "linearize", *command, "--batch-size", 2, "--out", tmp_path / "two")
    assert said.count("written to") == 1
    result = run(*command, "--batch-size", 4, "--out", tmp_path / "one")
    assert result.code == 0, result.err
    one, two = (dict(lz.load(tmp_path / name).named_parameters()) for name in ("one", "two"))
    close(two, one)
    assert (tmp_path / "two" / "tokenizer.json").is_file()
