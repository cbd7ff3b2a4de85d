"""Checks of settings, and of what tensors hold."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from ..errors import ConfigError, InputError

_LONGEST = 300
"""Characters of a message that lists what there is."""


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise ConfigError, which names the setting, what it must be and its value, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} must be {expected}, got {excerpt(value)}", name)


def require_whole(name: str, value: object, least: int = 1, optional: bool = False) -> None:
    """Raise ConfigError unless a setting is an int of at least `least`, or None where that may be."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    or_none = ", or None" if optional else ""
    require(whole or (optional and value is None), name, value, f"an int, {least} or more{or_none}")


def require_number(
    name: str, value: object, expected: str, good: Callable[[Any], bool], optional: bool = False
) -> None:
    """Raise ConfigError unless a setting is a number that is `good`, or None where that may be."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require((number and good(value)) or (optional and value is None), name, value, expected)


def several(value: Any) -> Any:
    """What a user gave where several values are meant, as a tuple: one alone, a list, an array.

    Anything else comes back as it is. Whole numbers of numpy and torch become ints.
    """
    if isinstance(value, str) or _whole(value) is not None:
        value = (value,)
    if isinstance(value, Iterable) and not isinstance(value, Mapping | str | bytes):
        value = tuple(item if (found := _whole(item)) is None else found for item in value)
    return value


def _whole(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or getattr(value, "shape", ()) != ():
        return None
    try:
        return operator.index(value)
    except TypeError:  # a tensor of another dtype
        return None


def unknown(what: str, given: object, known: Iterable[object], hint: str = "") -> str:
    """That there is no such name, the nearest one, and what there is; `hint` in place of the nearest."""
    return not_among(f"unknown {what} {excerpt(given)}", given, known, hint)


def not_among(problem: str, given: object, known: Iterable[object], hint: str = "") -> str:
    """As `unknown`, with other words for the problem."""
    names = list(map(str, known))
    close = get_close_matches(str(given), names, n=1)
    nearest = hint or (f"did you mean {close[0]!r}?" if close else "")
    text = f"{problem}; {nearest}{' ' if nearest else ''}known: "
    if not names:
        return f"{problem}: it has none"
    room = _LONGEST - len(text)
    listed = ", ".join(names)
    return text + (listed if len(listed) <= room else listed[: room - 5].rpartition(",")[0] + ", ...")


def excerpt(value: object) -> str:
    """A value as a message can hold it: short, and in characters that every terminal takes."""
    text = " ".join(repr(value).split()).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:70]}..."


def is_traced(tensor: Tensor) -> bool:
    """Whether a graph is being made, or the tensor has no values to look at (fake ones, the meta device)."""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.is_meta


def require_true(ok: Tensor, problem: str) -> None:
    """Raise InputError unless the bool `[]` is true; in a graph, an assertion that raises when it runs."""
    if is_traced(ok):
        torch._assert_async(ok, problem)
    elif not bool(ok):
        raise InputError(problem)
