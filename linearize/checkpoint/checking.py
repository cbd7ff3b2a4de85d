"""What is checked of a folder before a model of it is trusted: its class, its index, its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import excerpt
from ..common.files import read_json, shown
from ..common.replacing import INDEX, TRANSFORMERS, is_inside
from ..errors import CheckpointError
from ..mechanisms.module import AttentionModule
from ..planning.record import parse


def config_of(source: Path) -> Mapping[str, Any]:
    """The `config.json` of a folder. Raises CheckpointError where it is none."""
    config = read_json(source / TRANSFORMERS.record)
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{shown(source / TRANSFORMERS.record)} is not a model configuration")
    return config


def known_class(config: Mapping[str, Any]) -> Any | None:
    """The class of transformers that a configuration names first; None where it names none of its models."""
    import transformers

    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        return None
    cls = getattr(transformers, names[0], None)
    return cls if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None


def class_of(source: Path) -> Any:
    """The class of transformers that a converted checkpoint is of. Raises CheckpointError."""
    config = config_of(source)
    parse(config.get("linearize"), shown(source))
    cls = known_class(config)
    if cls is None:
        raise CheckpointError(
            f"{shown(source)} holds a model of class {excerpt(config.get('architectures'))}, which "
            "transformers lacks; load it with that class's own from_pretrained"
        )
    return cls


def check_index(source: Path) -> None:
    """Raise CheckpointError for weights, or an index of them, that would be read from outside the folder."""
    named = config_of(source).get(TRANSFORMERS.key)
    if named is not None and not is_inside(named):
        raise CheckpointError(f"{shown(source)} names weights outside its folder: {excerpt(named)}")
    path = source / (TRANSFORMERS.weights + INDEX if named is None else named)
    if path.name.endswith(INDEX) and path.is_file():
        if named is not None or not (source / TRANSFORMERS.weights).is_file():
            files_of_index(path)


def files_of_index(path: Path) -> dict[str, str]:
    """File by name of tensor, of an index of weights. Raises CheckpointError for one that is none."""
    index = read_json(path)
    where = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise CheckpointError(f"{shown(path)} is no index of shards: it has no `weight_map` of file names")
    for name in set(where.values()):
        if not is_inside(name) or name.endswith(INDEX):
            raise CheckpointError(
                f"{shown(path)} names {excerpt(name)}, which is no file of weights inside the folder"
            )
    return where


def check_finite(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise CheckpointError where one of the tensors that a model's attention modules get is no number."""
    for path, module in model.named_modules():
        if isinstance(module, AttentionModule):
            for name in (f"{path}.{name}" if path else name for name, _ in module.named_parameters()):
                tensor = tensors.get(name)
                if tensor is not None and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                    raise CheckpointError(f"{shown(source)}: {name} holds values that are not finite")


def check_fit(probe: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise CheckpointError unless there are exactly the tensors of `probe`, shapes and dtypes included.

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
    problems = [f"{name} is not in the model" for name in tensors if name not in state]
    for names in groups.values():
        known = [name for name in names if name in tensors]
        if not known:
            problems.append(f"{names[0]} is missing from the file")
            continue
        stored, tensor = tensors[known[0]], state[known[0]]
        free = known[0] in ours and tensor.is_floating_point() and stored.is_floating_point()
        if tensor.shape != stored.shape or (tensor.dtype != stored.dtype and not free):
            problems.append(f"{known[0]} is {_form(tensor)} in the model and {_form(stored)} in the file")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"{shown(source)} does not fit the given model: {'; '.join(problems[:4])}{more}"
        )


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
