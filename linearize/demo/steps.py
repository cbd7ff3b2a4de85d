"""What both stories of `linearize demo` do alike."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..checkpoint.saving import load, save
from ..errors import MissingExtraError
from ..evaluation.result import Evaluation


@torch.no_grad()
def logits(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """`[B, T]` -> `[B, T, vocabulary]`."""
    return model(input_ids=ids, use_cache=False).logits


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids `[N]` of a whole file, for which calling the tokenizer itself would print a warning."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def draw(console: Console, found: Evaluation, plot: Path) -> None:
    """The curves of an evaluation into the image file `plot`, where matplotlib is installed."""
    try:
        found.plot(plot)
        console.print(f"The curves are in {plot}.\n")
    except MissingExtraError as error:
        console.print(f"No picture of the curves: {error}\n")


def store(console: Console, model: Any, ids: Tensor) -> None:
    """Save the model, load it, and show that both compute the same bits; ids: `[B, T]`."""
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "model")
        size = sum(file.stat().st_size for file in path.iterdir())
        equal = torch.equal(logits(load(path), ids), logits(model, ids))
    console.print(f"Saved: {size / 1e6:.1f} MB, the same logits bit for bit after loading: {equal}")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `work` and the seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start
