"""`lz.export_onnx`: a model as one ONNX file that stock onnxruntime runs, state in and state out."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.checks import excerpt
from ..common.files import reason, shown
from ..common.progress import steps
from ..common.running import generates, quiet_run
from ..common.tables import as_html
from ..errors import ExportError, InvalidModelError
from ..mechanisms.module import AttentionModule
from . import file as files
from . import programs
from .genai import write_genai
from .programs import Program, StateNames

FILE, ENCODER, DECODER = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What `export_onnx` wrote.

    Attributes:
        path: The file or folder that was asked for.
        files: All files written.
        sites: Attention modules that are not softmax; 0 in a model that was not converted.
        nodes: How many nodes of domain `ai.linearize` there are, by operator.
        states: Layers with a state of constant size.
        caches: Layers with keys and values.
        inputs: Names of the inputs of every graph, by file name.
        outputs: Names of the outputs of every graph, by file name.
    """

    path: Path
    files: tuple[Path, ...]
    sites: int
    nodes: Counter[str]
    states: int
    caches: int
    inputs: dict[str, list[str]]
    outputs: dict[str, list[str]]

    @property
    def converted(self) -> bool:
        return self.sites > 0

    def _repr_html_(self) -> str:
        return as_html([str(self)])

    def __str__(self) -> str:
        """One sentence for people."""
        size = sum(file.stat().st_size for file in self.files) / 1e6
        what = ", ".join(f"{count} x {name}" for name, count in sorted(self.nodes.items()))
        kept = f"{self.caches} layers with keys and values" if self.caches else ""
        plain = f"{self.sites} sites in standard operators" if self.sites else "not converted: softmax only"
        parts = [part for part in (what or plain, kept) if part]
        return f"{self.path}: {'; '.join(parts)} ({size:.1f} MB)"


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Any = None,
    *,
    opset: int = 20,
    dtype: str | None = None,
    names: StateNames | None = None,
    last_logits: bool = False,
    external_data: bool | None = None,
    progress: bool | None = None,
) -> Exported:
    """Write a model as ONNX, with a dynamic batch and length. The model is unchanged.

    A decoder becomes one graph for a whole prompt, a prompt in pieces, and decoding: `input_ids` [B, T],
    `attention_mask` [B, past + T] (1 for real tokens, padding on either side), `position_ids` [B, T] where
    the model takes them, and the states of the layers go in; `logits` [B, T, vocabulary] and the states after
    the call come out. A state of zeros is the empty one. Layers that are still softmax have keys and values
    instead. An encoder-decoder becomes two graphs in a folder, `encoder_model.onnx` and `decoder_model.onnx`.
    Any other model becomes one call: its tensor inputs in, the tensors of its result out.

    Each site is a node of domain `ai.linearize` (`onnx/schema.py`). What it means in standard operators is in
    the file too, so nothing but onnxruntime is needed to run it.

    Args:
        model: A converted model, or any other.
        path: A file `*.onnx`, or a folder to hold `model.onnx` and the model's configuration.
        inputs: Example inputs, as `linearize` takes them; made from the configuration of a transformers model
            where none are given.
        opset: Of the standard operators, 18 to 26.
        dtype: "float32" or "float16"; the model's own by default. States are summed in float32 always.
        names: Of the states in the file.
        last_logits: A decoder gives the logits of the last token alone, [B, 1, vocabulary]: all that
            generation reads, and for a long prompt a fraction of the work.
        external_data: Keep the weights in `*.onnx.data`; None does so where the file would pass 2 GB.
        progress: Whether to show a progress bar; on terminals and in notebooks by default.

    Returns:
        What was written.

    Raises:
        InvalidModelError: `model` is no `nn.Module`.
        ExportError: The model has no ONNX form, an argument is wrong, or the file cannot be written. Then
            nothing is left behind.
    """
    if not isinstance(path, str | os.PathLike):
        raise ExportError(f"path must be a file *.onnx or a folder, got {excerpt(path)}")
    target = Path(path)
    single = _check(model, target, opset, dtype)
    makers = _makers(model, inputs, names or StateNames(), last_logits)
    if single and len(makers) > 1:
        raise ExportError(f"an encoder-decoder becomes two files; give a folder instead of {target}")
    with files.staged(target, single) as folder:
        model = _in_dtype(model, dtype)
        if single:
            (only,) = makers.values()
            makers = {target.name: only}
        written, programs_, nodes = _write(model, makers, folder, opset, external_data, progress)
        if not single:
            written += _configuration(model, folder)
            if FILE in programs_ and "logits" in programs_[FILE].outputs:
                # A decoder that onnxruntime-genai has no names for is still one for onnxruntime.
                with suppress(ExportError):
                    written.append(write_genai(folder / FILE, model.config, model.generation_config))
        home = target.parent if single else target
        found = tuple(home / file.name for file in written)
    return Exported(
        path=target,
        files=found,
        sites=sum(isinstance(m, AttentionModule) and not m.is_exact for m in model.modules()),
        nodes=nodes,
        states=sum(program.states for program in programs_.values()),
        caches=sum(program.caches for program in programs_.values()),
        inputs={name: program.inputs for name, program in programs_.items()},
        outputs={name: program.outputs for name, program in programs_.items()},
    )


