"""`linearize plan`: which layers of a model are best left softmax."""

from __future__ import annotations

import json as codec
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .options import Approximate, Augmentation, Group, Mechanism, Option, Taps, option_values
from .sources import Source, find_source, is_demo, load_source, load_tokenizer
from .terminal import console

if TYPE_CHECKING:
    from ..planning.config import LinearizeConfig

CONTEXT = 512
"""Tokens of a piece of text."""
BATCH = 4
"""Pieces that run at once."""


def plan(
    source: Source,
    data: Annotated[
        list[Path],
        typer.Option(
            help="a text file, or a folder of them; repeat for several. An encoder takes each line as a "
            "text, an encoder-decoder lines of JSON with input and target"
        ),
    ],
    budget: Annotated[
        str | None, typer.Option(help="layers that may stay softmax: a number, or a share such as 0.25")
    ] = None,
    max_divergence: Annotated[
        float | None,
        typer.Option(help="instead of a budget: as few as bring the divergence from the original to this"),
    ] = None,
    mechanism: Mechanism = "augmented",
    group_size: Group = 64,
    conv_taps: Taps = 32,
    option: Option = None,
    augmentation: Augmentation = None,
    on_refusal: Annotated[str, typer.Option(help="error: all or nothing; keep: what can be")] = "error",
    approximate: Approximate = None,
    search: Annotated[
        str, typer.Option(help="greedy; or ranking, which is faster where there are many layers")
    ] = "greedy",
    tokens: Annotated[int, typer.Option(help="tokens of the data to use")] = 8192,
    json: Annotated[Path | None, typer.Option(help="write the figures to this file")] = None,
    seed: Annotated[int, typer.Option(help="of the choice of text")] = 0,
) -> None:
    """Measure what each layer costs when it is linear, and say which are best left softmax."""
    from ..common.files import write_whole
    from ..planning.config import LinearizeConfig
    from ..training.data import Collate, rows_of
    from ..training.files import read_files
    from ..training.hybrid import plan as find

    config = LinearizeConfig(
        mechanism=mechanism,
        group_size=group_size,
        conv_taps=conv_taps,
        options=option_values(option or ()),
        augmentation=augmentation,
        on_refusal=on_refusal,
        approximate=tuple(approximate or ()),
    )
    limit = None if budget is None else _number(budget)
    folder = find_source(source)
    # The demo is stored in bfloat16 and meant to run in float32, as `load_demo` has it.
    model = load_source(folder, "float32" if is_demo(source) else "auto")
    tokenizer = load_tokenizer(folder)
    texts = read_files(model, tokenizer, data, tokens, CONTEXT, seed)
    rows = rows_of(model, texts, tokenizer, CONTEXT).first(tokens).rows
    collate = Collate.of(model)
    batches = [collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    found = find(
        model,
        batches,
        budget=limit,
        max_divergence=max_divergence,
        config=config,
        search=search,
        max_tokens=tokens,
    )
    console(160).print(found)
    if json is not None:
        write_whole(json, codec.dumps(found.to_dict(), indent=2) + "\n")
    typer.echo(f"to convert it so: {_command(source, found.config)}")


def _number(text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ConfigError(f"--budget is a number of layers or a share below 1, got {text!r}")


def _command(source: str, config: LinearizeConfig) -> str:
    """The `linearize convert` that does what a config says; the folder to write is left open."""
    words = ["linearize", "convert", source, "OUT", "--mechanism", config.mechanism]
    for name, default in (("group_size", 64), ("conv_taps", 32), ("on_refusal", "error")):
        if getattr(config, name) != default:
            words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    words += [word for name, value in config.options.items() for word in ("--option", f"{name}={value}")]
    if config.augmentation is not None:
        words.append("--augmentation" if config.augmentation else "--no-augmentation")
    words += [word for name in config.approximate for word in ("--approximate", name)]
    words += [word for layer in config.keep_softmax for word in ("--keep-softmax", str(layer))]
    return shlex.join(words)
