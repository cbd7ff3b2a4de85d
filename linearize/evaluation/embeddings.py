"""Agreement of encoders: how alike two models' embeddings of the same texts are."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.progress import bar
from ..common.running import shapes
from ..errors import ConfigError, InputError
from .compared import Compared, check_vocabulary, dicts, positions, with_forward_rate
from .figures import Figures, Measurement
from .perplexity import sequences_in
from .similarity import compare, pooled


def encoder_measurements(
    compared: Compared,
    data: Any,
    tokenizer: Any,
    lengths: Sequence[int] | None,
    max_tokens: int,
    batch_tokens: int,
    speed: bool,
    progress: bool | None = None,
) -> list[Measurement]:
    """Compare embeddings at each length; lengths: None for the length that the models take."""
    items = [data] if isinstance(data, (Mapping, str)) else data
    start: Iterator[Any] = iter(items)
    first = next(start, None)
    if isinstance(first, Mapping):
        if lengths is not None:
            raise ConfigError("dicts are read as they are: leave out lengths, or give texts or token ids")
        return [_at_length(compared, itertools.chain([first], start), None, max_tokens, speed, progress)]
    if isinstance(data, Tensor) and data.dim() == 1:
        raise InputError("an encoder compares several texts: give token ids [B, n], or several [n]")
    if first is None:
        raise InputError("the data is empty: give some texts")
    rest = data if isinstance(data, Tensor) else itertools.chain([first], start)
    texts = list(sequences_in(rest, tokenizer))
    if not texts or not all(map(len, texts)):
        raise InputError("the data is empty, or has an empty text: give some texts")
    check_vocabulary(compared, torch.cat(texts))
    limits = [positions(model) for model in compared.all] + [getattr(tokenizer, "model_max_length", 1 << 62)]
    rows = []
    for length in lengths or [min(max(map(len, texts)), *limits)]:
        cut = [ids[:length] for ids in texts]
        batches = _padded(cut, max(1, batch_tokens // length), getattr(compared.model, "config", None))
        rows.append(_at_length(compared, batches, length, max_tokens, speed, progress))
    return rows


def _padded(texts: Sequence[Tensor], rows: int, config: Any) -> Iterator[dict[str, Tensor]]:
    """Batches of `rows` texts, padded on the right."""
    pad = getattr(config, "pad_token_id", None) or 0
    for start in range(0, len(texts), rows):
        part = texts[start : start + rows]
        ids = nn.utils.rnn.pad_sequence(list(part), batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(text) for text in part])
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
        yield {"input_ids": ids, "attention_mask": mask.long()}


def _at_length(
    compared: Compared,
    batches: Iterable[Mapping[str, Any]],
    length: int | None,
    max_tokens: int,
    speed: bool,
    progress: bool | None,
) -> Measurement:
    found: list[list[Tensor]] = [[], []]
    tokens, first = 0, None
    with bar("evaluate", None, progress, "tokens") as tick:
        for here, batch, vectors in _embedded(compared, batches):
            for side, part in enumerate(vectors):
                found[side].append(part)
            tokens += here
            tick(here)
            first = first or (batch, here)
            if tokens >= max_tokens:
                break
    if first is None:
        raise InputError("the data is empty: give some texts")
    cosine, correlation = compare(torch.cat(found[0]), torch.cat(found[1]))
    figures = [Figures(), Figures()]
    if speed:
        figures = with_forward_rate(figures, compared, *first)
    return Measurement(length, tokens, figures[0], figures[1], cosine=cosine, spearman=correlation)


def _embedded(
    compared: Compared, batches: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[int, Mapping[str, Any], list[Tensor]]]:
    """The tokens of each batch, the batch, and each model's embeddings of its texts."""
    for index, batch in enumerate(dicts(batches)):
        where = f"batch {index} ({shapes(batch)})"
        found = []
        mask = batch.get("attention_mask")
        for side, hidden in enumerate(map(_hidden, compared.outputs(batch, where))):
            vectors = pooled(hidden, None if mask is None else mask.to(hidden.device)).cpu()
            if bool(vectors.isnan().any()):
                who = ("model", "reference")[side]
                raise InputError(
                    f"the {who}'s embeddings are NaN in {where}: its weights or inputs are broken"
                )
            found.append(vectors)
        here = int(mask.sum()) if isinstance(mask, Tensor) else hidden.shape[0] * hidden.shape[1]
        yield here, batch, found


def _hidden(output: Any) -> Tensor:
    """The hidden states `[B, T, D]` of the last layer."""
    last = getattr(output, "last_hidden_state", None)
    return output.hidden_states[-1] if last is None else last
