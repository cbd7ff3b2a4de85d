"""Progress bars on terminals and in notebooks. Where none is shown no part of tqdm is made, nor its locks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

Tick = Callable[[int], None]
"""Says how much more is done."""


def shows(progress: bool | None) -> bool:
    """Whether bars are shown. progress: what was asked for; None asks whether somebody is there to look."""
    if progress is not None:
        return progress
    stream = sys.stderr
    return _in_notebook() or (stream is not None and stream.isatty())


def _in_notebook() -> bool:
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


@contextlib.contextmanager
def bar(what: str, total: int | None, progress: bool | None, unit: str = "it") -> Iterator[Tick]:
    """A bar that is gone in the end.

    Args:
        what: What is being done.
        total: How much there is to do; None where nobody knows.
        progress: As for `shows`.
        unit: Of what is counted.

    Yields:
        What says how much more is done.
    """
    if not shows(progress):
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    scale = unit == "tokens"
    with tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=scale, leave=False) as line:
        yield lambda count: _advance(line, count)


def _advance(line: Any, count: int) -> None:
    room = count if line.total is None else line.total - line.n
    line.update(max(0, min(count, room)))


@contextlib.contextmanager
def steps(what: str, count: int, progress: bool | None) -> Iterator[Callable[[str], None]]:
    """A bar over steps that have names. Yields what says that one begins."""
    if not shows(progress):
        yield lambda name: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=count, leave=False, bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} {elapsed}") as line:

        def begin(name: str) -> None:
            line.n += 1
            line.set_description_str(f"{what}: {name}")  # at once: a step may take long

        yield begin
