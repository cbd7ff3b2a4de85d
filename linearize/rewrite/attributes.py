"""The plain values on a module that its forward may read: what was proved was proved for these.

A number, flag or word on a module takes part in what it computes without showing in any call. Each route
takes them down when it is sure of an owner, and looks again at every call: the graph route traces anew where
one differs, the interface route refuses.
"""

from __future__ import annotations

import re
import weakref
from argparse import Namespace
from collections.abc import Collection, Iterable
from dataclasses import dataclass, is_dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import is_traced, require_true
from ..errors import InvalidModelError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, FunctionType)
_OF_EVERY_MODULE = frozenset({*vars(nn.Module()), "_is_torch_compile", "_compiled_call_impl"})
"""What torch puts on modules; the last two when they are compiled."""
_OF_CALLS = re.compile("drop|checkpoint")
"""Attributes that reach the interface with each call, or do not change what is computed."""
_OF_MASKS = re.compile("causal|bidirectional|decoder|window|chunk|softcap|layer_types")
"""Settings of a config that decide what masks and scores mean, by parts of their names."""
_NOT_SET_BY_DEFAULT = frozenset({"is_causal", "use_bidirectional_attention", "sliding_window"})
"""Of these, those that make a decoder of any kind another, and that its config need not have."""

Values = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Read:
    """A tensor of an owner that a mask was read from.

    Attributes:
        path: Where it is.
        tensor: The tensor itself.
        version, address: How often it had been written to, and where its values were.
        values: A copy of them: what is written through `.data` or numpy is not counted.
    """

    path: str
    tensor: weakref.ref[Tensor]
    version: int
    address: int
    values: Tensor

    def is_by_count(self, now: Any) -> bool:
        """Whether `now` is that tensor, and nothing was written to it that torch knows of."""
        return (
            isinstance(now, Tensor)
            and now is self.tensor()
            and _version(now) == self.version
            and now.data_ptr() == self.address
        )

    def is_still(self, now: Any) -> bool:
        """Both. On a GPU by count alone: looking at values would make it stop."""
        return self.is_by_count(now) and (now.device.type != "cpu" or self.is_by_value(now))

    def is_by_value(self, now: Any) -> bool:
        """Whether `now` has the same values; a graph cannot tell, and asserts it."""
        if not isinstance(now, Tensor) or (now.shape, now.dtype) != (self.values.shape, self.values.dtype):
            return False
        then, found = _words(self.values.to(now.device)), _words(now)
        if not is_traced(found):
            return torch.equal(then, found)
        require_true(
            (then == found).all(),
            f"the values of `{self.path}`, which a mask or a scale is read from, are not those of the model "
            "that was compiled; run the model once without compiling, and compile it anew",
        )
        return True


@dataclass(frozen=True)
class Held:
    """What a graph of an owner holds as constants, though it is the owner's.

    Attributes:
        values: the plain values of the owner and of the modules in it that are part of the graph, by path.
        tensors: the tensors that its masks were read from.
    """

    values: tuple[tuple[str, Values], ...]
    tensors: tuple[Read, ...]

    def still_by(self, owner: nn.Module, step: bool) -> bool:
        """Whether the owner still has them. step: one more token of a sequence is asked for, where what torch
        counts must do."""
        parts = dict(owner.named_modules(remove_duplicate=False))
        for path, values in self.values:
            if path not in parts or plain_values(parts[path]) != values:
                return False
        if torch.compiler.is_compiling():
            return all(one.is_by_value(_at(owner, one.path)) for one in self.tensors)
        if step:
            return not self.is_stale(owner)
        return all(one.is_still(_at(owner, one.path)) for one in self.tensors)

    def is_stale(self, owner: nn.Module) -> bool:
        """Whether one of its tensors was replaced or written to, by what torch counts."""
        return not all(one.is_by_count(_at(owner, one.path)) for one in self.tensors)


def held(
    owner: nn.Module, called: Collection[str], tensors: Collection[str], before: Iterable[Held] = ()
) -> Held:
    """What a graph of `owner` holds that calls the children at the paths `called`, and whose masks were read
    from the `tensors`; `before`: what other graphs of it hold, so that no tensor is copied twice."""
    inside = [
        path
        for path, part in owner.named_modules(remove_duplicate=False)
        if not hasattr(part, "spec") and not any(f"{path}.".startswith(f"{child}.") for child in called)
    ]
    known = {one.path: one for other in before for one in other.tensors}
    return Held(
        tuple((path, plain_values(_at(owner, path))) for path in inside),
        tuple(_read_before(path, _at(owner, path), known.get(path)) for path in sorted(tensors)),
    )


def read(path: str, tensor: Tensor) -> Read:
    """What there is to know of a tensor that a mask was read from just now."""
    values = tensor.detach().clone()
    return Read(path, weakref.ref(tensor), _version(tensor), tensor.data_ptr(), values)


def _read_before(path: str, tensor: Tensor, known: Read | None) -> Read:
    same = known is not None and known.is_by_count(tensor) and known.is_by_value(tensor)
    return known if known is not None and same else read(path, tensor)


def plain_values(module: nn.Module) -> Values:
    """Everything plain on a module and its config."""
    config = vars(module).get("config")
    found = [(name, value) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    found += vars(config).items() if hasattr(config, "__dict__") else ()
    return tuple((name, _taken(value)) for name, value in found if _is_plain(value)) + _inside(module)


def _inside(module: nn.Module) -> Values:
    """What is plain in the dicts and the records (dataclasses, namespaces) on a module."""
    found = []
    for name, value in vars(module).items():
        if name in _OF_EVERY_MODULE or name == "config" or name.startswith("_linearize"):
            continue
        record = is_dataclass(value) or isinstance(value, (SimpleNamespace, Namespace))
        items = (
            value
            if isinstance(value, dict)
            else vars(value)
            if record and not isinstance(value, type)
            else {}
        )
        found += [(f"{name}.{key}", _taken(item)) for key, item in items.items() if _is_plain(item)]
    return tuple(found)


def path_of(owner: nn.Module, tensor: Tensor) -> str | None:
    """Where in a dict or list on the owner, or on a module in it, the tensor is; None where it is in none."""
    for path, module in owner.named_modules():
        for name, held in vars(module).items():
            if name in _OF_EVERY_MODULE or not isinstance(held, (dict, list, tuple)):
                continue
            for key, item in held.items() if isinstance(held, dict) else enumerate(held):
                if isinstance(item, Tensor) and item.data_ptr() == tensor.data_ptr():
                    return ".".join(filter(None, (path, name, str(key))))
    return None


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
        if isinstance(found, dict):
            found = next((item for key, item in found.items() if str(key) == name), None)
        elif isinstance(found, (list, tuple)):
            found = found[int(name)] if int(name) < len(found) else None
        else:
            found = getattr(found, name, None)
    return found


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor, eight bytes in one number where they come out even: faster to compare."""
    flat = tensor.detach().flatten()
    return flat.view(torch.int64) if flat.numel() * flat.itemsize % 8 == 0 and flat.numel() else flat


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _taken(value: Any) -> Any:
    return tuple(_taken(item) for item in value) if isinstance(value, (tuple, list)) else value
