"""Perplexity and agreement: of decoders at each length, and of encoder-decoders on their labels."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..common.progress import Tick, bar
from ..common.running import shapes
from ..common.text import IGNORED, sequences
from ..errors import InputError
from .compared import Compared, check_vocabulary, dicts, output, positions, with_forward_rate
from .figures import Figures, Measurement
from .quality import Tally, scored_positions
from .speed import decode_rates, device_of, forward_rates, in_turn, timed

LENGTHS = (128, 512, 2048)
"""The default context lengths; those are used that data and model have room for."""
_WARM = 64
"""Tokens of a first pass that is not timed."""


def joined(compared: Compared, data: Any, tokenizer: Any, max_tokens: int) -> Tensor:
    """The first `max_tokens` token ids of the data, joined: int64 `[N]`."""
    found: list[Tensor] = []
    count = 0
    for ids in sequences_in(data, tokenizer):
        found.append(ids[: max_tokens - count])
        count += len(found[-1])
        if count >= max_tokens:
            break
    stream = torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
    if not len(stream):
        raise InputError("the data has no token: give some text")
    check_vocabulary(compared, stream)
    return stream


def sequences_in(data: Any, tokenizer: Any) -> Iterator[Tensor]:
    """The sequences of token ids in the data, int64 `[n]`, also those in dicts."""
    if isinstance(data, Mapping):
        data = [data]
    if isinstance(data, (Tensor, str)):
        yield from sequences(data, tokenizer)
        return
    for item in data:
        if not isinstance(item, Mapping):
            yield from sequences([item], tokenizer)
            continue
        other = sorted(set(item) - {"input_ids", "attention_mask", "labels"})
        if "input_ids" not in item or other:
            raise InputError(
                f"a dict for a decoder has input_ids and attention_mask, got {', '.join(map(str, item))}"
            )
        ids = torch.as_tensor(item["input_ids"])
        mask = torch.as_tensor(item.get("attention_mask", torch.ones_like(ids)))
        for row, real in zip(torch.atleast_2d(ids), torch.atleast_2d(mask), strict=True):
            yield row[real.bool()].long().cpu()


def decoder_measurements(
    compared: Compared,
    stream: Tensor,
    lengths: Sequence[int] | None,
    batch_tokens: int,
    decode_tokens: int,
    progress: bool | None = None,
) -> list[Measurement]:
    """Measure at each length; lengths: None for those of `LENGTHS` that data and models have room for."""
    stream, lengths = cut(compared.all, stream, lengths)
    keep = scored_positions(len(stream), lengths)
    with bar("evaluate", len(stream) * len(lengths), progress, "tokens") as tick:
        return [_at_length(compared, stream, keep, n, batch_tokens, decode_tokens, tick) for n in lengths]


def cut(
    models: Sequence[nn.Module], stream: Tensor, lengths: Sequence[int] | None
) -> tuple[Tensor, Sequence[int]]:
    """The tokens that are used, a multiple of the longest length, and the lengths, in ascending order.

    lengths: None for those of `LENGTHS` that data and models have room for.
    """
    limit = min(len(stream), *(positions(model) for model in models))
    lengths = lengths or [length for length in LENGTHS if length <= limit]
    if not lengths:
        raise InputError(
            f"data and model have room for {limit} tokens, and the shortest window is {LENGTHS[0]}: give "
            "more data, or lengths="
        )
    if lengths[-1] > len(stream):
        raise InputError(
            f"the data has {len(stream)} tokens, fewer than a window of {lengths[-1]}: give more, or shorter "
            "lengths="
        )
    return stream[: len(stream) // lengths[-1] * lengths[-1]], lengths


def measure_side_by_side(
    models: Sequence[nn.Module],
    stream: Tensor,
    lengths: Sequence[int] | None,
    batch_tokens: int,
    decode_tokens: int,
    progress: bool | None = None,
) -> tuple[list[dict[int, Figures]], int]:
    """The figures of each model by length, and how many tokens were scored.

    As `decoder_measurements`, of any number of models and cheaper: what is scored is what is timed. The
    models take turns at every batch, every second time in reverse order, and the median counts.

    Args:
        models: Decoders.
        stream: int64 `[N]`.
        lengths: As in `cut`.
        batch_tokens: How many tokens run at once.
        decode_tokens: How many tokens to decode for the speed; 0 leaves speed out.
        progress: As for `bar`.
    """
    stream, lengths = cut(models, stream, lengths)
    keep = scored_positions(len(stream), lengths)
    found: list[dict[int, Figures]] = [{} for _ in models]
    tokens = 0
    with bar("measure", len(stream) * len(lengths), progress, "tokens") as tick:
        for length in lengths:
            figures, tokens = _side_by_side(models, stream, keep, length, batch_tokens, decode_tokens, tick)
            for own, here in zip(found, figures, strict=True):
                own[length] = here
    return found, tokens


def _side_by_side(
    models: Sequence[nn.Module],
    stream: Tensor,
    keep: Tensor,
    length: int,
    batch_tokens: int,
    decode_tokens: int,
    tick: Tick,
) -> tuple[list[Figures], int]:
    """The figures of each model at one length, and how many tokens were scored."""
    tallies, times = [Tally() for _ in models], [list[float]() for _ in models]
    warm = stream[:length][None, :_WARM]
    for model in models if decode_tokens else ():
        output(model, {"input_ids": warm}, "the first tokens")
    batches = _windows(stream, keep, length, max(1, batch_tokens // length))
    for turn, (ids, scored, where) in enumerate(batches):
        for index in in_turn(len(models), turn):
            model = models[index]
            out, seconds = timed(partial(output, model, {"input_ids": ids}, where), device_of(model))
            times[index].append(seconds / ids.numel())
            tallies[index].add(_logits(out)[:, :-1][scored], None, ids[:, 1:][scored], where)
        tick(ids.numel())
    rates: list[float | None] = [None] * len(models)
    held: list[int | None] = [None] * len(models)
    if decode_tokens:
        rates, held = decode_rates(models, stream[:length][None], min(decode_tokens, length - 1))
    found = []
    for index, tally in enumerate(tallies):
        prefill = 1 / statistics.median(times[index]) if decode_tokens else None
        found.append(Figures(tally.perplexity, prefill, rates[index], held[index]))
    return found, tallies[0].tokens


def _at_length(
    compared: Compared,
    stream: Tensor,
    keep: Tensor,
    length: int,
    batch_tokens: int,
    decode_tokens: int,
    tick: Tick,
) -> Measurement:
    tally = Tally()
    for ids, scored, where in _windows(stream, keep, length, max(1, batch_tokens // length)):
        outs = [
            logits[:, :-1][scored] for logits in map(_logits, compared.outputs({"input_ids": ids}, where))
        ]
        tally.add(outs[0], outs[1] if len(outs) > 1 else None, ids[:, 1:][scored], where)
        tick(ids.numel())
    figures = _perplexities(compared, tally)
    if decode_tokens:
        ids = stream[:length][None]
        forward = forward_rates(compared.all, ids)
        # The prompt must have at least one token.
        decode, held = decode_rates(compared.all, ids, min(decode_tokens, length - 1))
        figures = [
            replace(
                figure,
                forward_tokens_per_second=forward[index],
                decode_tokens_per_second=decode[index],
                cache_bytes=held[index],
            )
            for index, figure in enumerate(figures)
        ]
    return _measurement(length, tally, figures)


def _windows(stream: Tensor, keep: Tensor, length: int, rows: int) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Batches int64 `[B, length]`, which of their tokens after the first are scored, and the batch's name.

    The last window is shorter where lengths do not divide each other.
    """
    for start in range(0, len(stream), rows * length):
        part = slice(start, start + rows * length)
        whole = len(stream[part]) // length * length
        for ids, scored in (
            (stream[part][:whole], keep[part][:whole]),
            (stream[part][whole:], keep[part][whole:]),
        ):
            if len(ids):
                shape = (-1, min(length, len(ids)))
                where = f"the batch of tokens {start} to {start + len(stream[part]) - 1}, length {length}"
                yield ids.reshape(shape), scored.reshape(shape)[:, 1:], where


