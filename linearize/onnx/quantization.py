"""Smaller weights for an exported file, by onnxruntime's own quantisers: int8, or int4 in blocks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnxscript.optimizer import fold_constants

from ..common.files import is_file, is_same, shown
from ..errors import ExportError
from . import file as files

BLOCK = 32
"""Weights that share a scale in 4 bits."""
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote.

    Attributes:
        path: The file.
        bytes: Its size.
        before: The size of the original.
        error: Norm of the difference over norm of the original, of the first output (Euclidean norms); None
            when there was nothing to measure it on.
    """

    path: Path
    bytes: int
    before: int
    error: float | None


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    bits: int = 8,
    inputs: Mapping[str, Any] | None = None,
) -> Quantized:
    """Write a file like another, with the weights of its matrix products in 8 or 4 bits.

    Our nodes, their bodies and the states stay in float.

    Args:
        source: A file that `export_onnx` wrote.
        target: The new file, `*.onnx`.
        bits: 8 is dynamic int8, activations too (`quantize_dynamic`); 4 is int4 weights in blocks of 32 with
            a scale each (`MatMulNBitsQuantizer`).
        inputs: Arrays by name to measure the error on; for a decoder 64 random tokens unless given.

    Returns:
        The file, its size and its error.

    Raises:
        ExportError: `bits` is another number, or a file cannot be read or written. Then nothing is left
            behind.
    """
    old, new = Path(source), Path(target)
    if bits not in (4, 8):
        raise ExportError(f"bits must be 8 or 4, got {bits!r}")
    if not is_file(old):
        raise ExportError(f"{shown(old)} is not there; `lz.export_onnx` writes such files")
    if new.suffix != ".onnx" or is_same(new, old):
        raise ExportError(f"the quantised file needs a name of its own that ends in .onnx, not {shown(new)}")
    files.check_name(new)
    files.read_graph(old)
    with files.staged(new, True) as folder:
        try:
            model = ir.load(old)
            fold_constants(model, input_size_limit=2**31, output_size_limit=2**31)
            folded, made = folder / "folded", folder / new.name
            folded.mkdir()
            files.save(model, folded / old.name, None)
            with _log_as_it_was():
                _run(folded / old.name, made, bits)
        except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
            raise ExportError(f"{old} cannot be quantised: {str(error).splitlines()[0]}") from error
        for leftover in folded.iterdir():
            leftover.unlink()
        folded.rmdir()
        given = inputs if inputs is not None else _random_tokens(old)
        difference = None if given is None else _difference(old, made, given)
    return Quantized(new, new.stat().st_size, old.stat().st_size, difference)


def _run(source: Path, target: Path, bits: int) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    if bits == 8:
        kinds = ["MatMul", "Gemm"]
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, op_types_to_quantize=kinds)
        return
    quantizer = MatMulNBitsQuantizer(str(source), bits=bits, block_size=BLOCK, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


@contextmanager
def _log_as_it_was() -> Iterator[None]:
    """Importing onnxruntime's quantiser sets up the root logger, and it tells of every node."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)


def _session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _random_tokens(path: Path) -> dict[str, Any] | None:
    """64 tokens on empty states for a decoder, None for anything else."""
    session = _session(path)
    logits = next((output for output in session.get_outputs() if output.name == "logits"), None)
    names = {node.name for node in session.get_inputs()}
    if logits is None or not {"input_ids", "attention_mask"} <= names or "encoder_hidden_states" in names:
        return None
    ids = np.random.default_rng(0).integers(0, logits.shape[2], (1, 64))
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if "position_ids" in names:
        given["position_ids"] = np.arange(64)[None]
    for node in session.get_inputs():
        if node.name not in given:
            sizes = [size if isinstance(size, int) else 0 for size in node.shape[1:]]
            given[node.name] = np.zeros((1, *sizes), _TYPES[node.type])
    return given


def _difference(old: Path, new: Path, inputs: Mapping[str, Any]) -> float:
    expected, found = (_session(path).run(None, dict(inputs))[0].astype(np.float64) for path in (old, new))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
