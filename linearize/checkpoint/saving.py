"""Saving and loading converted models: safetensors and JSON, bit for bit, without searching a graph again."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from ..common.checks import excerpt
from ..common.files import read_json, shown
from ..common.replacing import TRANSFORMERS, Layout, finish_killed, identity, is_inside, whole_checkpoint
from ..common.running import shortened
from ..common.scratch import locked
from ..errors import CheckpointError, LinearizeError
from ..planning.record import VERSION, measured_in, parse
from ..planning.state import carry, state_of
from ..rewrite.apply import check_unconverted
from ..rewrite.model import drop_card
from .checking import check_finite, check_fit, check_index, class_of
from .hub import fetch, is_name
from .replay import replay

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)
Result = TypeVar("Result")
RECORD = "linearize.json"
WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"
TRIALS = 8
"""Reads of a checkpoint that others replace meanwhile."""
MODULE = Layout(RECORD, "weights", WEIGHTS, instead=TRANSFORMERS.record)


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
    return write_checkpoint(model, directory)


def write_checkpoint(
    model: nn.Module, directory: str | os.PathLike[str], beside: Callable[[Path], None] = lambda folder: None
) -> Path:
    """As `save`. beside: writes more files into the folder that it is given, which appear with the others."""
    from transformers import PreTrainedModel

    from ..evaluation.card import write_card

    state = state_of(model)
    target = path_of(directory)
    whole = isinstance(model, PreTrainedModel)
    with whole_checkpoint(target, TRANSFORMERS if whole else MODULE) as folder:
        if whole:
            cast(Any, model).write_into(folder)
        else:
            record = {
                "version": VERSION,
                "model": type(model).__qualname__,
                "plan": state.plan.to_dict(),
                "config": state.config.to_dict(),
                "measured": list(state.measured),
            }
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            save_model(model, str(folder / WEIGHTS))
            write_card(model, folder)
        drop_card(folder, target)
        beside(folder)
    return target


@overload
def load(
    directory: str | os.PathLike[str],
    model: None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> PreTrainedModel: ...


@overload
def load(
    directory: str | os.PathLike[str],
    model: Model,
    *,
    dtype: None = None,
    device_map: None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Model: ...


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> nn.Module:
    """Read a converted model back, as it was saved. The stored plan is applied again; no graph is searched.

    The folder of a transformers model is all that is needed. For any other module give `model`, an
    unconverted module of the same architecture and dtype: it is converted in place and gets the stored
    weights.

    Args:
        directory: The folder that `save` or `save_pretrained` wrote, or the name of a model on the Hub.
        model: The module to fill, for the checkpoint of a plain `nn.Module`. Otherwise leave it out.
        dtype: Convert a transformers model to this floating dtype while loading; as stored by default.
        device_map: Where a transformers model goes, as in its `from_pretrained`, such as "cuda" or "auto".
        revision: Branch, tag or commit of a model on the Hub.
        token: Of the Hub; the one of `hf auth login` by default.

    Returns:
        The converted transformers model, in evaluation mode, or `model` itself.

    Raises:
        CheckpointError: The folder is not a complete, readable, converted checkpoint, it does not fit
            `model`, or an argument is given for the wrong kind of checkpoint. `model` is then as it was.
        InvalidModelError: `model` is converted already.
    """
    source = _source(directory, revision, token)
    for layout in (MODULE, TRANSFORMERS):
        finish_killed(source, layout)
    if (source / RECORD).is_file():
        if model is None:
            raise CheckpointError(
                f"{source} holds a plain module: give a fresh one to fill, load(directory, model=...)"
            )
        if dtype is not None or device_map is not None:
            raise CheckpointError(
                "`dtype` and `device_map` are for transformers checkpoints; convert the module with `.to`"
            )
        return _fill(source, model, *_undisturbed(source, lambda: _read_module(source)))
    if model is not None:
        raise CheckpointError(f"{source} has no {RECORD}: `model` is only for checkpoints of plain modules")
    wanted = _dtype(dtype)
    return _undisturbed(source, lambda: _load_transformers(source, wanted, device_map))


def _source(directory: Any, revision: str | None, token: str | bool | None) -> Path:
    """The folder of a checkpoint, fetched where a name on the Hub is given. Raises CheckpointError."""
    source = path_of(directory)
    if os.path.isdir(source):
        if revision is not None or token is not None:
            raise CheckpointError(f"`revision` and `token` are for the Hub, and {shown(source)} is a folder")
        return source
    if not isinstance(directory, str) or not is_name(directory):
        raise CheckpointError(f"cannot load {shown(source)}: no such directory")
    return fetch(directory, revision, token)


def _dtype(dtype: Any) -> Any:
    """A floating dtype, given as it is or by its name; "auto" for None. Raises CheckpointError."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype in (None, "auto"):
        return "auto"
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"dtype must be a floating one, such as torch.bfloat16, got {excerpt(dtype)}")
    return found