def _perplexities(compared: Compared, tally: Tally) -> list[Figures]:
    found = [Figures(perplexity=tally.perplexity)]
    return found if compared.reference is None else [*found, Figures(perplexity=tally.other_perplexity)]


def _measurement(length: int | None, tally: Tally, figures: list[Figures]) -> Measurement:
    if len(figures) == 1:
        return Measurement(length, tally.tokens, figures[0])
    agreement, kl = tally.agreed / tally.tokens, max(tally.kl / tally.tokens, 0.0)
    return Measurement(length, tally.tokens, figures[0], figures[1], agreement, kl)


def encoder_decoder_measurement(
    compared: Compared, data: Any, max_tokens: int, speed: bool, progress: bool | None = None
) -> Measurement:
    """Measure on the labels of the batches, up to `max_tokens` of them."""
    tally, first = Tally(), None
    with bar("evaluate", max_tokens, progress, "tokens") as tick:
        for where, batch, real, outs in _labelled(compared, data):
            tally.add(outs[0], outs[1] if len(outs) > 1 else None, batch["labels"][real].cpu(), where)
            first = first or batch
            tick(int(real.sum()))
            if tally.tokens >= max_tokens:
                break
    if first is None or not tally.tokens:
        raise InputError("the data holds no label to score: give dicts with labels")
    figures = _perplexities(compared, tally)
    if speed:
        count = int((first["labels"] != IGNORED).sum())
        figures = with_forward_rate(figures, compared, first, count)
    return _measurement(None, tally, figures)


def _labelled(compared: Compared, data: Any) -> Iterator[tuple[str, Mapping[str, Any], Tensor, list[Tensor]]]:
    """The name of each batch, the batch, which of its labels are scored, and each model's logits there."""
    for index, batch in enumerate(dicts(data)):
        if "labels" not in batch:
            raise InputError(f"an encoder-decoder is evaluated on dicts with labels; batch {index} has none")
        where = f"batch {index} ({shapes(batch)})"
        labels = batch["labels"]
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            raise InputError(f"{where}: labels are int64 [B, T]")
        real = labels != IGNORED
        for name in ("input_ids", "decoder_input_ids"):
            if isinstance(batch.get(name), Tensor):
                check_vocabulary(compared, batch[name].flatten())
        check_vocabulary(compared, labels[real])
        outs = [logits[real.to(logits.device)] for logits in map(_logits, compared.outputs(batch, where))]
        yield where, batch, real, outs


def _logits(output: Any) -> Tensor:
    return output.logits
