"""Checks of settings."""

from __future__ import annotations

from ..errors import ConfigError


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise ConfigError, which names the setting, what it must be and its value, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} must be {expected}, got {excerpt(value)}")


def excerpt(value: object) -> str:
    """A value as a message can hold it: short, and in characters that every terminal takes."""
    text = repr(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else f"{text[:70]}..."
