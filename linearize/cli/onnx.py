"""`linearize export | build-library`: files for onnxruntime, and the kernels that run them faster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .before import check_extra, check_file, check_folder
from .results import save_or_rescue, stopping
from .sources import Source, companions, find_source, load_source


def export(
    source: Source,
    target: Annotated[
        Path, typer.Argument(help="a file *.onnx, or a folder for model.onnx and what it needs")
    ],
    opset: Annotated[int, typer.Option(help="ONNX opset of the standard operators")] = 20,
    dtype: Annotated[str, typer.Option(help="float32 or float16")] = "float32",
    bits: Annotated[int, typer.Option(help="8 or 4 for quantised weights, 0 for none")] = 0,
    last_logits: Annotated[
        bool, typer.Option(help="a decoder's last token's logits alone: long prompts are faster")
    ] = False,
) -> None:
    """Write a model, converted or not, as ONNX that stock onnxruntime runs, state in and state out."""
    check_extra("onnx", "onnx", "onnxscript", "onnxruntime")
    from ..onnx.command import check, run

    folder = find_source(source)
    options = dict(opset=opset, dtype=dtype, last_logits=last_logits)
    check(target, options, bits)
    if target.suffix == ".onnx":
        check_file(target)
    else:
        check_folder(target)
    with stopping(lambda: f"{target} is as it was; the same command begins anew"):
        model, beside = load_source(folder), companions(folder)
        save_or_rescue(lambda place: run(model, place, beside, options, bits=bits, write=typer.echo), target)


def build_library(
    include: Annotated[
        Path | None, typer.Option(help="folder with onnxruntime's C++ headers; the usual places unless said")
    ] = None,
    cuda: Annotated[
        Path | None,
        typer.Option(help="an exported file: the kernels of its nodes for CUDA instead (never run on a GPU)"),
    ] = None,
    arch: Annotated[
        list[int] | None,
        typer.Option(
            help="compute capability for --cuda, 90 for 9.0; repeat it; 80, 90 and 100 unless given"
        ),
    ] = None,
) -> None:
    """Compile the kernels with which onnxruntime runs exported files faster. Needs a C++ compiler."""
    from .. import onnx

    made = onnx.build_cuda_library(cuda, include, architectures=arch) if cuda else onnx.build_library(include)
    typer.echo(f"wrote {made}")
