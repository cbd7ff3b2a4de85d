"""Training data: token ids, texts or dicts of model arguments, as rows that a DataLoader can batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..common.checks import excerpt, require_whole
from ..common.given import check_names
from ..common.running import vocabulary_size
from ..common.text import IGNORED, sequences
from ..errors import ConfigError, InputError

_IDS = ("input_ids", "decoder_input_ids", "labels")


class TrainingData(Dataset[dict[str, Tensor]]):
    """Rows without a batch axis, each a dict of the model's keyword arguments."""

    def __init__(self, rows: Sequence[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]

    @property
    def tokens(self) -> int:
        """The number of tokens in all rows, without padding."""
        return sum(_tokens(row) for row in self.rows)

    def split(self, share: float) -> tuple[TrainingData, TrainingData]:
        """Split off the last `share` of the rows, at least one, to measure on.

        Returns:
            The rows to train on and the rows to measure on. A single row serves as both.
        """
        first = len(self) - max(1, round(len(self) * share))
        return TrainingData(self.rows[:first] or self.rows), TrainingData(self.rows[first:])

    def first(self, tokens: int | None) -> TrainingData:
        """The first rows that together have at most `tokens` tokens, at least one; all of them for None."""
        require_whole("tokens", tokens, optional=True)
        if tokens is None:
            return self
        count, found = 0, 0
        for row in self.rows:
            found += _tokens(row)
            if found > tokens:
                break
            count += 1
        return TrainingData(self.rows[: max(1, count)])


def training_data(model: nn.Module, data: Any, tokenizer: Any = None, context: int = 512) -> TrainingData:
    """Make rows for `model` from token ids, texts or dicts.

    For decoders, token ids and texts are joined to one stream, each text followed by the tokenizer's end
    token if it has one, and the stream is cut into blocks of `context` tokens; documents in one block see
    each other. A last block that is not full is dropped unless it is the only one. For encoders, each text
    or sequence is a row of its own, with the tokenizer's special tokens, truncated to `context` tokens.
    Dicts are split into single examples and otherwise left as they are.

    Args:
        model: The model that will be trained on the rows.
        data: Token ids int64 `[n]` or `[B, n]`, a list of these, texts, dicts of the model's keyword
            arguments (batches `[B, ...]`, or single examples whose token ids are `[T]`), or `TrainingData`,
            which is returned as it is.
        tokenizer: The tokenizer of the model; needed for texts.
        context: Tokens per row.

    Raises:
        InputError: The data is empty, has fewer than two tokens, is of another kind, or has token ids outside
            the model's vocabulary.
        ConfigError: `context` is below 2.
    """
    if isinstance(data, TrainingData):
        return data
    items = _items(data)
    if items and all(isinstance(item, Mapping) for item in items):
        rows = [row for item in items for row in _examples(item)]
        if not rows:
            raise InputError("the data has no example: give some")
    elif any(isinstance(item, Mapping) for item in items):
        raise InputError("the data mixes dicts with token ids or texts: give one kind")
    elif not isinstance(context, int) or context < 2:
        raise ConfigError(f"context must be 2 tokens or more, got {excerpt(context)}", "context")
    elif is_encoder_decoder(model):
        raise InputError(
            "an encoder-decoder learns from pairs: give dicts with input_ids, attention_mask and labels"
        )
    elif is_encoder(model):
        found = sequences(items, _truncating(tokenizer, context))
        pieces = [piece[:context] for piece in found if len(piece)]
        rows = [{"input_ids": piece, "attention_mask": torch.ones_like(piece)} for piece in pieces]
        if not rows:
            raise InputError("the data has no token: give some text")
    else:
        rows = [{"input_ids": block} for block in _blocks(items, tokenizer, context)]
    _check_ids(model, rows)
    for names in {tuple(row) for row in rows}:
        check_names(model, dict.fromkeys(names))
    return TrainingData(rows)


@dataclass(frozen=True)
class Collate:
    """Join rows to a batch.

    Rows of different lengths are padded on the right: labels with -100, input ids with `pad_token_id`, and
    everything else with zero. If they have no attention mask, one is added.
    """

    pad_token_id: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Collate:
        """With the padding token of the model's config."""
        found = getattr(getattr(model, "config", None), "pad_token_id", None)
        return cls(found if isinstance(found, int) and found >= 0 else 0)

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        names = rows[0].keys()
        for row in rows:
            if row.keys() != names:
                raise InputError(
                    f"examples have different inputs: {sorted(names)} and {sorted(row)}; "
                    "give all of them the same"
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
            f"data must be token ids, texts with their tokenizer, or dicts of the model's arguments, "
            f"got {type(data).__name__}"
        )
    return list(data)


def _examples(item: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """The single examples of a batch `[B, ...]`; a single example `[T]` gives a list of one."""
    try:
        tensors = {name: torch.as_tensor(value) for name, value in item.items() if value is not None}
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the inputs of an example must be tensors or lists of numbers: {error}") from error
    ids = next((tensors[name] for name in _IDS if name in tensors), None)
    if ids is not None and ids.dim() == 1:
        return [tensors]
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(
            "all inputs of a batch must have the same first axis, the number of examples: got "
            + ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        )
    return [{name: tensor[i] for name, tensor in tensors.items()} for i in range(sizes.pop())]


def _blocks(items: Sequence[Any], tokenizer: Any, context: int) -> list[Tensor]:
    end = getattr(tokenizer, "eos_token_id", None)
    pieces: list[Tensor] = []
    for item in items:
        found = sequences([item], tokenizer)
        if isinstance(item, str) and isinstance(end, int) and found[0][-1:].tolist() != [end]:
            found.append(torch.tensor([end]))
        pieces += found
    joined = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.long)
    if len(joined) < 2:
        raise InputError(f"the data has {len(joined)} token(s), too few to learn from: give more")
    blocks = list(joined.split(context))
    if len(blocks) > 1 and len(blocks[-1]) < context:
        blocks.pop()
    return blocks


def _check_ids(model: nn.Module, rows: Sequence[Mapping[str, Tensor]]) -> None:
    size = vocabulary_size(model)
    for row in rows:
        for name in _IDS:
            ids = row.get(name)
            if ids is None or (name == "labels" and ids.is_floating_point()):
                continue
            if ids.is_floating_point() or ids.dtype == torch.bool:
                raise InputError(f"{name} must be integers, got {ids.dtype}")
            if ids.numel() == 0:
                raise InputError(f"{name} of an example is empty: leave the example out")
            if size is None or (name == "labels" and ids.dim() == 0):
                continue
            low, high = int(ids.min()), int(ids.max())
            if high >= size or (low < 0 and not (name == "labels" and low == IGNORED)):
                raise InputError(
                    f"{name} have the id {high if high >= size else low}, but the model's vocabulary has "
                    f"{size} ids: the data comes from another tokenizer"
                )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether this is an encoder-decoder of transformers."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_encoder(model: Any) -> bool:
    """Whether this is a transformers model that does not generate text."""
    return hasattr(model, "can_generate") and not model.can_generate()


def _truncating(tokenizer: Any, context: int) -> Any:
    """The tokenizer, set to truncate texts to `context` tokens, special tokens included."""
    return tokenizer and partial(tokenizer, truncation=True, max_length=context)


def _tokens(row: Mapping[str, Tensor]) -> int:
    mask = row.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    first = row.get("input_ids")
    if first is None:
        first = next(iter(row.values()))
    return first.shape[0] if first.dim() else 1
