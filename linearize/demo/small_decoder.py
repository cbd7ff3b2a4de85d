"""`linearize demo --small`: the shipped decoder, from inspection to a compiled, saved, linear model."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from ..calibration.calibrate import calibrate
from ..convert.inspect import inspect
from ..convert.linearize import linearize
from ..evaluation import evaluate
from . import MODEL
from .load import linear_record, load_demo
from .steps import draw, encode, logits, store, timed

WINDOW = 512
"""Tokens per window: the length the model was trained at."""
CALIBRATION_WINDOWS = 24
LENGTHS = (256, 1024, 2048, 4096)
PROMPT = "import os\nimport sys\n\n\ndef main("


def run(console: Console, plot: Path) -> None:
    """Tell the story on `console` and draw its curves into `plot`. Every number is measured in this run."""
    began = time.perf_counter()
    model, tokenizer = load_demo()
    name, text = held_out_text()
    ids = windows(encode(tokenizer, text))
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"A {type(model).__name__} of {parameters / 1e6:.1f} million parameters, trained on the Python "
        f"standard library. Text: {name}, which training did not see, {ids.numel()} tokens.\n"
    )
    console.rule("1. find and prove", align="left")
    console.print(inspect(model))
    console.rule("2. the identity check", align="left")
    check_identity(console, model, ids)
    console.rule("3. convert, calibrate, tune", align="left")
    models = {"softmax": model, **recover(console, model, tokenizer)}
    compare(console, models, tokenizer, ids)
    console.rule("4. speed and memory against length", align="left")
    tuned = models["paper's form, tuned"]
    found = evaluate(
        tuned, ids.flatten(), reference=model, lengths=LENGTHS, decode_tokens=16, name=f"{name}, held out"
    )
    console.print(found)
    draw(console, found, plot)
    console.rule("5. the compiler", align="left")
    compile_both(console, model, models["converted"], ids)
    console.rule("6. save and load", align="left")
    store(console, tuned, ids[:2])
    console.print(f"\nDone in {time.perf_counter() - began:.0f} s on {torch.get_num_threads()} threads.")


def check_identity(console: Console, model: Any, ids: Tensor) -> None:
    """Show that the rewrite with exact softmax changes nothing; ids: `[B, T]`."""
    exact = linearize(copy.deepcopy(model), mechanism="softmax")
    difference = (logits(exact, ids[:2]) - logits(model, ids[:2])).abs().max().item()
    console.print(
        "Every site replaced by one exact softmax call: if the matcher had misread a mask, a scale or a "
        f"head, the output would differ.\nlargest difference of any logit: [bold]{difference:.1e}[/bold]\n"
    )


def recover(console: Console, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The model converted; in the paper's form, calibrated; and the one in that form, tuned, that ships."""
    linear, seconds = timed(lambda: linearize(copy.deepcopy(model)))
    console.print(f"linearize(model) took {seconds:.1f} s, finding, proving and rewriting included.")
    calibrated = linearize(copy.deepcopy(model), mechanism="augmented_paper")
    text_to_fit = windows(encode(tokenizer, training_text()))[:CALIBRATION_WINDOWS]
    report, seconds = timed(lambda: calibrate(calibrated, text_to_fit.split(2)))
    console.print(f"calibrate(model, batches) took {seconds:.1f} s for {report.tokens} tokens, no gradient.")
    tuned, _ = load_demo(linear=True)
    record = linear_record()
    console.print(
        f"Tuned is the linear model that ships: distilled from the original on {record['tokens']:,} tokens, "
        f"{record['tokens'] / record['tokens_of_original']:.0%} of what the original was trained on.\n"
    )
    return {"converted": linear, "paper's form, calibrated": calibrated, "paper's form, tuned": tuned}


def compare(console: Console, models: dict[str, Any], tokenizer: Any, ids: Tensor) -> None:
    """A table of perplexity on windows ids `[B, T]`, and of what each model writes."""
    table = Table("", "perplexity on the text above", "its own text", title_justify="left")
    for label, which in models.items():
        written = sample(which, tokenizer, PROMPT)
        table.add_row(
            label, f"{perplexity(which, ids):.1f}", Text(written.removeprefix(PROMPT)), end_section=True
        )
    console.print(table)
    console.print(f"Each continues {PROMPT!r} greedily.\n")


def compile_both(console: Console, model: Any, linear: Any, ids: Tensor) -> None:
    """Show that the compile backend computes what the converted model does; ids: `[B, T]`."""
    # Inductor writes C++; without a compiler for it the rewritten graph still runs, as it is.
    inner = "inductor" if shutil.which("g++") else "aot_eager"
    compiled = torch.compile(model, backend="linearize", options={"inner": inner})
    result, seconds = timed(partial(logits, compiled, ids[:2]))
    difference = (result - logits(linear, ids[:2])).abs().max().item()
    costs = [best(partial(logits, which, ids[:2])) for which in (linear, compiled)]
    console.print(
        f'torch.compile(model, backend="linearize") on the softmax model: {seconds:.0f} s, then by {inner}.\n'
        f"largest difference from linearize(model): {difference:.1e}\n"
        f"forward pass, 2 x {WINDOW} tokens: {costs[0]:.0f} ms, compiled {costs[1]:.0f} ms\n"
    )


def held_out_text() -> tuple[str, str]:
    """Name and contents of a standard library file that the demo model was not trained on."""
    record = json.loads((MODEL / "training.json").read_text())["snippet"]
    path = Path(sysconfig.get_path("stdlib")) / record["file"]
    # A Python without its library's source still has the beginning of the file.
    return record["file"], path.read_text(encoding="utf-8") if path.is_file() else record["text"]


def training_text() -> str:
    """Some of what the demo model was trained on."""
    library = Path(sysconfig.get_path("stdlib"))
    files = (
        library / name for name in ("argparse.py", "inspect.py", "subprocess.py", "typing.py", "tarfile.py")
    )
    return "\n".join(path.read_text(encoding="utf-8") for path in files if path.is_file())


def windows(ids: Tensor) -> Tensor:
    """Token ids `[N]` cut into `[N // WINDOW, WINDOW]`; the rest is dropped."""
    count = max(1, ids.numel() // WINDOW)
    return ids[: count * WINDOW].reshape(count, -1)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token, in nats."""
    scores = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """exp of the mean loss per predicted token over the windows, each on its own."""
    return math.exp(sum(loss(model, row[None]).item() for row in ids) / len(ids))


def sample(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy continuation of `prompt` by 40 tokens."""
    ids = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def best(work: Callable[[], Any], repeats: int = 3) -> float:
    """Milliseconds of the fastest of a few runs, after one to warm up."""
    work()
    return min(timed(work)[1] for _ in range(repeats)) * 1e3
