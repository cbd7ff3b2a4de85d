"""`linearize version | mechanisms | demo`: what the package is, has and does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..common.version import __version__
from .before import check_file
from .results import stopping
from .sources import hide_bars
from .terminal import console


def version() -> None:
    """Print the versions that matter for a bug report."""
    import torch
    import transformers

    typer.echo(f"linearize {__version__}, torch {torch.__version__}, transformers {transformers.__version__}")


def mechanisms() -> None:
    """List what can take a softmax's place: formula, options with defaults, and the kinds of site it fits.

    The column augmentation says whether the convolution over values is added unless asked otherwise.
    """
    from ..mechanisms import available

    kinds = ("causal", "bidirectional", "cross")
    table = Table("mechanism", "formula", "options", "augmentation", *kinds)
    for mechanism in available().values():
        options = [
            f"{name}={option.default} ({option.expected}): {option.meaning}"
            for name, option in mechanism.options.items()
        ]
        augmentation = {True: "yes", False: "no", None: "never"}[mechanism.augmentation]
        fits = ["yes" if kind in mechanism.supports else "no" for kind in kinds]
        texts = Text(mechanism.formula), Text("\n".join(options))  # their brackets are no markup
        table.add_row(mechanism.name, *texts, augmentation, *fits)
    console(160).print(table)


def demo(
    threads: Annotated[int, typer.Option(help="torch threads; 0 keeps torch's choice")] = 0,
    plot: Annotated[Path, typer.Option(help="image of perplexity, time and memory against length")] = Path(
        "linearize-demo.png"
    ),
    small: Annotated[bool, typer.Option("--small", help="the decoder that ships, in a minute")] = False,
) -> None:
    """The whole story on SmolLM2-135M, or on the decoder that ships. Offline, under six minutes."""
    import torch

    from ..demo.walkthrough import run
    from ..evaluation.plot import check_format

    check_format(plot)
    check_file(plot)
    hide_bars()
    if threads:
        torch.set_num_threads(threads)
    with stopping(lambda: "nothing was written"):
        run(console(120), plot, small)
