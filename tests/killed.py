"""A process that is killed in the middle of its work on files, at a place that a test chooses."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

STEPS = ("replace", "rename", "link", "unlink", "rmdir", "mkdir")
"""The changes of a folder at which it may end."""


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do some work in a process that ends, without a word, before its `step`-th change of a folder; False
    where the work has no such."""
    child = os.fork()
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
