"""What becomes of work that cannot end as it should: a second place for a result, and a word at Ctrl-C."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from ..common.files import shown
from ..errors import CheckpointError, ExportError

STOPPED = 130
"""The exit code of what Ctrl-C ended, as shells have it."""


def save_or_rescue(save: Callable[[Path], object], target: Path) -> None:
    """Save to a folder or a file. Where that cannot be written, save to another one and raise CheckpointError
    or ExportError, as `save` does, which names it."""
    problem: CheckpointError | ExportError
    try:
        save(target)
        return
    except CheckpointError as error:
        problem = error
    except ExportError as error:
        if not isinstance(error.__cause__, OSError):  # the model has no such form, here or elsewhere
            raise
        problem = error
    suffix = target.suffix if target.suffix == ".onnx" else ""
    name = target.name.removesuffix(suffix)[:80] or "model"
    for place in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        second = place / f"{name}-{secrets.token_hex(4)}{suffix}"
        with contextlib.suppress(CheckpointError, ExportError):
            save(second)
            break
    else:
        raise problem
    raise type(problem)(f"{problem}; it was saved to {shown(second)} instead") from problem


@contextlib.contextmanager
def stopping(kept: Callable[[], str]) -> Iterator[None]:
    """Say at Ctrl-C what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nstopped: {kept()}", err=True)
        raise typer.Exit(STOPPED) from None
