"""A copy of a module to trace, over the same tensors."""

from __future__ import annotations

from typing import Any

from torch import nn


def twin_of(module: nn.Module) -> Any:
    """The module with dicts of its own and copies of its children; a child held twice is one copy.

    Capture puts fake tensors in the place of parameters while it runs, which other threads must not see.
    """
    return _copied(module, {})


def _copied(module: nn.Module, made: dict[nn.Module, nn.Module]) -> Any:
    if module not in made:
        made[module] = twin = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        twin._modules = {
            name: None if child is None else _copied(child, made) for name, child in module._modules.items()
        }
    return made[module]
