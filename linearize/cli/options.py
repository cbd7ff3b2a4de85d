"""Options that say how a model is to be rewritten, shared by the commands that rewrite."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Any

import typer

from ..errors import ConfigError

Mechanism = Annotated[
    str, typer.Option(help="what takes the softmax's place; `linearize mechanisms` lists what there is")
]
Option = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="a setting of the mechanism; repeat for several"),
]
Augmentation = Annotated[
    bool | None,
    typer.Option(
        "--augmentation/--no-augmentation",
        help="add the convolution over values, or leave it out; the mechanism's own choice unless said",
        show_default=False,
    ),
]
Group = Annotated[int, typer.Option(help="tokens per group of the local part")]
Taps = Annotated[int, typer.Option(help="tokens that the convolution over values sees")]
Approximate = Annotated[
    list[str] | None, typer.Option(help="a part of the attention that may be dropped; repeat for several")
]


def option_values(given: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; values that read as an int or a float are one."""
    options: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not (equals and name) or name in options:
            wrong = "is there twice" if name in options else "is not NAME=VALUE"
            raise ConfigError(f"--option {item!r} {wrong}")
        options[name] = _value(text)
    return options


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def numbers(text: str, what: str) -> tuple[int, ...] | None:
    """Whole numbers separated by commas; None for nothing. what: names them in the error."""
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else None
    except ValueError as error:
        raise ConfigError(f"{what} must be numbers separated by commas, got {text!r}") from error
