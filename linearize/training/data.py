"""Training data: token ids, texts or dicts of a model's arguments, as rows that a DataLoader can batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..common.text import sequences
from ..errors import ConfigError, InputError

IGNORED = -100
"""The label of a position that is not trained on."""
_IDS = ("input_ids", "decoder_input_ids", "labels")


class Rows(Dataset[dict[str, Tensor]]):
    """Examples without a batch axis, each a dict of the model's keyword arguments."""

    def __init__(self, rows: Sequence[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]

    @property
    def tokens(self) -> int:
        """Tokens in all rows, padding left out."""
        return sum(_tokens(row) for row in self.rows)

    def split(self, share: float) -> tuple[Rows, Rows]:
        """The rows to train on, and those to measure on: the last `share`, at least one row.

        A single row is both.
        """
        kept = max(1, round(len(self) * share))
        first = len(self) - kept
        return Rows(self.rows[:first] or self.rows), Rows(self.rows[first:])

    def first(self, tokens: int | None) -> Rows:
        """As many rows from the beginning as have `tokens` tokens, at least one; None: all."""
        if tokens is None:
            return self
        count, found = 0, 0
        for row in self.rows:
            found += _tokens(row)
            if found > tokens:
                break
            count += 1
        return Rows(self.rows[: max(1, count)])


def rows_of(model: nn.Module, data: Any, tokenizer: Any = None, context: int = 512) -> Rows:
    """Rows for `model` from token ids, texts or dicts.

    data: int64 `[n]` or `[B, n]`, several such, or texts with their `tokenizer`: all are joined, each text
    followed by the tokenizer's end token if it has one, and cut into blocks of `context` tokens, so that
    documents within a block see each other. A last block that is not full is dropped, unless it is the only
    one. Encoders read each text or sequence by itself, with the tokenizer's special tokens, and cut off at
    `context`. Or dicts of the model's keyword arguments, batches `[B, ...]` or single examples whose token
    ids are `[T]`: these are taken apart into examples and stay as they are. Rows made earlier pass through.

    Raises InputError for data that is empty, has less than two tokens, is of another kind, or has ids that
    the model's vocabulary does not.
    """
    if isinstance(data, Rows):
        return data
    items = _items(data)
    if items and all(isinstance(item, Mapping) for item in items):
        rows = [row for item in items for row in _examples(item)]
        if not rows:
            raise InputError("the data holds no example: give some")
    elif any(isinstance(item, Mapping) for item in items):
        raise InputError("the data mixes dicts with token ids or texts: give one kind")
    elif context < 2:
        raise ConfigError(f"context is a number of tokens, 2 or more, got {context}")
    elif is_pair(model):
        raise InputError(
            "an encoder-decoder learns from pairs: give dicts with input_ids, attention_mask and labels"
        )
    elif is_encoder(model):
        pieces = [piece[:context] for piece in sequences(items, _whole(tokenizer, context)) if len(piece)]
        rows = [{"input_ids": piece, "attention_mask": torch.ones_like(piece)} for piece in pieces]
        if not rows:
            raise InputError("the data holds no token: give some text")
    else:
        rows = [{"input_ids": block} for block in _blocks(items, tokenizer, context)]
    _check_ids(model, rows)
    return Rows(rows)


@dataclass(frozen=True)
class Collate:
    """Rows to a batch. Rows of different lengths are filled up on the right: labels with -100, input ids with
    `pad_token_id`, everything else, the attention mask that is then added included, with zero."""

    pad_token_id: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Collate:
        found = getattr(getattr(model, "config", None), "pad_token_id", None)
        return cls(found if isinstance(found, int) and found >= 0 else 0)

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        names = rows[0].keys()
        for row in rows:
            if row.keys() != names:
                raise InputError(
                    f"examples have different inputs: {sorted(names)} and {sorted(row)}; give all the same"
                )
        batch = {name: self._join(name, [row[name] for row in rows]) for name in names}
        lengths = [len(row["input_ids"]) for row in rows] if "input_ids" in names else []
        if len(set(lengths)) > 1 and "attention_mask" not in names:
            places = torch.arange(max(lengths))
            batch["attention_mask"] = (places < torch.tensor(lengths)[:, None]).long()
        return batch

    def _join(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        if len({tensor.shape for tensor in tensors}) == 1:
            return torch.stack(list(tensors))
        if any(tensor.dim() == 0 or tensor.shape[1:] != tensors[0].shape[1:] for tensor in tensors):
            raise InputError(f"{name} differs between examples in more than its length: make them alike")
        ids = name in ("input_ids", "decoder_input_ids")
        fill = IGNORED if name == "labels" else self.pad_token_id if ids else 0
        return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=fill)


def _items(data: Any) -> list[Any]:
    if isinstance(data, Tensor):
        return list(data) if data.dim() == 2 else [data]
    if isinstance(data, str | Mapping):
        return [data]
    if isinstance(data, Sequence) and data and all(isinstance(item, int) for item in data):
        return [data]
    if not isinstance(data, Iterable):
        raise InputError(
            f"data is token ids, texts with their tokenizer, or dicts of the model's arguments, "
            f"got {type(data).__name__}"
        )
    return list(data)


def _examples(item: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """The examples of a batch `[B, ...]`, or the one example it is."""
    try:
        tensors = {name: torch.as_tensor(value) for name, value in item.items() if value is not None}
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"an example's inputs are tensors or lists of numbers: {error}") from error
    ids = next((tensors[name] for name in _IDS if name in tensors), None)
    if ids is not None and ids.dim() == 1:
        return [tensors]
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(
            "a batch's inputs have one first axis, as many examples as there are: got "
            + ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        )
    return [{name: tensor[i] for name, tensor in tensors.items()} for i in range(sizes.pop())]


def _blocks(items: Sequence[Any], tokenizer: Any, context: int) -> list[Tensor]:
    end = getattr(tokenizer, "eos_token_id", None)
    pieces: list[Tensor] = []
    for item in items:
        piece = sequences([item], tokenizer)[0]
        pieces.append(piece)
        if isinstance(item, str) and isinstance(end, int) and (not len(piece) or int(piece[-1]) != end):
            pieces.append(torch.tensor([end]))
    joined = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.long)
    if len(joined) < 2:
        raise InputError(f"the data has {len(joined)} token(s), which is nothing to learn from: give more")
    blocks = list(joined.split(context))
    if len(blocks) > 1 and len(blocks[-1]) < context:
        blocks.pop()
    return blocks


