"""`linearize inspect | convert`: what can be rewritten in a model, and the rewriting."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CheckpointError
from .before import check_file, check_folder, check_texts
from .options import Device, OnRefusal, Rewriting, layer_of, numbers
from .results import save_or_rescue, stopping
from .session import bars
from .sources import Source, copy_companions, find_source, load_source, load_tokenizer, to_device
from .terminal import console

CALIBRATION_LENGTH = 512
"""Tokens of a piece of text that `convert --calibrate` runs."""


def inspect(
    model: Source,
    *,
    json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    html: Annotated[Path | None, typer.Option(help="also write a page to this file")] = None,
    rewriting: Rewriting,
    device: Device = "cpu",
) -> None:
    """List every candidate attention site: where it is, what it means, what becomes of it or why not."""
    from ..common.files import write_whole
    from ..convert.inspect import inspect as inspect_model

    config = rewriting.config()
    problem = _why_not(html)
    report = inspect_model(to_device(load_source(find_source(model)), device), config=config)
    if json:
        typer.echo(report.to_json())
    else:
        console(160).print(report)
    if problem is not None:  # said when the report is there: it is what was asked for
        raise problem
    if html is not None:
        write_whole(html, report.to_html())


def _why_not(html: Path | None) -> CheckpointError | None:
    """Why a page cannot be written, None where it can."""
    try:
        check_file(html)
    except CheckpointError as error:
        return error
    return None


def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="the folder to write")],
    rewriting: Rewriting,
    layers: Annotated[str, typer.Option(help="only these layer indices, such as 0,1,5; empty is all")] = "",
    keep_softmax: Annotated[
        list[str] | None, typer.Option(help="layer index or module path to leave; repeat for several")
    ] = None,
    on_refusal: OnRefusal = "error",
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="text file, or folder of them, to fit the new parameters on; repeat for several"),
    ] = None,
    device: Device = "cpu",
) -> None:
    """Convert a transformers model and write it, tokenizer and all, to a folder."""
    from ..checkpoint.saving import write_checkpoint
    from ..convert.linearize import linearize
    from ..planning.state import state_of

    config = rewriting.config(
        layers=numbers(layers, "layers"),
        keep_softmax=tuple(map(layer_of, keep_softmax or ())),
        on_refusal=on_refusal,
    )
    folder = find_source(source)
    check_folder(target, folder)
    check_texts(calibrate)
    with stopping(lambda: f"nothing was written to {target}; the same command begins anew"):
        model = linearize(to_device(load_source(folder), device), config=config, progress=bars())
        if calibrate:
            _calibrate(model, calibrate, folder)
        save_or_rescue(
            lambda place: write_checkpoint(model, place, lambda files: copy_companions(folder, files, place)),
            target,
        )
    count = len(state_of(model).plan.sites)
    typer.echo(f"{count} attention modules rewritten to {config.mechanism}, written to {target}")


def _calibrate(model: Any, calibrate: list[Path], folder: Path) -> None:
    """Fit the model on text files, and print what that did."""
    from ..calibration.calibrate import TOKENS
    from ..calibration.calibrate import calibrate as fit
    from ..common.text import text_tokens

    texts = text_tokens(calibrate, load_tokenizer(folder), TOKENS, CALIBRATION_LENGTH, seed=0)
    pieces = [piece[None] for ids in texts for piece in ids.split(CALIBRATION_LENGTH)]
    console(160).print(fit(model, pieces, progress=bars()))
