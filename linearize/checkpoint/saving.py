"""Saving and loading converted models: safetensors and JSON, bit for bit, without searching a graph again."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from ..common.files import read_json, staged
from ..errors import CheckpointError, InvalidModelError
from ..mechanisms.module import AttentionModule
from ..planning.record import VERSION, measured_in, parse
from ..planning.state import carry, state_of
from ..rewrite.apply import apply_plan, check_unconverted

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)
RECORD = "linearize.json"
WEIGHTS = "model.safetensors"


def save(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Write a converted model to a folder: weights (safetensors), plan, config, and a model card.

    A transformers model is written as its own `save_pretrained` does it, so `from_pretrained` can read it
    once `linearize` is imported. Any other module becomes `model.safetensors` and `linearize.json`. Other
    files in the folder stay, and so does a README.md that is not our card. Everything is written beside the
    folder first and moved in at the end, so that no file is ever half written.

    Args:
        model: A model that `linearize` converted. Parameters and buffers of any dtype are stored as they are.
        directory: The folder to write; it is created where there is none.

    Returns:
        The folder.

    Raises:
        InvalidModelError: The model is not converted, or wraps a converted one (as PEFT does).
        CheckpointError: The folder cannot be written.
    """
    from transformers import PreTrainedModel

    from ..evaluation.card import NAME, is_ours, write_card

    state = state_of(model)
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"cannot save to {target}: it is a file, not a directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The file that says "converted checkpoint" goes last: until then a reader sees the previous one.
        with staged(target, last=lambda file: file.name in {RECORD, "config.json"}) as folder:
            if isinstance(model, PreTrainedModel):
                model.save_pretrained(folder)
            else:
                record = {
                    "version": VERSION,
                    "model": type(model).__qualname__,
                    "plan": state.plan.to_dict(),
                    "config": state.config.to_dict(),
                    "measured": list(state.measured),
                }
                (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
                save_model(model, str(folder / WEIGHTS))
                write_card(model, folder)
            if not is_ours(target / NAME):
                (folder / NAME).unlink()
            new = {path.name for path in folder.iterdir()}
        _remove_stale(target, new)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot save to {target}: {error}") from error
    return target


@overload
def load(
    directory: str | os.PathLike[str], model: None = None, *, dtype: torch.dtype | None = None
) -> PreTrainedModel: ...


@overload
def load(directory: str | os.PathLike[str], model: Model, *, dtype: None = None) -> Model: ...


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Read a converted model back, as it was saved. The stored plan is applied again; no graph is searched.

    The folder of a transformers model is all that is needed. For any other module give `model`, an
    unconverted module of the same architecture and dtype: it is converted in place and gets the stored
    weights.

    Args:
        directory: The folder that `save` or `save_pretrained` wrote.
        model: The module to fill, for the checkpoint of a plain `nn.Module`. Otherwise leave it out.
        dtype: Convert a transformers model to this floating dtype while loading; as stored by default.

    Returns:
        The converted transformers model, in evaluation mode, or `model` itself.

    Raises:
        CheckpointError: The folder is not a complete, readable, converted checkpoint, it does not fit
            `model`, or `model` or `dtype` is given for the wrong kind of checkpoint. `model` is then as it
            was.
        InvalidModelError: `model` is converted already.
    """
    source = Path(directory)
    if not source.is_dir():
        raise CheckpointError(f"cannot load {source}: no such directory")
    if (source / RECORD).is_file():
        if model is None:
            raise CheckpointError(
                f"{source} holds a plain module: give a fresh one to fill, load(directory, model=...)"
            )
        if dtype is not None:
            raise CheckpointError(
                "`dtype` is for transformers checkpoints; convert the module with `.to(dtype)`"
            )
        return _load_module(source, model)
    if model is not None:
        raise CheckpointError(f"{source} has no {RECORD}: `model` is only for checkpoints of plain modules")
    return _load_transformers(source, dtype)


def _remove_stale(target: Path, new: set[str]) -> None:
    """Remove the files of an earlier save that would be read beside the new ones."""
    old = {RECORD, *(path.name for path in target.glob("model*.safetensors*"))}
    for name in old - new:
        (target / name).unlink(missing_ok=True)


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a safetensors file. Raises CheckpointError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no __iter__)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is incomplete: {path.name} is missing") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read, it is cut short or damaged: {error}") from error


def _load_transformers(source: Path, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    config = read_json(source / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{source / 'config.json'} is not a model configuration")
    parse(config.get("linearize"), str(source))
    names = config.get("architectures") or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise CheckpointError(
            f"{source} holds a model of class {names[0] if names else 'unknown'}, which transformers lacks; "
            "load it with that class's own from_pretrained"
        )
    try:
        model, info = cls.from_pretrained(
            source, dtype="auto" if dtype is None else dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, InvalidModelError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {source}: {error}") from error
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise CheckpointError(f"{source} does not fit the model its config describes: {wrong}")
    return model


def _load_module(source: Path, model: nn.Module) -> nn.Module:
    record = read_json(source / RECORD)
    plan, config = parse(record, str(source))
    stored = _header(source / WEIGHTS)
    check_unconverted(model)
    # Everything that can fail is tried on a copy without storage first, so that `model` is never half done.
    probe = _meta_copy(model)
    try:
        apply_plan(probe, plan, config)
    except InvalidModelError as error:
        raise CheckpointError(f"{source} was saved from another architecture: {error}") from error
    _check_fit(probe, stored, source)
    apply_plan(model, plan, config)
    load_model(model, str(source / WEIGHTS))
    carry(model, measured_in(record))
    return model


def _meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the modules whose tensors have shapes and dtypes but no storage."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    return copy.deepcopy(model, memo)


def _check_fit(probe: nn.Module, stored: dict[str, tuple[tuple[int, ...], str]], source: Path) -> None:
    """Raise CheckpointError unless the file has exactly the tensors of `probe`, shapes and dtypes included.

    Tensors that share storage are stored once, under any of their names. Those of our modules may be of any
    floating type in the file: earlier releases kept them in the model's, and a user may.
    """
    state = probe.state_dict()
    ours = {
        f"{path}.{name}" if path else name
        for path, module in probe.named_modules()
        if isinstance(module, AttentionModule)
        for name in module.state_dict()
    }
    groups: dict[int, list[str]] = {}
    for name, tensor in probe.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    problems = [f"{name} is not in the model" for name in stored if name not in state]
    for names in groups.values():
        known = [name for name in names if name in stored]
        if not known:
            problems.append(f"{names[0]} is missing from the file")
            continue
        name = known[0]
        shape, dtype = stored[name]
        tensor = state[name]
        have = _SAFETENSORS_NAME.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype))
        free = name in ours and tensor.is_floating_point() and dtype in _FLOATING
        if tuple(tensor.shape) != shape or (have != dtype and not free):
            problems.append(
                f"{name} is {have} {tuple(tensor.shape)} in the model and {dtype} {shape} in the file"
            )
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{source} does not fit the given model: {'; '.join(problems[:4])}{more}")


_FLOATING = ("F64", "F32", "F16", "BF16")
_SAFETENSORS_NAME = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
