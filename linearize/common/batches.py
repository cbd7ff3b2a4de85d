"""Batches of a model's inputs, in the forms in which users have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

_EXPECTED = "batches are token ids int64 [B, T], dicts of the model's keyword arguments, or several of these"


def batches_of(data: Any) -> Iterator[dict[str, Any]]:
    """Every batch as keyword arguments; one alone is a batch, and so is one sequence. Raises InputError."""
    if isinstance(data, Mapping) or (isinstance(data, Tensor) and data.dim() <= 2) or _is_ids(data):
        data = [data]
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise InputError(f"{_EXPECTED}; got {_kind(data)}")
    for batch in data:
        yield batch_of(batch)


def batch_of(batch: Any) -> dict[str, Any]:
    """A batch as keyword arguments. Raises InputError for anything else, and for an empty batch."""
    given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": _ids(batch)}
    inputs = {name: _tensor(name, x) if isinstance(x, list) else x for name, x in given.items()}
    tensors = [x for x in inputs.values() if isinstance(x, Tensor)]
    if not tensors or any(x.numel() == 0 for x in tensors):
        raise InputError(f"a batch is empty; {_EXPECTED}")
    return inputs


def tokens_in(inputs: Mapping[str, Any]) -> int:
    """The number of tokens in the first tensor among a model's inputs."""
    first = next(x for x in inputs.values() if isinstance(x, Tensor))
    return first.shape[0] * (first.shape[1] if first.dim() > 1 else 1)


def _ids(batch: Any) -> Tensor:
    if isinstance(batch, list | tuple) and batch and all(map(_is_ids, batch)):
        batch = _tensor("a batch", list(batch))
    elif _is_ids(batch):
        batch = torch.tensor(list(batch))
    if not isinstance(batch, Tensor) or batch.dim() == 0:
        raise InputError(f"{_EXPECTED}; a batch is {_kind(batch)}")
    return batch[None] if batch.dim() == 1 else batch


def _is_ids(item: Any) -> bool:
    """Whether this is one sequence of token ids, as tokenizers give it."""
    return isinstance(item, list | tuple) and bool(item) and all(type(x) is int for x in item)


def _tensor(name: str, values: list[Any]) -> Tensor:
    try:
        return torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} is a list that makes no tensor: its rows must be numbers, and of one length "
            "(padding=True of a tokenizer makes them so)"
        ) from error


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "a text; tokenizer(text, return_tensors='pt') makes token ids of it"
    return f"of type {type(value).__name__}"
