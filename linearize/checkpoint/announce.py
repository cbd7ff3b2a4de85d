"""Announcing the load hook to transformers without importing transformers.

`from_pretrained` looks its quantizers up in `transformers.quantizers.auto`. The hook is registered there when
that module is first imported, by whoever does it: importing `linearize` alone loads neither.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"


def announce() -> None:
    """Register the load hook now if transformers' quantizers are loaded, else when they are. Idempotent."""
    if QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from .hook import register

    register()


class _Finder(MetaPathFinder):
    """Finds the one module, and steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads the module as its own loader does, then registers the hook with it."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._own
        self._own.exec_module(module)
        _register()
