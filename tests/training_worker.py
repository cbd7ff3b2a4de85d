"""Training jobs for test_distributed and test_training_faults, also as a script that a launcher starts:

    torchrun --nproc_per_node 2 tests/training_worker.py OUT JOBS

JOBS is JSON, arguments of `work` by name. Each process leaves what `work` gave in OUT/NAME-RANK.pt, and the
main one the model, saved, in OUT/NAME.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import linearize as lz
from linearize.training.data import TrainingData
from linearize.training.trainer import is_main_process

VOCABULARY, TOKENS = 64, 32
RECIPE = lz.Recipe(
    config=dict(group_size=8, conv_taps=4),
    calibrate=512,
    transfer={},
    tune=dict(method="full", distill_weight=0.5),
)


def original() -> LlamaForCausalLM:
    """A small decoder, the same at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@cache
def _converted() -> Any:
    return lz.linearize(original(), mechanism="augmented_paper", group_size=8, conv_taps=4)


def converted() -> Any:
    """A copy of its own for every caller; the conversion itself is made once per process."""
    return copy.deepcopy(_converted())


def ids(count: int = 33) -> Tensor:
    """Rows for 8 steps of 4, and one to measure on."""
    return torch.randint(VOCABULARY, (count, TOKENS), generator=torch.Generator().manual_seed(1))


class Interrupted(TrainingData):
    """Training data whose reading for training is interrupted by a call, once, after so many in all."""

    def __init__(self, rows: Sequence[dict[str, Tensor]], tick: Callable[[], None]) -> None:
        super().__init__(rows)
        self.tick = tick

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.tick()
        return super().__getitem__(index)

    def first(self, tokens: int | None) -> TrainingData:
        return Interrupted(super().first(tokens).rows, self.tick)

    def split(self, share: float) -> tuple[TrainingData, TrainingData]:
        training, held_out = super().split(share)
        return Interrupted(training.rows, self.tick), held_out


def interrupted(rows: Tensor, reads: int, call: Callable[[], object]) -> Interrupted:
    """The call comes with the reading of this number."""
    count = itertools.count(1)

    def tick() -> None:
        if next(count) == reads:
            call()

    return Interrupted([{"input_ids": row} for row in rows], tick)


def die() -> None:
    """Nothing is closed, written or said."""
    os.kill(os.getpid(), signal.SIGKILL)


def settings(**more: Any) -> dict[str, Any]:
    """Of a run of 8 steps, 4 rows each when there is one process."""
    own = dict(context=TOKENS, max_steps=8, batch_size=4, held_out=0.03, learning_rate=1e-2)
    return {**own, **more}


def work(kind: str, *, dies_at: int | None = None, without: str | None = None, **more: Any) -> dict[str, Any]:
    """Train by `lz.transfer`, by `lz.tune` ("lora", or "full" with a teacher), or by `lz.distill`, which does
    both: measurements and weights.

    dies_at: readings of rows at which the last process is killed. without: a checkpoint in output_dir to
    do away with before.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if without is not None:
        if rank == 0:
            shutil.rmtree(Path(more["output_dir"], without))
        if count > 1:
            torch.distributed.barrier()
    model: Any = converted()
    data = ids() if dies_at is None or rank != count - 1 else interrupted(ids(), dies_at, die)
    if kind == "distill":
        model = original()
        stage = lz.distill(model, data, recipe=RECIPE, **settings(**more)).stages[-1]
    elif kind == "transfer":
        stage = lz.transfer(model, data, **settings(**more))
    elif kind == "full":
        stage = lz.tune(
            model, data, method="full", teacher=original(), distill_weight=0.5, **settings(**more)
        )
    else:
        stage = lz.tune(model, data, method="lora", **settings(**more))
    return dict(
        model=model,
        weights={name: value.detach() for name, value in model.named_parameters()},
        **{name: getattr(stage, name) for name in ("before", "after", "steps", "tokens")},
    )


def let_fsdp_run_on_cpus() -> None:
    """accelerate 1.15 shards models on GPUs and their like alone, and elsewhere trains unsharded without a
    word, though torch can shard over gloo too. This is what it does for GPUs."""
    plain = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        first = not AcceleratorState._shared_state
        plain(self, *args, fsdp_plugin=fsdp_plugin, **more)
        if first and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init


def main(out: Path, jobs: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    let_fsdp_run_on_cpus()
    for name, job in jobs.items():
        found = work(**job)
        model = found.pop("model")
        found["sharded"] = AcceleratorState().distributed_type == DistributedType.FSDP
        if is_main_process():
            lz.save(model, out / name)
        torch.save(found, out / f"{name}-{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
