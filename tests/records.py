"""Records of JSON, taken apart for tests that edit them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def entries(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all entries, those that hold others as well."""
    if path:
        yield path
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield from entries(data[key], (*path, key))
