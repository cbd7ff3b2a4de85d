"""A copy of a module to trace, over the same tensors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn


def twin_of(module: nn.Module) -> Any:
    """The module with dicts of its own and copies of its children; a child held twice is one copy.

    Capture puts fake tensors in the place of parameters while it runs, which other threads must not see.
    """
    return twins_of(module)[0]


def twins_of(module: nn.Module, hollow: Collection[nn.Module] = ()) -> tuple[Any, dict[nn.Module, Any]]:
    """As `twin_of`, with the copy of every module in it. hollow: modules whose copies hold nothing."""
    made: dict[nn.Module, Any] = {}
    return _copied(module, hollow, made), made


def _copied(module: nn.Module, hollow: Collection[nn.Module], made: dict[nn.Module, Any]) -> Any:
    if module not in made:
        made[module] = twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        twin._parameters, twin._buffers, twin._modules = {}, {}, {}
        if module not in hollow:
            twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
            for name, child in module._modules.items():
                twin._modules[name] = None if child is None else _copied(child, hollow, made)
    return made[module]
