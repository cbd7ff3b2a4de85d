"""`linearize demo`: the shipped decoder, from inspection to a compiled, saved, linear model. Offline."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from .api import linearize
from .checkpoint import load, save
from .demo import load_demo
from .report import inspect

WINDOW = 512
"""Tokens per window: the length the model was trained at."""
TUNING_STEPS = 30


def run(console: Console) -> None:
    """Tell the story on `console`. Every number printed is measured in this run."""
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
    exact = linearize(copy.deepcopy(model), mechanism="softmax")
    difference = (logits(exact, ids[:2]) - logits(model, ids[:2])).abs().max().item()
    console.print(
        "Every site replaced by one exact softmax call: if the matcher had misread a mask, a scale or a "
        f"head, the output would differ.\nlargest difference of any logit: [bold]{difference:.1e}[/bold]\n"
    )

    console.rule("3. convert", align="left")
    linear, seconds = timed(lambda: linearize(copy.deepcopy(model)))
    console.print(f"linearize(model) took {seconds:.1f} s, finding, proving and rewriting included.\n")
    before, after = perplexity(model, ids), perplexity(linear, ids)
    tune, tune_seconds = timed(lambda: adapt(linear, windows(encode(tokenizer, training_text()))))
    tuned = perplexity(linear, ids)
    console.print(
        f"perplexity on the text above:  softmax {before:.1f}   converted {after:.1f}   "
        f"after {tune} steps of tuning ({tune_seconds:.0f} s) {tuned:.1f}\n"
        "A conversion changes what the weights were trained for, so it hurts until the model is tuned.\n"
    )
    for length in (512, 2048):
        batch = ids.flatten()[:length][None]
        costs = [best(partial(logits, which, batch)) for which in (model, linear)]
        console.print(
            f"forward pass, {batch.shape[1]} tokens: softmax {costs[0]:.0f} ms, linear {costs[1]:.0f} ms"
        )

    console.print()

    console.rule("4. generate", align="left")
    prompt = "import os\nimport sys\n\n\ndef main("
    for label, which in (("softmax", model), ("linear, tuned", linear)):
        console.print(f"[bold]{label}[/bold]")
        console.print(sample(which, tokenizer, prompt), markup=False, highlight=False)
        console.print()

    console.rule("5. the compiler", align="left")
    fresh = linearize(copy.deepcopy(model))
    # Inductor writes C++; without a compiler for it the rewritten graph still runs, as it is.
    inner = "inductor" if shutil.which("g++") else "aot_eager"
    compiled = torch.compile(model, backend="linearize", options={"inner": inner})
    result, seconds = timed(partial(logits, compiled, ids[:2]))
    difference = (result - logits(fresh, ids[:2])).abs().max().item()
    costs = [best(partial(logits, which, ids[:2])) for which in (fresh, compiled)]
    console.print(
        f'torch.compile(model, backend="linearize") on the softmax model: {seconds:.0f} s, then by {inner}.\n'
        f"largest difference from linearize(model): {difference:.1e}\n"
        f"forward pass, 2 x {WINDOW} tokens: {costs[0]:.0f} ms, compiled {costs[1]:.0f} ms\n"
    )

    console.rule("6. save and load", align="left")
    with tempfile.TemporaryDirectory() as folder:
        path = save(linear, Path(folder) / "model")
        size = sum(file.stat().st_size for file in path.iterdir())
        again = load(path)
        equal = torch.equal(logits(again, ids[:2]), logits(linear, ids[:2]))
    console.print(f"The tuned model: {size / 1e6:.1f} MB, the same logits bit for bit after loading: {equal}")
    console.print(f"\nDone in {time.perf_counter() - began:.0f} s on {torch.get_num_threads()} threads.")


def held_out_text() -> tuple[str, str]:
    """Name and contents of a standard library file that the demo model was not trained on."""
    record = json.loads((Path(__file__).parent / "demo_model" / "training.json").read_text())["snippet"]
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


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids `[N]` of a whole file, for which calling the tokenizer itself would print a warning."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def windows(ids: Tensor) -> Tensor:
    """Token ids `[N]` cut into `[N // WINDOW, WINDOW]`; the rest is dropped."""
    count = max(1, ids.numel() // WINDOW)
    return ids[: count * WINDOW].reshape(count, -1)


@torch.no_grad()
def logits(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """`[B, T]` -> `[B, T, vocabulary]`."""
    return model(input_ids=ids, use_cache=False).logits


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next token, in nats."""
    scores = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """exp of the mean loss per predicted token over the windows, each on its own."""
    return math.exp(sum(loss(model, row[None]).item() for row in ids) / len(ids))


def adapt(model: nn.Module, ids: Tensor, steps: int = TUNING_STEPS) -> int:
    """A short, plain tuning of all parameters on windows of training text; returns the number of steps."""
    torch.manual_seed(0)
    new = [p for name, p in model.named_parameters() if "linear_attention" in name]
    old = [p for name, p in model.named_parameters() if "linear_attention" not in name]
    # The new parameters start at zero and have far to go; the old ones know most of what they need.
    optimizer = torch.optim.AdamW(
        [{"params": new, "lr": 1e-2}, {"params": old, "lr": 5e-4}], weight_decay=0.0
    )
    model.train()
    for _ in range(steps):
        loss(model, ids[torch.randint(len(ids), (4,))]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return steps


def sample(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy continuation of `prompt` by 40 tokens."""
    ids = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `work` and the seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def best(work: Callable[[], Any], repeats: int = 3) -> float:
    """Milliseconds of the fastest of a few runs, after one to warm up."""
    work()
    return min(timed(work)[1] for _ in range(repeats)) * 1e3
