"""Checks of settings, and of what tensors hold."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError, InputError


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise ConfigError, which names the setting, what it must be and its value, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} must be {expected}, got {excerpt(value)}")


def excerpt(value: object) -> str:
    """A value as a message can hold it: short, and in characters that every terminal takes."""
    text = repr(value).encode("utf-8", "backslashreplace").decode()
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
