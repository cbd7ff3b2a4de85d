"""Options that several commands share, and groups of options.

A group is a dataclass whose fields are annotated as a command's parameters are. A command takes the group as
one parameter, and `grouped` gives it the options on the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..planning.config import LinearizeConfig

SEEDS: dict[str, Any] = dict(min=0, max=2**32 - 1, metavar="N")
"""What numpy takes, and torch too."""

Mechanism = Annotated[
    str, typer.Option(help="what takes the softmax's place; `linearize mechanisms` lists what there is")
]
Option = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="a setting of the mechanism; repeat for several"),
]
LayerOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYER:NAME=VALUE",
        help="a setting of the mechanism in one layer, by its number or path; repeat for several",
    ),
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
OnRefusal = Annotated[str, typer.Option(help="error: all or nothing; keep: what can be")]
Data = Annotated[
    list[Path],
    typer.Option(
        help="a text file, or a folder of them; repeat for several. An encoder takes each line as a "
        "text, an encoder-decoder lines of JSON with input and target"
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: as stored")]
Device = Annotated[str, typer.Option(help="where it runs, such as cpu or cuda")]


@dataclass(frozen=True)
class Rewriting:
    """How a model is to be rewritten."""

    mechanism: Mechanism = "augmented"
    group_size: Group = 64
    conv_taps: Taps = 32
    option: Option = None
    layer_option: LayerOption = None
    augmentation: Augmentation = None
    approximate: Approximate = None

    def config(self, **more: Any) -> LinearizeConfig:
        """The config that the options describe. more: its other fields."""
        from ..planning.config import LinearizeConfig

        return LinearizeConfig(
            mechanism=self.mechanism,
            group_size=self.group_size,
            conv_taps=self.conv_taps,
            options=option_values(self.option or ()),
            layer_options=layer_option_values(self.layer_option or ()),
            augmentation=self.augmentation,
            approximate=tuple(self.approximate or ()),
            **more,
        )


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the fields of each of its groups as parameters of their own."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if dataclasses.is_dataclass(parameter.annotation)
    }
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in groups:
            parameters += _parameters(groups[name])
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        command(**given)

    return with_parameters(with_options, parameters)


def with_parameters(
    function: Callable[..., None], parameters: Iterable[inspect.Parameter]
) -> Callable[..., None]:
    """The function itself, in which typer reads these parameters in place of its own."""
    signature = inspect.signature(function).replace(parameters=list(parameters))
    # Functions have no such attribute until they are given one.
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def takes_path(parameter: inspect.Parameter) -> bool:
    """Whether a parameter of a command is a path, or several."""

    def is_path(kind: Any) -> bool:
        return kind is Path or any(is_path(part) for part in get_args(kind))

    return is_path(parameter.annotation)


def _parameters(group: Any) -> Iterable[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
        )


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the user did not say."""
    return {name: value for name, value in settings.items() if value is not None}


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


def layer_option_values(given: Iterable[str]) -> dict[int | str, dict[str, Any]]:
    """LAYER:NAME=VALUE triples, as `LinearizeConfig.layer_options`."""
    found: dict[int | str, list[str]] = {}
    for item in given:
        layer, colon, rest = item.partition(":")
        if not (layer and colon):
            raise ConfigError(f"--layer-option {item!r} is not LAYER:NAME=VALUE")
        found.setdefault(layer_of(layer), []).append(rest)
    return {layer: option_values(pairs) for layer, pairs in found.items()}


def layer_of(text: str) -> int | str:
    """A layer by its number or its path."""
    return int(text) if text.isdecimal() else text


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