def path_of(directory: Any) -> Path:
    """The path that a user gave. Raises CheckpointError for what is none."""
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise CheckpointError(f"a folder is a path, got {excerpt(directory)}")
    return Path(directory)


def _undisturbed(source: Path, read: Callable[[], Result]) -> Result:
    """What `read` gives; read again where other writers replaced the checkpoint meanwhile.

    After a few trials they wait: who writes all the time would never let anyone read.
    """
    for trial in range(TRIALS):
        with locked(source) if trial >= TRIALS // 2 else contextlib.nullcontext():
            before = _identity(source)
            error: CheckpointError | None = None
            try:
                found = read()
            except CheckpointError as problem:
                error = problem
            if before == _identity(source):
                if error is not None:
                    raise error
                return found
    raise CheckpointError(f"{shown(source)} is being written all the time; load it when that has ended")


def _identity(source: Path) -> list[tuple[int, int, int] | None]:
    return [identity(source / name) for name in (RECORD, TRANSFORMERS.record)]


def _load_transformers(source: Path, dtype: torch.dtype | str, device_map: Any) -> nn.Module:
    cls = class_of(source)
    check_index(source)
    generation = source / GENERATION
    # transformers goes on in silence without what it cannot read, and so with other ends of a text.
    if generation.exists() and not isinstance(read_json(generation), dict):
        raise CheckpointError(f"{shown(generation)} cannot be read: it holds no object")
    try:
        model, info = cls.from_pretrained(
            source, dtype=dtype, device_map=device_map, local_files_only=True, output_loading_info=True
        )
    except LinearizeError as error:
        raise CheckpointError(f"cannot load {shown(source)}: {error}") from error
    # A config from anywhere can make any line of transformers raise anything.
    except Exception as error:
        raise CheckpointError(f"cannot load {shown(source)}: {shortened(error, 200)}") from error
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        text = "; ".join(
            f"{kind}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
            for kind, keys in wrong.items()
        )
        raise CheckpointError(f"{shown(source)} does not fit the model its config describes: {text}")
    check_finite(model, model.state_dict(), source)
    return model


def _read_module(source: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """The record and the tensors of a plain module's checkpoint."""
    record = read_json(source / RECORD)
    parse(record, str(source))
    name = record.get(MODULE.key, WEIGHTS)
    if not is_inside(name) or not name.endswith(".safetensors"):
        raise CheckpointError(f"{source / RECORD}: the weights are in {excerpt(name)}, outside the folder")
    path = source / name
    try:
        return record, load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is incomplete: {path.name} is missing") from error
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read, it is cut short or damaged: {error}") from error


def _fill(source: Path, model: Model, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Model:
    """Convert a plain module by a record, and give it the tensors."""
    plan, config = parse(record, str(source))
    check_unconverted(model)
    # Everything that can fail is tried on a copy without storage first, so that `model` is never half done.
    probe = _meta_copy(model)
    replay(probe, plan, config, str(source))
    check_fit(probe, tensors, source)
    check_finite(probe, tensors, source)
    replay(model, plan, config, str(source))
    model.load_state_dict(dict(tensors), strict=False)  # tensors that share storage are stored once
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
