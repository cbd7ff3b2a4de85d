"""`linearize export`: a model of a folder as ONNX, with the files that belong to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..common.files import reason, write_whole
from ..errors import ConfigError, ExportError
from . import export_onnx, quantize
from .export import check_target


def check(target: Path, options: Mapping[str, Any], bits: int) -> None:
    """Raise ConfigError or ExportError for what no model could be exported with."""
    if bits not in (0, 4, 8):
        raise ConfigError(f"bits must be 8 or 4, or 0 for none, got {bits}")
    check_target(target, options["opset"], options["dtype"])


def run(
    model: nn.Module,
    target: Path,
    companions: Sequence[Path],
    options: Mapping[str, Any],
    *,
    bits: int,
    write: Callable[[str], object],
) -> None:
    """Export to `target` and say what was written; companions: tokenizer files, copied into a folder.

    options: of `export_onnx`. bits: of the weights; a quantised file lies beside the other one, as
    `*.int8.onnx` or `*.int4.onnx`.
    """
    exported = export_onnx(model, target, **options)
    if target.is_dir():
        for path in companions:
            if not (target / path.name).exists():
                try:
                    write_whole(target / path.name, path.read_bytes())
                except OSError as error:
                    raise ExportError(f"cannot write {target / path.name}: {reason(error)}") from error
    write(str(exported))
    for file in exported.files:
        if bits and file.suffix == ".onnx":
            made = quantize(file, file.with_suffix(f".int{bits}.onnx"), bits=bits)
            off = "" if made.error is None else f", {100 * made.error:.2f} % off in the logits"
            write(f"{made.path}: {made.bytes / 1e6:.1f} MB instead of {made.before / 1e6:.1f}{off}")
