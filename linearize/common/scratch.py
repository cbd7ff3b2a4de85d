"""Temporary folders beside the files that they become; those of writers that were killed go with the next.

A writer holds a lock in its folder for as long as it lives, and the system lets go of it however the writer
ends. So whoever gets the lock of such a folder knows that nobody writes there any more. Where the system or
the file system has no such locks, nothing is removed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX = ".linearize-"
"""No other program names its folders so."""
ALIVE, KEPT = ".alive", ".kept"
"""In a temporary folder: what its writer holds the lock of, and a mark that its files are read where they
are."""
_WAIT = 30.0
"""Seconds to wait for others, who only move files. After that the work is worth more than the order."""


@contextlib.contextmanager
def scratch_folder(place: Path, home: Path) -> Iterator[Path]:
    """A new folder inside `place`, removed afterwards unless it was renamed to `home` or is kept.

    It may be moved into `home` under its own name as well. Raises OSError.
    """
    remove_abandoned(place)
    remove_abandoned(home.parent)
    with locked(place):
        scratch = place / f"{PREFIX}{secrets.token_hex(4)}"
        scratch.mkdir(mode=0o700)
        (scratch / ALIVE).touch()
        lock = _take(scratch / ALIVE)
    try:
        yield scratch
    finally:
        for folder in (scratch, home / scratch.name):
            if not (folder / KEPT).exists():
                shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(place: Path, settle: Callable[[Path], None] | None = None) -> None:
    """Remove the temporary folders in `place` whose writers are gone; those that cannot be removed stay.

    settle: for folders that are kept; they are removed too when it does not raise OSError.
    """
    with contextlib.suppress(OSError):
        found = [x for x in place.glob(f"{PREFIX}*") if x.is_dir() and not x.is_symlink()]
        if not found or fcntl is None:
            return
        with locked(place):
            for folder in found:
                with contextlib.suppress(OSError):
                    _remove(folder, settle)


def _remove(folder: Path, settle: Callable[[Path], None] | None) -> None:
    lock = None
    # A writer makes its folder and takes the lock while it holds that of the place, as we do.
    if (folder / ALIVE).exists():
        lock = _take(folder / ALIVE, 0)
        if lock is None:
            return
    try:
        if (folder / KEPT).exists():
            if settle is None:
                return
            settle(folder)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Others who ask for this wait meanwhile. Where there are no such locks, nobody does."""
    lock = _take(folder)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _take(path: Path, wait: float = _WAIT) -> int | None:
    """A descriptor that holds the lock of a file or folder; None where it is not to be had."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (OSError, ValueError):  # a NUL in a name is the latter
        return None
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.005)
                continue
        except OSError:
            pass
        os.close(descriptor)
        return None
