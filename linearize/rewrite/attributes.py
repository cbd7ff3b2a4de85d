"""The plain values on a module that its forward may read: what was proved was proved for these.

A number, flag or word on a module takes part in what it computes without showing in any call. Each route
takes them down when it is sure of an owner, and looks again at every call: the graph route traces anew where
one differs, the interface route refuses.
"""

from __future__ import annotations

import re
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..errors import InvalidModelError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, FunctionType)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_OF_CALLS = re.compile("drop|checkpoint")
"""Attributes that reach the interface with each call, or do not change what is computed."""
_OF_MASKS = re.compile("causal|bidirectional|decoder|window|chunk|softcap|layer_types")
"""Settings of a config that decide what masks and scores mean, by parts of their names."""

Values = tuple[tuple[str, Any], ...]


def plain_values(module: nn.Module) -> Values:
    """Everything plain on a module, the modules in it and their configs, by name, for the key of a graph."""
    found: list[tuple[str, Any]] = []
    for path, part in module.named_modules(remove_duplicate=False):
        config = getattr(part, "config", None)
        for holder in (part, config) if hasattr(config, "__dict__") else (part,):
            found += [
                (f"{path}.{name}", _taken(value))
                for name, value in vars(holder).items()
                if name not in _OF_EVERY_MODULE and _is_plain(value)
            ]
    return tuple(found)


def values_of_owner(owner: nn.Module) -> Values:
    """What an owner on the interface route holds, but for what it tells the interface with every call."""
    return tuple(
        (name, _taken(value))
        for name, value in vars(owner).items()
        if name not in _OF_EVERY_MODULE and not _OF_CALLS.search(name) and _is_plain(value)
    )


def values_of_config(config: Any) -> Values:
    """The settings of a config that decide what masks and scores mean."""
    return tuple((n, _taken(v)) for n, v in vars(config).items() if _OF_MASKS.search(n) and _is_plain(v))


def check_unchanged(values: Values, holder: Any, where: str) -> None:
    """Raise InvalidModelError where a value of `holder` is not what it was."""
    for name, value in values:
        now = _taken(getattr(holder, name, None))
        if now != value:
            raise InvalidModelError(
                f"{where}: `{name}` was {value!r} when the model was converted and is {now!r} now, which the "
                "rewritten attention does not follow; set it back, or change it in the original and convert "
                "that"
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def _taken(value: Any) -> Any:
    return tuple(_taken(item) for item in value) if isinstance(value, (tuple, list)) else value
