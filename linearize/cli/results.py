"""What becomes of work that cannot end as it should: a second place for a result, and a word at Ctrl-C."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from ..common.files import shown
from ..errors import CheckpointError

STOPPED = 130
"""The exit code of what Ctrl-C ended, as shells have it."""


def save_or_rescue(save: Callable[[Path], object], target: Path) -> None:
    """Save to a folder. Where that fails, save to another one and raise CheckpointError, which names it."""
    try:
        save(target)
        return
    except CheckpointError as error:
        problem = error
    for place in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        second = place / f"{target.name[:80] or 'model'}-{secrets.token_hex(4)}"
        with contextlib.suppress(CheckpointError):
            save(second)
            break
    else:
        raise problem
    raise CheckpointError(f"{problem}; it was saved to {shown(second)} instead") from problem


@contextlib.contextmanager
def stopping(kept: Callable[[], str]) -> Iterator[None]:
    """Say at Ctrl-C what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nstopped: {kept()}", err=True)
        raise typer.Exit(STOPPED) from None