def _check_ids(model: nn.Module, rows: Sequence[Mapping[str, Tensor]]) -> None:
    size = vocabulary(model)
    for row in rows:
        for name in _IDS:
            ids = row.get(name)
            if ids is None or (name == "labels" and ids.is_floating_point()):
                continue
            if ids.is_floating_point() or ids.dtype == torch.bool:
                raise InputError(f"{name} are integers, got {ids.dtype}")
            if ids.numel() == 0:
                raise InputError(f"an example's {name} are empty: leave it out")
            if size is None or (name == "labels" and ids.dim() == 0):
                continue
            low, high = int(ids.min()), int(ids.max())
            if high >= size or (low < 0 and not (name == "labels" and low == IGNORED)):
                raise InputError(
                    f"{name} have the id {high if high >= size else low}, but the model's vocabulary has "
                    f"{size}: the data is from another tokenizer"
                )


def is_pair(model: nn.Module) -> bool:
    """Whether the model is an encoder with a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_encoder(model: Any) -> bool:
    """Whether the model is one of transformers that writes no text."""
    return hasattr(model, "can_generate") and not model.can_generate()


def _whole(tokenizer: Any, context: int) -> Any:
    """The tokenizer, which ends a text that is too long as it ends others."""
    return tokenizer and partial(tokenizer, truncation=True, max_length=context)


def vocabulary(model: nn.Module) -> int | None:
    """How many ids the model has embeddings for; None when it takes no ids that we know of."""
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    count = getattr(embeddings, "num_embeddings", None)
    return count if isinstance(count, int) else None


def _tokens(row: Mapping[str, Tensor]) -> int:
    mask = row.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    first = row.get("input_ids")
    if first is None:
        first = next(iter(row.values()))
    return first.shape[0] if first.dim() else 1
