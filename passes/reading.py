"""Which attributes of a module and of those in it a call looks at."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .blocks import Place


class _Everything(set[Place]):
    """Holds every place."""

    def __rand__(self, other: Any) -> set[Place]:
        return set(other)


@dataclass
class Watched:
    """The places that were looked at."""

    places: set[Place] = field(default_factory=set)

    def note(self, path: str, name: str, looks: str) -> None:
        """looks: the module of the code that does; torch's own goes through the whole of a module."""
        if name != "__dict__":
            self.places.add((path, name))
        elif not looks.startswith("torch."):
            self.places = _Everything()


@contextlib.contextmanager
def watched(block: nn.Module, seen: Watched) -> Iterator[None]:
    """Inside, what is read of the modules of a block is noted. Not for modules that others use meanwhile."""
    before: list[tuple[Any, type]] = []
    try:
        for path, part in block.named_modules():
            kind: Any = type(part)
            before.append((part, kind))
            part.__class__ = _watching(kind, path, seen)
        yield
    finally:
        for part, kind in before:
            part.__class__ = kind


def _watching(kind: Any, path: str, seen: Watched) -> Any:
    def read(part: Any, name: str) -> Any:
        seen.note(path, name, sys._getframe(1).f_globals.get("__name__", ""))
        return super(cls, part).__getattribute__(name)

    members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__getattribute__": read}
    cls: Any = type(kind.__name__, (kind,), members)
    return cls
