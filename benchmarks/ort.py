"""An exported model on onnxruntime's CPU provider, converted against the softmax original.

    python benchmarks/ort.py [--quick] [--section NAME ...] [--threads 1] [--json FILE]

`softmax` is the original as onnxruntime-genai's own model builder exports it: com.microsoft
GroupQueryAttention with rotary embedding inside, fused norms, and a cache of keys and values that is written
in place. `body` and `library` are one file, written by `export_onnx`, without and with our operators.
The model is the shipped demo decoder: 4 layers, 8 heads of 32 on 4 key/value heads, room for 32k tokens.
Both exports give the logits of the last token alone, which is all that generation reads (`prune_lm_head`,
`last_logits`). A prompt goes through ours as `OrtModel` runs it, in pieces of 1024 tokens, and through
softmax whole: in pieces it took the same time. All sides are measured in one run, turn by turn, medians:
processor time with one thread, wall time with several.

Needs the extras `[onnx,bench]`, onnxruntime-genai, and for `library` what `linearize build-library` built.
"""

# Not named onnx.py: a script's folder comes first where Python looks for the package onnx.
from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from cpu import Timed, compare, environment, lines
from measured import Row, summary, table, write_json

import linearize as lz
from linearize.onnx import library
from linearize.onnx.runtime import OrtModel

PREFILL_GOALS = {4096: 2.0, 16384: 8.0}
DECODE_GOALS = {16384: 5.0}
LIBRARY_GOAL = 1.5
"""Decoding, library against body."""
FLAT_GOAL = 0.8
"""Decoding at the longest context: how many times faster it may be at the shortest, inverted."""
OURS = ("body", "library")


@dataclass(frozen=True)
class Sizes:
    """prefill: tokens of the prompt. decode: tokens before the one that is decoded. layers: of the model."""

    prefill: tuple[int, ...] = (1024, 4096, 16384)
    decode: tuple[int, ...] = (1024, 4096, 16384)
    layers: int = 4
    seconds: float = 2.0


QUICK = Sizes(prefill=(256, 1024), decode=(256, 1024), seconds=0.2)


@dataclass(frozen=True)
class Files:
    """Folders of the two exports, and why a side is missing."""

    softmax: Path | None
    ours: Path
    notes: dict[str, str]


def export(folder: Path, room: int, layers: int) -> Files:
    """Export the demo model both ways; `room` is the longest sequence that the original can take."""
    model, tokenizer = lz.load_demo()
    model.config.max_position_embeddings = room
    model.config.num_hidden_layers = layers
    del model.model.layers[layers:]
    notes = {}
    softmax: Path | None = folder / "softmax"
    if find_spec("onnxruntime_genai") is None:
        softmax, notes["softmax"] = None, "onnxruntime-genai is not installed"
    else:
        model.save_pretrained(folder / "original")
        tokenizer.save_pretrained(folder / "original")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
        command += ["-i", folder / "original", "-o", softmax, "-c", folder / "cache"]
        command += ["--extra_options", "prune_lm_head=true"]
        subprocess.run(command, check=True, capture_output=True)
    lz.export_onnx(lz.linearize(model, mechanism="augmented_paper"), folder / "ours", last_logits=True)
    if library.unavailable_reason() is not None:
        notes["library"] = str(library.unavailable_reason())
    return Files(softmax, folder / "ours", notes)


def options(threads: int) -> onnxruntime.SessionOptions:
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = threads
    return made


Call = Callable[[], Any]


