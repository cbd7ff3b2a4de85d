"""Where commands print tables."""

from __future__ import annotations

import sys

from rich.console import Console


def console(width: int, *, stderr: bool = False) -> Console:
    """The terminal as wide as it is; `width` columns in a pipe or file, which have no width of their own."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else width)
