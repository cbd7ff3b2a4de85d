"""A process that is killed in the middle of its work on files, at a place that a test chooses."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm

STEPS = ("replace", "rename", "link", "unlink", "rmdir", "mkdir")
"""The changes of a folder at which it may end."""


def forked() -> int:
    """As `os.fork`, with a lock of its own for progress bars: all processes share that of tqdm, and who is
    killed while it has that one stops the others for ever."""
    child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())
    return child


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do some work in a process that ends, without a word, before its `step`-th change of a folder; False
    where the work has no such."""
    child = forked()
    if child == 0:
        count = iter(range(100_000))

        def counted(change: Any) -> Any:
            def one(*args: Any, **kwargs: Any) -> Any:
                if next(count) == step:
                    os._exit(9)
                return change(*args, **kwargs)

            return one

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@contextlib.contextmanager
def working(work: Callable[[], object]) -> Iterator[None]:
    """A process that does some work again and again; it is killed (SIGKILL) at the end."""
    child = forked()
    if child == 0:
        try:
            while True:
                work()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it failed by itself"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def kill_after(seconds: float, work: Callable[[], object]) -> None:
    """Do some work again and again in a process, and kill it in the middle."""
    with working(work):
        time.sleep(seconds)
