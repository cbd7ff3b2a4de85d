"""`linearize bench`: how fast a model reads and writes on this machine, and what it keeps, against length."""

from __future__ import annotations

import json as codec
from pathlib import Path
from typing import Annotated

import typer

from .before import check_file
from .options import Device, Dtype, Rewriting, numbers
from .results import stopping
from .session import bars
from .sources import Source, load_model
from .terminal import console


def bench(
    source: Source,
    *,
    lengths: Annotated[
        str, typer.Option(help="tokens of a sequence, such as 512,8192; what there is room for unless said")
    ] = "",
    decode_tokens: Annotated[int, typer.Option(help="tokens to decode at each length")] = 32,
    rewriting: Rewriting,
    threads: Annotated[int, typer.Option(help="torch threads; 0 keeps torch's choice")] = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    json: Annotated[Path | None, typer.Option(help="write the figures to this file")] = None,
) -> None:
    """Measure a decoder beside what it becomes: speed and memory by length.

    One that is converted already is measured alone.
    """
    import torch

    from ..common.copies import sharing_copy
    from ..common.files import write_whole
    from ..convert.linearize import linearize
    from ..evaluation.benchmark import benchmark
    from ..evaluation.result import describe

    config = rewriting.config()
    wanted = numbers(lengths, "lengths")
    check_file(json)
    if threads:
        torch.set_num_threads(threads)
    model = load_model(source, dtype, device)
    models = {describe(model): model}
    with stopping(lambda: "nothing was written"):
        if not hasattr(model, "_linearize"):
            linear = linearize(sharing_copy(model), config=config, progress=bars())
            models[describe(linear)] = linear
        found = benchmark(models, lengths=wanted, decode_tokens=decode_tokens, progress=bars())
    console(120).print(found)
    if json is not None:
        write_whole(json, codec.dumps(found.to_dict(), indent=2) + "\n")
