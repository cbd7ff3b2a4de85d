"""Blocks of a model that are built alike, and all that is known of one beside the numbers in its weights.

Two blocks compute the same graph, each over its own weights, when they are of the same classes, hold the
same, and are called alike. `state_of` takes down what a block holds: numbers, words and flags by value,
whatever has fields by its fields, anything else by identity. What differs between two blocks is a set of
places, so that a layer number that nobody reads can be told from one that decides something.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

FEWEST = 4
"""Blocks that are alike from which on it pays to trace two of them for all."""

LARGEST = 1 << 24
"""Bytes of a buffer from which on it is like no other."""

Place = tuple[str, str]
"""Path of a module in its block ("" for the block), and name of the attribute."""
State = Mapping[Place, Hashable]

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HELD = ("_parameters", "_buffers", "_modules")
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
_BY_IDENTITY = (type, FunctionType, BuiltinFunctionType)
_CONTAINERS = (dict, list, tuple, set, frozenset, str, bytes, int, float)


def blocks_of(model: nn.Module) -> dict[nn.Module, Hashable]:
    """The outermost entries of lists of modules of which there are at least `FEWEST` of one form, with the
    form: classes, what there is to say of parameters but for their values, and all of buffers.

    None that does more when called than its class says.
    """
    found: dict[nn.Module, Hashable] = {}
    waiting = [model]
    seen = {model}
    while waiting:
        module = waiting.pop()
        children = list(dict.fromkeys(module.children()))
        forms = {child: _form(child) for child in children if isinstance(module, _LISTS)}
        counts = Counter(forms.values())
        for child in children:
            if counts[forms.get(child)] >= FEWEST and not _is_changed(child):
                found[child] = forms[child], _weights(child)
            elif child not in seen:
                seen.add(child)
                waiting.append(child)
    return found


def _form(block: nn.Module) -> Hashable:
    parts = tuple((path, type(part)) for path, part in block.named_modules(remove_duplicate=False))
    weights = tuple((path, x.shape) for path, x in block.named_parameters(remove_duplicate=False))
    return parts, weights


def _weights(block: nn.Module) -> Hashable:
    """Tensors that a block holds twice are one in every block that is like it."""
    met: dict[int, int] = {}
    return tuple(
        (path, name, _described(tensor, met))
        for path, part in block.named_modules()
        for kind in ("_parameters", "_buffers")
        for name, tensor in vars(part)[kind].items()
    )


def _described(tensor: Tensor | None, met: dict[int, int]) -> Hashable:
    if tensor is None:
        return None
    number = met.setdefault(id(tensor), len(met))
    value = tuple(tensor.shape) if isinstance(tensor, nn.Parameter) else _digest(tensor)
    return number, type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.stride(), value


def _is_changed(block: nn.Module) -> bool:
    """Whether something runs with the block that its classes do not show."""
    return any("forward" in vars(m) or any(vars(m)[name] for name in _HOOKS) for m in block.modules())


def differences(first: State, second: State) -> set[Place]:
    """Where two states are not the same."""
    return {place for place in first.keys() | second.keys() if first.get(place) != second.get(place)}


def is_whole_number(word: Hashable) -> bool:
    """Whether what a state says of a place is a whole number."""
    return isinstance(word, tuple) and word[:1] == (int,)


def values_of(blocks: Iterable[nn.Module]) -> dict[int, Hashable]:
    """What stands for the values of the tensors that blocks hold as plain attributes, by `id`.

    To be had before an export, inside which no tensor shows its values.
    """
    found: dict[int, Hashable] = {}
    for block in blocks:
        reader = _Reader(block, found)
        reader.takes_values = True
        for _ in reader.entries():
            pass
    return found


def state_of(block: nn.Module, values: Mapping[int, Hashable]) -> State:
    """All that the modules of a block hold beside parameters and buffers.

    values: of tensors; one that is not among them is like no other.
    """
    return dict(_Reader(block, dict(values)).entries())


class _Reader:
    """What one block holds, in words that can be compared with another's.

    An object met again is named by when it was met first, so that loops end and what is one object in one
    block must be one in the other.
    """

    def __init__(self, block: nn.Module, values: dict[int, Hashable]) -> None:
        self.takes_values = False
        self._values = values
        self._paths: dict[int, str] = {}
        self._parts = list(block.named_modules(remove_duplicate=False))
        for path, part in self._parts:
            self._paths.setdefault(id(part), path)
        self._met: dict[int, int] = {}

    def entries(self) -> Iterator[tuple[Place, Hashable]]:
        for path, part in self._parts:
            yield (path, ""), self._paths[id(part)]
            for name, value in vars(part).items():
                if name not in _HELD:
                    yield (path, name), self._word(value)

    def _word(self, value: Any) -> Hashable:
        if isinstance(value, _PLAIN):
            # repr tells -0.0 from 0.0 and knows that NaN is NaN; the class tells 1 from True.
            return type(value), repr(value) if isinstance(value, (float, complex)) else value
        if isinstance(value, nn.Module):
            path = self._paths.get(id(value))
            # A module that is not of the block leads everywhere: no two such are alike.
            return ("module", path) if path is not None else ("outside", id(self), id(value))
        if isinstance(value, _BY_IDENTITY):
            return "object", id(value)
        if isinstance(value, MethodType):
            return "method", id(value.__func__), self._word(value.__self__)
        if id(value) in self._met:
            return "met", self._met[id(value)]
        self._met[id(value)] = len(self._met)
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        return type(value), self._inside(value)

    def _of_tensor(self, tensor: Tensor) -> Hashable:
        if self.takes_values and id(tensor) not in self._values:
            self._values[id(tensor)] = _digest(tensor)
        return self._values.get(id(tensor), id(tensor))

    def _inside(self, value: Any) -> Hashable:
        kind = type(value)
        if kind in (list, tuple):
            return tuple(self._word(item) for item in value)
        if kind in (set, frozenset) and all(isinstance(item, _PLAIN) for item in value):
            return frozenset((type(item), item) for item in value)
        if isinstance(value, dict) and kind.__module__ in ("builtins", "collections"):
            return tuple((self._word(key), self._word(item)) for key, item in value.items())
        if kind is functools.partial:
            return tuple(self._word(item) for item in (value.func, value.args, value.keywords))
        if hasattr(value, "__dict__") and not isinstance(value, _CONTAINERS) and not _has_slots(kind):
            return tuple((name, self._word(item)) for name, item in vars(value).items())
        return id(value)


def _digest(tensor: Tensor) -> Hashable:
    """Equal for tensors with the same values; of one too large to look at, or no plain one, its own."""
    if type(tensor) is not Tensor or tensor.is_meta or tensor.layout is not torch.strided:
        return id(tensor)
    if tensor.numel() * tensor.itemsize > LARGEST:
        return id(tensor)
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return tuple(tensor.shape), tensor.dtype, tensor.device, hashlib.sha256(content.tobytes()).digest()


def _has_slots(kind: type) -> bool:
    """Whether objects of the class hold more than their `__dict__`."""
    return any(vars(base).get("__slots__") for base in kind.__mro__)
