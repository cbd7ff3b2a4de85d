"""What the entries of a file of JSON may be, as data, and the check of a file against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import CheckpointError
from .checks import excerpt

Rule = tuple[Callable[[Any], bool], str]
"""What a value must satisfy, and that in words."""


def whole(least: int, most: int) -> Rule:
    return lambda x: type(x) is int and least <= x <= most, f"a whole number from {least} to {most}"


def number(least: float, most: float) -> Rule:
    return lambda x: type(x) in (int, float) and least <= x <= most, f"a number from {least:g} to {most:g}"


def word(*known: str) -> Rule:
    return lambda x: isinstance(x, str) and x in known, f"one of {', '.join(known)}"


def several(rule: Rule) -> Rule:
    return lambda x: isinstance(x, list | tuple) and all(map(rule[0], x)), f"a list, each {rule[1]}"


def optional(rule: Rule) -> Rule:
    return lambda x: x is None or rule[0](x), f"{rule[1]}, or null"


FLAG: Rule = (lambda x: isinstance(x, bool), "true or false")
TEXT: Rule = (lambda x: isinstance(x, str) and len(x) < 10_000, "a text")
OBJECT: Rule = (lambda x: isinstance(x, Mapping), "an object")
OBJECTS: Rule = several(OBJECT)


def check_entries(
    data: Any, where: str, rules: Mapping[str, Rule], required: Sequence[str]
) -> Mapping[str, Any]:
    """The data, if it is an object with entries as the rules have them.

    Raises CheckpointError, naming the entry, for one that is missing, unknown or wrong.
    """
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where} is no object")
    for name in required:
        if name not in data:
            raise CheckpointError(f"{where}: {name!r} is missing")
    for name, value in data.items():
        if name not in rules:
            raise CheckpointError(f"{where} has an entry {excerpt(name)}, which this release does not know")
        valid, expected = rules[name]
        if not valid(value):
            raise CheckpointError(f"{where}: {name!r} must be {expected[:200]}, got {excerpt(value)}")
    return data
