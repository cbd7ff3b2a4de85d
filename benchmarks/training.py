"""One training step of whole models on a CPU, converted against the softmax original: time and memory.

    python benchmarks/training.py [--quick] [--section NAME ...] [--model NAME ...] [--json FILE]

A step is forward, backward and AdamW on all parameters, one sequence in float32. `linear` is the model after
`linearize` (`augmented_paper`); `softmax SDPA` is the original on PyTorch's fused kernel, which keeps no
matrix of scores; `softmax eager` is the original on transformers' plain code, which does, and which the
paper's figures go with (1.5 times the speed at 4k tokens, 2.9 at 8k). Models as in `generation.py`, clocks as
in `cpu.py`.

    step    milliseconds of a step, sides turn by turn in one process
    memory  peak of a step beyond the weights, each in a process of its own

A side is left out where its matrices of scores would not fit the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from cpu import compare, environment, peak
from generation import converted, softmax_model
from measured import Row, summary, table, write_json

from linearize.mechanisms.module import AttentionModule

PAPER = {4096: 1.5, 8192: 2.9}
"""Times faster, by tokens: 1.60 s to 1.05 s, 5.74 s to 1.95 s (section 5.3, LLaMA-2-7B on A100s)."""
LINEAR = "linear"
SOFTMAX = {"softmax SDPA": "sdpa", "softmax eager": "eager"}
_SHARE = 0.7
"""Of the memory that is free: the rest of the step, and others on the machine, need some too."""
_MATRICES = 3
"""Matrices of scores that eager attention keeps or makes per layer: scores, weights, a gradient."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: models by name, tokens of a step, seconds for the repeats of one case."""

    models: tuple[str, ...] = ("demo", "wide")
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    seconds: float = 10.0


QUICK = Sizes(models=("demo",), lengths=(256, 512), seconds=0.5)


class Step:
    """A model of one side and its optimizer; a call is one step on `length` tokens."""

    def __init__(self, name: str, side: str) -> None:
        model = softmax_model(name)
        if side == LINEAR:
            model = converted(model)
        else:
            model.set_attn_implementation(SOFTMAX[side])
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def __call__(self, length: int) -> float:
        """The loss, for which the step was done."""
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(self.model.config.vocab_size, (1, length), generator=generator)
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def refusal(name: str, side: str, length: int) -> str:
    """Why a side cannot run here; nothing when it can."""
    if SOFTMAX.get(side) != "eager":
        return ""
    config = softmax_model(name).config
    needed = _MATRICES * config.num_hidden_layers * config.num_attention_heads * length**2 * 4
    free = _SHARE * psutil.virtual_memory().available
    return "" if needed < free else f"scores of {needed / 1e9:.0f} GB do not fit this machine"


def step(sizes: Sizes) -> Iterator[Row]:
    for name in sizes.models:
        for length in sizes.lengths:
            notes = {side: refusal(name, side, length) for side in SOFTMAX}
            steps = {side: Step(name, side) for side in (LINEAR, *SOFTMAX) if not notes.get(side)}
            for one in steps.values():
                one(128)  # what is made once: the optimizer's state, code and work space
            sides = {side: functools.partial(one, length) for side, one in steps.items()}
            timed = compare(sides, sizes.seconds, slow=math.inf, rounds=2)
            details = dict(model=name, length=length, layers=len(_attentions(steps[LINEAR].model)))
            details |= {side: dataclasses.asdict(found) for side, found in timed.items()}
            for side in SOFTMAX:
                theirs = timed[side].ms if side in timed else None
                goal = PAPER.get(length) if name == "wide" else None
                case = f"{name}, {length} tokens"
                yield Row("step", case, LINEAR, side, timed[LINEAR].ms, theirs, goal, notes[side], details)
            del steps, sides


def memory(sizes: Sizes) -> Iterator[Row]:
    for name in sizes.models:
        for length in sizes.lengths:
            found: dict[str, int] = {}
            notes = {}
            for side in (LINEAR, *SOFTMAX):
                notes[side] = refusal(name, side, length)
                if not notes[side]:
                    peak_of = in_a_process(name, side, length)
                    if isinstance(peak_of, str):
                        notes[side] = peak_of
                    else:
                        found[side] = peak_of
            for side in SOFTMAX:
                yield memory_row(name, length, side, found, notes[LINEAR] or notes[side])


def memory_row(name: str, length: int, side: str, found: dict[str, int], note: str) -> Row:
    """found: bytes by side."""
    if LINEAR in found and side in found:
        ours, theirs = found[LINEAR], found[side]
        note = f"{ours / 1e6:.0f} MB against {theirs / 1e6:.0f} MB, {theirs / ours:.2f}x"
    details = dict(model=name, length=length, bytes=found)
    return Row("memory", f"{name}, {length} tokens", LINEAR, side, note=note, details=details)


def in_a_process(name: str, side: str, length: int) -> int | str:
    """Bytes of a step's peak beyond what was there before, in a process of its own; or why there are none."""
    command = [sys.executable, __file__, "--child", json.dumps([name, side, length])]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['killed'])[-1][:100]}"
    return json.loads(done.stdout)["peak"]


def child(name: str, side: str, length: int) -> None:
    """See `in_a_process`; prints JSON. Gradients, the optimizer's state and activations count."""
    one = Step(name, side)
    ids = torch.zeros(1, 128, dtype=torch.int64)
    one.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()  # code and work space
    one.optimizer.zero_grad()
    gc.collect()
    # Fill what the process gave back since its peak, so that the peak moves with the first new byte.
    ballast = bytearray(max(0, peak() - psutil.Process().memory_info().rss))
    before = peak()
    one(length)
    del ballast
    print(json.dumps(dict(peak=peak() - before)))


def _attentions(model: torch.nn.Module) -> list[AttentionModule]:
    return [module for module in model.modules() if isinstance(module, AttentionModule)]


SECTIONS: dict[str, Callable[[Sizes], Iterator[Row]]] = {"step": step, "memory": memory}


def main(argv: list[str] | None = None, sizes: Sizes | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a dry run of every part, less than a minute")
    parser.add_argument("--section", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--model", nargs="+", choices=("demo", "wide"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.child is not None:
        child(*json.loads(options.child))
        return
    chosen = sizes or (QUICK if options.quick else Sizes())
    if options.model is not None:
        chosen = dataclasses.replace(chosen, models=tuple(options.model))
    setting = environment()
    print(", ".join(f"{key} {value}" for key, value in setting.items()), flush=True)
    measured: list[Row] = []
    for name in options.section:
        for row in SECTIONS[name](chosen):
            measured.append(row)
            print("\n".join(table([row]).splitlines()[-1:]), flush=True)
            if options.json is not None:
                write_json(options.json, dict(environment=setting, rows=[r.record() for r in measured]))
    print(table(measured))
    print(f"\n{summary(measured)}")


if __name__ == "__main__":
    main()
