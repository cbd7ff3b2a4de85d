"""Tensors by name, from whatever files a checkpoint is made of. Nothing but tensors is unpickled."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..common.files import reason, shown
from ..errors import CheckpointError
from .checking import files_of_index

Source = str | os.PathLike[str] | Mapping[str, Tensor]
# The first of each row that a folder has is read: safetensors before pickles, as transformers does.
WHOLE = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
BESIDE = ("trainable_params.bin",)
"""LongLoRA's name for what was trained beside an adapter; the paper's fine-tuning code builds on LongLoRA."""


def read(source: Source) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of a mapping, of a file (safetensors, or `torch.save`), or of each file of a folder.

    A folder holds a whole checkpoint, in one file or sharded with an index, a PEFT adapter, or both. Files
    are mapped rather than read where their format allows it. Raises CheckpointError.
    """
    if isinstance(source, Mapping):
        yield _tensors(source, "the given mapping")
        return
    path = Path(source)
    if path.is_file():
        yield from _file(path)
        return
    if not path.is_dir():
        raise CheckpointError(f"cannot load {path}: no such file or directory")
    found = [
        next(path / name for name in row if (path / name).is_file())
        for row in (WHOLE, ADAPTER, BESIDE)
        if any((path / name).is_file() for name in row)
    ]
    if not found:
        raise CheckpointError(f"{path} holds no weights: none of {', '.join(WHOLE + ADAPTER + BESIDE)}")
    for file in found:
        yield from _file(file)


def _file(path: Path) -> Iterator[Mapping[str, Tensor]]:
    if path.name.endswith(".index.json"):
        yield from _shards(path)
        return
    try:
        if path.suffix == ".safetensors":
            yield load_file(path)
            return
        # Only the zip format of `torch.save` can be mapped; files from before it are read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} is incomplete: {path.name} is missing") from error
    # What is no archive can end a reader of archives in any way.
    except Exception as error:
        raise CheckpointError(
            f"{shown(path)} cannot be read, it is cut short or damaged: {reason(error)}"
        ) from error
    yield _tensors(content, str(path))


def _shards(index: Path) -> Iterator[Mapping[str, Tensor]]:
    where = files_of_index(index)
    for name in sorted(set(where.values())):
        for shard in _file(index.parent / name):
            lost = next((key for key, file in where.items() if file == name and key not in shard), None)
            if lost is not None:
                raise CheckpointError(f"{index.parent / name} lacks {lost}, which {index.name} says it has")
            yield shard


def _tensors(content: object, where: str) -> Mapping[str, Tensor]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where} holds a {type(content).__name__}, not tensors by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: {name!r} is a {type(value).__name__}, not a tensor")
    return content
