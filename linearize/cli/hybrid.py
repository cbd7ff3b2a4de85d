"""`linearize plan`: which layers of a model are best left softmax, or get how many bytes of state."""

from __future__ import annotations

import json as codec
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .before import check_file, check_texts
from .options import SEEDS, Data, Device, OnRefusal, Rewriting, numbers
from .results import stopping
from .session import bars
from .sources import Source, find_source, load_model, load_tokenizer
from .terminal import console

if TYPE_CHECKING:
    from ..planning.config import LinearizeConfig

CONTEXT = 512
"""Tokens of a piece of text."""
BATCH = 4
"""Pieces that run at once."""


def plan(
    source: Source,
    data: Data,
    *,
    budget: Annotated[
        str | None, typer.Option(help="layers that may stay softmax: a number, or a share such as 0.25")
    ] = None,
    max_divergence: Annotated[
        float | None,
        typer.Option(help="instead of a budget: as few as bring the divergence from the original to this"),
    ] = None,
    state_bytes: Annotated[
        int | None,
        typer.Option(help="bytes that all states of one sequence may have: sizes for each layer"),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="tokens of context to measure at, such as 512,2048; 512 unless said")
    ] = "",
    rewriting: Rewriting,
    on_refusal: OnRefusal = "error",
    search: Annotated[
        str, typer.Option(help="greedy; or ranking, which is faster where there are many layers")
    ] = "greedy",
    tokens: Annotated[int, typer.Option(help="tokens of the data to use")] = 8192,
    json: Annotated[Path | None, typer.Option(help="write the figures to this file")] = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="of the choice of text", **SEEDS)] = 0,
) -> None:
    """Measure what each layer costs when it is linear, and say which are best left softmax, or how large."""
    from ..common.files import write_whole
    from ..training.data import Collate, training_data
    from ..training.files import read_files
    from ..training.hybrid import plan as find

    config = rewriting.config(on_refusal=on_refusal)
    limit = None if budget is None else _number(budget)
    wanted = numbers(lengths, "lengths")
    context = max(wanted or (CONTEXT,))
    check_file(json)
    check_texts(data)
    model = load_model(source, device=device)
    tokenizer = load_tokenizer(find_source(source))
    texts = read_files(model, tokenizer, data, tokens, context, seed)
    rows = training_data(model, texts, tokenizer, context).first(tokens).rows
    collate = Collate.of(model)
    batches = [collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    with stopping(lambda: "nothing was written; the same command begins anew"):
        found = find(
            model,
            batches,
            budget=limit,
            max_divergence=max_divergence,
            state_bytes=state_bytes,
            lengths=wanted,
            config=config,
            search=search,
            max_tokens=tokens,
            progress=bars(),
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
    for layer, own in config.layer_options.items():
        for name, value in own.items():
            words += ["--layer-option", f"{layer}:{name}={value}"]
    if config.augmentation is not None:
        words.append("--augmentation" if config.augmentation else "--no-augmentation")
    words += [word for name in config.approximate for word in ("--approximate", name)]
    words += [word for layer in config.keep_softmax for word in ("--keep-softmax", str(layer))]
    return shlex.join(words)