class Softmax:
    """The original with its keys and values in buffers of one size, as genai runs it."""

    def __init__(self, folder: Path, threads: int) -> None:
        path = folder / "model.onnx"
        self.session = onnxruntime.InferenceSession(path, options(threads), ["CPUExecutionProvider"])
        self.caches = [node for node in self.session.get_inputs() if node.name.startswith("past")]
        config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        self.heads, self.dim = config["num_key_value_heads"], config["head_size"]

    def call(self, tokens: int, before: int) -> Call:
        """`tokens` tokens after `before` others."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids(tokens))
        binding.bind_cpu_input("attention_mask", np.ones((1, before + tokens), np.int64))
        numbers = np.random.default_rng(0)
        for node in self.caches:
            held = numbers.standard_normal((1, self.heads, before + tokens, self.dim), np.float32)
            cache = onnxruntime.OrtValue.ortvalue_from_numpy(held)
            binding.bind_ortvalue_input(node.name, cache)
            binding.bind_ortvalue_output(node.name.replace("past_key_values", "present"), cache)
        binding.bind_output("logits")
        return partial(self.session.run_with_iobinding, binding)


class Ours:
    """The converted model, by its body or by the library."""

    def __init__(self, folder: Path, threads: int, with_library: bool) -> None:
        self.model = OrtModel(folder, options=options(threads), library=with_library)
        assert (self.model.obstacle is None) == with_library, self.model.obstacle

    def call(self, tokens: int, before: int) -> Call:
        """`tokens` tokens after `before` others."""
        if not before:
            prompt = torch.from_numpy(ids(tokens))
            return lambda: self.model(prompt)
        states = self.model(torch.from_numpy(ids(before))).past_key_values
        binding = self.model.session.io_binding()
        binding.bind_cpu_input("input_ids", ids(tokens))
        binding.bind_cpu_input("attention_mask", np.ones((1, before + tokens), np.int64))
        if "position_ids" in self.model.inputs:
            binding.bind_cpu_input("position_ids", np.arange(before, before + tokens)[None])
        for name, held in states.values.items():
            binding.bind_ortvalue_input(name, held)
        for name in self.model.outputs:
            binding.bind_output(name)
        return partial(self.model.session.run_with_iobinding, binding)


def ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(2, 4000, (1, count))


def measure(files: Files, threads: int, sizes: Sizes, section: str) -> Iterator[Row]:
    sides: dict[str, Any] = {}
    if files.softmax is not None:
        sides["softmax"] = Softmax(files.softmax, threads)
    for name in OURS:
        if name not in files.notes:
            sides[name] = Ours(files.ours, threads, name == "library")
    notes = {name: note for name, note in files.notes.items() if name in OURS}
    lengths = sizes.prefill if section == "prefill" else sizes.decode
    goals = PREFILL_GOALS if section == "prefill" else DECODE_GOALS
    found: dict[int, dict[str, Timed]] = {}
    for length in lengths:
        calls = {
            name: side.call(length, 0) if section == "prefill" else side.call(1, length)
            for name, side in sides.items()
        }
        timed = found[length] = compare(calls, sizes.seconds)
        case = f"{length} tokens" if section == "prefill" else f"1 token after {length}"
        wanted = dict.fromkeys(OURS, goals[length]) if length in goals else {}
        yield from lines(section, case, timed, "softmax", wanted, notes, length=length)
        if section == "decode" and "library" in timed:
            pair = timed["library"].ms, timed["body"].ms
            yield Row(section, case, "library", "body", *pair, LIBRARY_GOAL, "", dict(length=length))
    if section == "decode":
        first, last = lengths[0], lengths[-1]
        for name in OURS:
            if name in sides:
                pair = found[last][name].ms, found[first][name].ms
                case = f"1 token after {last} against after {first}"
                yield Row("flat", case, name, name, *pair, FLAT_GOAL, "", dict(length=last))


def main(argv: list[str] | None = None, sizes: Sizes | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = ("prefill", "decode")
    parser.add_argument("--quick", action="store_true", help="short lengths")
    parser.add_argument("--section", nargs="+", choices=sections, default=sections)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    sizes = sizes or (QUICK if given.quick else Sizes())
    setting = {**environment(), "onnxruntime": onnxruntime.__version__}
    print(", ".join(f"{key} {value}" for key, value in setting.items()), flush=True)
    folder = Path(tempfile.mkdtemp(prefix="linearize-ort-"))
    measured: list[Row] = []
    try:
        files = export(folder, 2 * max(*sizes.prefill, *sizes.decode), sizes.layers)
        for section in given.section:
            part = list(measure(files, given.threads, sizes, section))
            measured += part
            print(table(part), flush=True)
            if given.json is not None:
                write_json(given.json, dict(environment=setting, rows=[row.record() for row in measured]))
    finally:
        shutil.rmtree(folder)
    print(f"\n{summary(measured)}")


if __name__ == "__main__":
    main()
