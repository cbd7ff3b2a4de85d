"""Announcing the load hook to transformers without importing transformers.

`from_pretrained` looks its quantizers up in `transformers.quantizers.auto`. The hook is registered there each
time that module is imported or reloaded, by whoever does it: importing `linearize` alone loads neither.

The finder stays on `sys.meta_path`. It cannot leave when it was asked: who asks may only be probing
(`importlib.util.find_spec`), and another thread may be going through the list.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

QUANTIZERS = "transformers.quantizers.auto"


def announce() -> None:
    """Register the load hook whenever transformers' quantizers are imported, and now if they are.

    Idempotent.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if QUANTIZERS in sys.modules:
        _register()


def _register() -> None:
    from .hook import register

    register()


class _Finder(MetaPathFinder):
    """Finds the one module as the other finders do, and puts our loader around theirs."""

    def __init__(self) -> None:
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # A finder that we ask may in turn ask all others, us included.
        if fullname != QUANTIZERS or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = _find(fullname, path, target)
        finally:
            self._asking.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def _find(fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    """What the first finder that knows the module says."""
    for finder in tuple(sys.meta_path):
        find_spec = getattr(finder, "find_spec", None)
        spec = None if find_spec is None else find_spec(fullname, path, target)
        if spec is not None:
            return spec
    return None


class _Loader(Loader):
    """Loads the module as its own loader does, then registers the hook with it."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        module.__loader__ = self._own
        self._own.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        # For who only looks: the source, the file name, whatever this kind of loader tells.
        return getattr(self._own, name)
