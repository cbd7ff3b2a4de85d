"""The plain values on a module that its forward may read: what was proved was proved for these.

A number, flag or word on a module takes part in what it computes without showing in any call. Each route
takes them down when it is sure of an owner, and looks again at every call: the graph route traces anew where
one differs, the interface route refuses.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidModelError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, FunctionType)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_OF_CALLS = re.compile("drop|checkpoint")
"""Attributes that reach the interface with each call, or do not change what is computed."""
_OF_MASKS = re.compile("causal|bidirectional|decoder|window|chunk|softcap|layer_types")
"""Settings of a config that decide what masks and scores mean, by parts of their names."""
_NOT_SET_BY_DEFAULT = frozenset({"is_causal", "use_bidirectional_attention", "sliding_window"})
"""Of these, those that make a decoder of any kind another, and that its config need not have."""

Values = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Held:
    """What a graph of an owner holds as constants, though it is the owner's.

    Attributes:
        values: the plain values of the owner and of the modules in it that are part of the graph, by path.
        tensors: the tensors that its masks were read from, by path, and how often they had been written to.
    """

    values: tuple[tuple[str, Values], ...]
    tensors: tuple[tuple[str, Tensor, int], ...]

    def still_by(self, owner: nn.Module) -> bool:
        """Whether the owner still has them."""
        parts = dict(owner.named_modules(remove_duplicate=False))
        for path, values in self.values:
            if path not in parts or plain_values(parts[path]) != values:
                return False
        if torch.compiler.is_compiling():
            return True  # compiled code takes the tensors that it met; it cannot ask for their versions
        return all(_at(owner, path) is t and _version(t) == count for path, t, count in self.tensors)


def held(owner: nn.Module, called: Collection[str], tensors: Collection[str]) -> Held:
    """What a graph of `owner` holds that calls the children at the paths `called`, and whose masks were read
    from the `tensors`."""
    inside = [
        path
        for path, part in owner.named_modules(remove_duplicate=False)
        if not hasattr(part, "spec") and not any(f"{path}.".startswith(f"{child}.") for child in called)
    ]
    found = [(path, _at(owner, path)) for path in sorted(tensors)]
    return Held(
        tuple((path, plain_values(_at(owner, path))) for path in inside),
        tuple((path, tensor, _version(tensor)) for path, tensor in found),
    )


def plain_values(module: nn.Module) -> Values:
    """Everything plain on a module and its config."""
    config = vars(module).get("config")
    found = [(name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    found += vars(config).items() if hasattr(config, "__dict__") else ()
    return tuple((name, _taken(value)) for name, value in found if _is_plain(value))


def values_of_owner(owner: nn.Module) -> Values:
    """What an owner on the interface route holds, but for what it tells the interface with every call."""
    return tuple(
        (name, _taken(value))
        for name, value in vars(owner).items()
        if name not in _OF_EVERY_MODULE and not _OF_CALLS.search(name) and _is_plain(value)
    )


def values_of_config(config: Any) -> Values:
    """The settings of a config that decide what masks and scores mean; None where one is not set yet."""
    names = _NOT_SET_BY_DEFAULT | {name for name in vars(config) if _OF_MASKS.search(name)}
    found = [(name, vars(config).get(name)) for name in sorted(names)]
    return tuple((name, _taken(value)) for name, value in found if _is_plain(value))


def check_unchanged(values: Values, holder: Any, where: str) -> None:
    """Raise InvalidModelError where a value of `holder` is not what it was."""
    held_now = vars(holder)
    for name, value in values:
        now = held_now.get(name)
        if now is not value and _taken(now) != value:
            raise InvalidModelError(
                f"{where}: `{name}` was {value!r} when the model was converted and is {now!r} now, which the "
                "rewritten attention does not follow; set it back, or change it in the original and convert "
                "that"
            )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def _at(owner: nn.Module, path: str) -> Any:
    """What is at a path below a module; None where nothing is."""
    found: Any = owner
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    return found


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _taken(value: Any) -> Any:
    return tuple(_taken(item) for item in value) if isinstance(value, (tuple, list)) else value
