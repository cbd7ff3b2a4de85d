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
from typing import Annotated, Any

import typer

from ..common.version import __version__
from ..errors import ConfigError
from . import about, bench, convert, environment, evaluation, generation, hybrid, onnx, training
from .options import grouped, takes_path
from .session import Loudness, saying, tell

COMMANDS: dict[str, Callable[..., None]] = {
    "version": about.version,
    "env": environment.env,
    "demo": about.demo,
    "inspect": convert.inspect,
    "plan": hybrid.plan,
    "convert": convert.convert,
    "distill": training.distill,
    "eval": evaluation.evaluate,
    "lm-eval": evaluation.lm_eval,
    "bench": bench.bench,
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
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut long options in a terminal of 80 columns
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and exit")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars, no warnings")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say where an error came from")] = False,
) -> None:
    context.obj = Loudness(quiet, verbose)


_GROUPED = {name: grouped(command) for name, command in COMMANDS.items()}
for _name, _command in _GROUPED.items():
    _first = " ".join((_command.__doc__ or "").split("\n\n")[0].split())
    app.command(_name, short_help=_first, **_SETTINGS.get(_name, {}))(saying(_command))


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
    except ConfigError as error:
        tell(str(error))
        sys.exit(1)
    app()
