"""The command line: what stands behind `linearize` and `python -m linearize`.

A command is a function with typer's annotations in one of the modules here, and a line in `COMMANDS`; its
docstring is its help. `sources` finds models, tokenizers and their files, `options` has what several commands
share and groups of options, `terminal` prints tables. Modules import torch, transformers and the package's
own parts inside the functions that need them: `--help` and mistakes in typing import none of them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from rich.console import Console

from ..errors import ConfigError, LinearizeError
from . import about, convert, evaluation, generation, hybrid, onnx, training
from .options import grouped, takes_path

COMMANDS: dict[str, Callable[..., None]] = {
    "version": about.version,
    "demo": about.demo,
    "inspect": convert.inspect,
    "plan": hybrid.plan,
    "convert": convert.convert,
    "distill": training.distill,
    "eval": evaluation.evaluate,
    "lm-eval": evaluation.lm_eval,
    "generate": generation.generate,
    "mechanisms": about.mechanisms,
    "export": onnx.export,
    "train-heads": generation.train_heads,
    "build-library": onnx.build_library,
}
"""By the name that a user types, in the order of `linearize --help`."""
_PASSED_ON = dict(
    context_settings=dict(allow_extra_args=True, ignore_unknown_options=True), add_help_option=False
)
_SETTINGS: dict[str, dict[str, Any]] = {"lm-eval": _PASSED_ON}

app = typer.Typer(
    help="Find any softmax attention in a model, prove it, and rewrite it to linear attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_GROUPED = {name: grouped(command) for name, command in COMMANDS.items()}
for _name, _command in _GROUPED.items():
    app.command(_name, **_SETTINGS.get(_name, {}))(_command)


_PATHS = {
    f"--{name.replace('_', '-')}"
    for command in _GROUPED.values()
    for name, parameter in inspect.signature(command).parameters.items()
    if takes_path(parameter)
}


def _check_words(words: Sequence[str]) -> None:
    """Raise ConfigError for an empty name: `"$OUT"` where OUT is not set would be the current folder."""
    for before, word in zip(["-", *words], words, strict=False):
        if not word and (before in _PATHS or not before.startswith("-")):
            what = before if before.startswith("-") else f"what follows {before}"
            raise ConfigError(f"{what} is empty; a variable that is not set? `.` is the current folder")


def main() -> None:
    """Entry point. An error made by the package is one line on stderr and exit code 1."""
    try:
        _check_words(sys.argv[1:])
        app()
    except LinearizeError as error:
        # soft_wrap: one line in a pipe too, whatever width is assumed for it.
        text = f"error: {error}"
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
