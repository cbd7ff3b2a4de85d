"""What can take a softmax's place: one file per mechanism, found by its `MECHANISM`.

To add one, add a file here that defines `MECHANISM = Mechanism(...)`; nothing else lists them. Most are
compositions (`composed.py`): maps of query and key, calls of the one core operator, and what joins them.
These have a state and an ONNX form without saying more; one with a form of its own says it in its file
(`windowed.py`, `onnx_form.py`).
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType

from ..common.checks import unknown
from ..errors import ConfigError
from ..kernels import window_chunk as _window_chunk  # noqa: F401  its operators may be in saved graphs
from .base import Mechanism, Option

__all__ = ["Mechanism", "Option", "available", "get"]


@cache
def available() -> Mapping[str, Mechanism]:
    """Every mechanism by name."""
    files = [import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__)]
    found = [file.MECHANISM for file in files if hasattr(file, "MECHANISM")]
    return MappingProxyType({mechanism.name: mechanism for mechanism in found})


def get(name: str) -> Mechanism:
    """The mechanism called `name`. Raises ConfigError, listing the known names."""
    if not isinstance(name, str) or name not in available():
        raise ConfigError(unknown("mechanism", name, available()), "mechanism")
    return available()[name]