def _check(model: nn.Module, target: Path, opset: int, dtype: str | None) -> bool:
    """Raise for wrong arguments of `export_onnx`; whether the target is one file rather than a folder."""
    if not isinstance(model, nn.Module):
        raise InvalidModelError(f"export_onnx needs an nn.Module, got {type(model).__name__}")
    return check_target(target, opset, dtype)


def check_target(target: Path, opset: int, dtype: str | None) -> bool:
    """As `_check`, before there is a model."""
    if opset not in files.OPSETS:
        raise ExportError(f"opset must be {files.OPSETS[0]} to {files.OPSETS[-1]}, got {opset!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    files.check_name(target)
    single = target.suffix == ".onnx"
    try:
        wrong = target.exists() and target.is_dir() == single
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot write {shown(target)}: {reason(error)}") from error
    if wrong:
        raise ExportError(f"cannot write {target}: it is a {'folder' if single else 'file'}")
    return single


def _write(
    model: nn.Module,
    makers: Mapping[str, Callable[[Any], Program]],
    folder: Path,
    opset: int,
    external_data: bool | None,
    progress: bool | None,
) -> tuple[list[Path], dict[str, Program], Counter[str]]:
    """Make and write every graph: the files, the programs by file name, and our nodes by operator."""
    written: list[Path] = []
    made: dict[str, Program] = {}
    nodes: Counter[str] = Counter()
    with quiet_run(model), steps("export", 3 * len(makers), progress) as step:
        for name, make in makers.items():
            step(f"tracing {name}")
            made[name] = make(model)
            step(f"translating {name}")
            graph = files.model_of(made[name], opset)
            nodes += files.nodes_of(graph)
            step(f"writing {name}")
            written += files.write(graph, folder / name, external_data)
    return written, made, nodes


def _makers(
    model: Any, inputs: Any, names: StateNames, last_logits: bool
) -> dict[str, Callable[[Any], Program]]:
    """The graphs that the model becomes, by file name."""
    paired = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    stateful = inputs is None and generates(model)
    if last_logits and (paired or not stateful):
        raise ExportError("last_logits is for a decoder that is exported with its states")
    if stateful:
        if paired:
            return {ENCODER: programs.encoder_of, DECODER: lambda m: programs.decoder_of(m, names)}
        return {FILE: lambda m: programs.decoder(m, names, last_logits)}
    return {FILE: lambda m: programs.plain(m, inputs)}


def _in_dtype(model: nn.Module, dtype: str | None) -> nn.Module:
    """The model, or a copy of it in another dtype. Raises ExportError for one that ONNX files do not hold."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    wanted = DTYPES[dtype] if dtype else None
    if wanted is None and not found <= set(DTYPES.values()):
        raise ExportError(
            f"the model is in {', '.join(sorted(str(d).removeprefix('torch.') for d in found))}, which "
            f"onnxruntime does not compute in everywhere; give dtype= one of {', '.join(DTYPES)}"
        )
    if wanted is None or found == {wanted}:
        return model
    return copy.deepcopy(model).to(wanted)


def _configuration(model: Any, folder: Path) -> list[Path]:
    """The configuration files of a transformers model."""
    before = set(folder.iterdir())
    part: Any
    for part in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(folder)
    return sorted(set(folder.iterdir()) - before)
