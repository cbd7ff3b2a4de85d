"""`evaluate`: runs a model, and its original beside it, over the same data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..common.running import quiet_run, shapes, without_cache
from ..common.text import sequences
from ..errors import ConfigError, InputError, InvalidModelError
from .figures import Figures, Row
from .quality import Tally, scored_positions
from .result import Evaluation, describe, fingerprint
from .similarity import compare, pooled
from .speed import decode_rates, device_of, forward_rates, interleaved

LENGTHS = (128, 512, 2048)
"""Context lengths unless asked for others: those of these that data and model have room for."""
TOKENS = 32_768
IGNORED = -100
"""The label that stands for no token, as in transformers."""


@dataclass(frozen=True)
class Pair:
    """The model to evaluate, and what it is compared with, if anything."""

    model: nn.Module
    reference: nn.Module | None

    @property
    def all(self) -> list[nn.Module]:
        return [self.model] if self.reference is None else [self.model, self.reference]

    def run(self, inputs: Mapping[str, Any], where: str) -> list[Any]:
        """The output of each on the same inputs. Raises InputError, naming the batch, when one fails."""
        return [_run(model, inputs, where) for model in self.all]


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    reference: nn.Module | None = None,
    tokenizer: Any = None,
    lengths: Sequence[int] | None = None,
    max_tokens: int = TOKENS,
    batch_tokens: int = 2048,
    speed: bool = True,
    decode_tokens: int = 32,
    name: str = "",
) -> Evaluation:
    """Figures of a transformers model on `data`, converted or not, beside those of `reference`, its original.

    data: token ids int64 [n] or [B, n], several such, texts (with `tokenizer`), or dicts of the model's
    keyword arguments; at most `max_tokens` tokens of it are used. What is measured goes by the model:

    - a decoder: perplexity at each of `lengths`. The data is joined to one stream and cut to a multiple of
      the longest length; windows of a length follow each other without overlap, each read on its own. Scored
      are the same tokens at every length: all but those that begin a window of any length, which have nothing
      before them there. Of dicts, the `input_ids` where `attention_mask` is 1 are used.
    - an encoder-decoder: perplexity of the `labels` that are not -100, from dicts; no lengths.
    - any other model (an encoder): mean cosine between its mean-pooled embeddings and those of `reference`,
      which it needs, and Spearman's correlation of the similarities of all pairs of texts. Texts are cut to
      each of `lengths`; by default to what the model takes.

    With `reference`: also agreement of the likeliest token and mean KL(reference || model) at the scored
    positions. With `speed`: tokens per second of a pass over one window (one batch, without lengths), and for
    decoders of greedy decoding of `decode_tokens` tokens that end at the length, with the bytes that the
    caches then hold; the models take turns, and medians count. batch_tokens: how many run at once. name: of
    the data, for the record.

    Both models run in evaluation mode, each on its own device in its own dtype, and are left as they were.
    Raises InvalidModelError for what is no transformers model, ConfigError for settings, and InputError for
    data that is empty, shorter than a window, of another vocabulary, or on which a model gives NaN.
    """
    pair = Pair(model, reference)
    kind = kind_of(model)
    if reference is not None and kind_of(reference) != kind:
        raise InvalidModelError(
            f"the model is of the kind {kind}, and the reference ({type(reference).__name__}) of the kind "
            f"{kind_of(reference)}"
        )
    for setting, value in (("max_tokens", max_tokens), ("batch_tokens", batch_tokens)):
        if value < 1:
            raise ConfigError(f"{setting} is at least 1, got {value}")
    if decode_tokens < 1:
        raise ConfigError(f"decode_tokens is at least 1, got {decode_tokens}; speed=False leaves speed out")
    if lengths is not None and (not lengths or min(lengths) < 2):
        raise ConfigError(f"lengths are 2 or more tokens, got {list(lengths)}")
    if not isinstance(data, (Tensor, Iterable)):
        raise InputError(f"data is token ids, texts or dicts, got {type(data).__name__}")
    wanted = None if lengths is None else sorted(set(lengths))
    with quiet_run(model), quiet_run(model if reference is None else reference):
        if kind == "decoder":
            stream = _stream(pair, data, tokenizer, max_tokens)
            rows = _decoder_rows(pair, stream, wanted, batch_tokens, decode_tokens if speed else 0)
        elif kind == "encoder-decoder":
            if wanted is not None:
                raise ConfigError("an encoder-decoder reads its batches as they are: leave out lengths")
            rows = [_labels_row(pair, data, max_tokens, speed)]
        else:
            if reference is None:
                raise InputError("an encoder is compared with its original: give reference=")
            rows = _encoder_rows(pair, data, tokenizer, wanted, max_tokens, batch_tokens, speed)
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "no weights")
    threads = f", {torch.get_num_threads()} threads" if device_of(model).type == "cpu" else ""
    return Evaluation(
        kind=kind,
        name=name,
        model=describe(model),
        reference=None if reference is None else describe(reference),
        rows=tuple(rows),
        setting=f"{dtype} on {device_of(model)}{threads}",
        weights=fingerprint(model),
    )


def kind_of(model: nn.Module) -> str:
    """What there is to measure about a model. Raises InvalidModelError for what is no transformers model."""
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "is_encoder_decoder"):
        raise InvalidModelError(
            f"evaluate works on transformers models, got {type(model).__name__}: its config says what it is"
        )
    whole: Any = model
    if config.is_encoder_decoder:
        if whole.get_output_embeddings() is None:
            raise InvalidModelError(
                f"{type(model).__name__} is an encoder-decoder without an output layer: give a whole one"
            )
        return "encoder-decoder"
    return "decoder" if whole.can_generate() else "encoder"


# ------------------------------------------------------------------------------------------ decoders


def _stream(pair: Pair, data: Any, tokenizer: Any, max_tokens: int) -> Tensor:
    """Ids int64 `[N]` of all the data, joined."""
    found: list[Tensor] = []
    count = 0
    for ids in _sequences(data, tokenizer):
        found.append(ids[: max_tokens - count])
        count += len(found[-1])
        if count >= max_tokens:
            break
    stream = torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
    if not len(stream):
        raise InputError("the data holds no token: give some text")
    _check_vocabulary(pair, stream)
    return stream


def _sequences(data: Any, tokenizer: Any) -> Iterator[Tensor]:
    """Ids int64 `[n]` one by one, also out of dicts."""
    if isinstance(data, Mapping):
        data = [data]
    if isinstance(data, (Tensor, str)):
        yield from sequences(data, tokenizer)
        return
    for item in data:
        if not isinstance(item, Mapping):
            # A batch [B, n] among several, or one sequence or text.
            batch = isinstance(item, Tensor) and item.dim() == 2
            yield from sequences(item if batch else [item], tokenizer)
            continue
        other = sorted(set(item) - {"input_ids", "attention_mask", "labels"})
        if "input_ids" not in item or other:
            raise InputError(
                f"a dict for a decoder holds input_ids and attention_mask, got {', '.join(map(str, item))}"
            )
        ids = torch.as_tensor(item["input_ids"])
        mask = torch.as_tensor(item.get("attention_mask", torch.ones_like(ids)))
        for row, real in zip(torch.atleast_2d(ids), torch.atleast_2d(mask), strict=True):
            yield row[real.bool()].long().cpu()


def _check_vocabulary(pair: Pair, ids: Tensor) -> None:
    """Raise InputError when a model has no embedding for one of the ids."""
    for who, model in zip(("model", "reference"), pair.all, strict=False):
        size = _embeddings(model)
        if size is not None and len(ids) and (int(ids.max()) >= size or int(ids.min()) < 0):
            wrong = int(ids.max()) if int(ids.max()) >= size else int(ids.min())
            raise InputError(
                f"the data holds the token {wrong} and the {who} has {size}: the tokenizer is another model's"
            )


def _embeddings(model: Any) -> int | None:
    weight = getattr(model.get_input_embeddings(), "weight", None)
    # A vision model's "embeddings" are a convolution over patches.
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _decoder_rows(
    pair: Pair, stream: Tensor, wanted: Sequence[int] | None, batch_tokens: int, decode_tokens: int
) -> list[Row]:
    limit = min(len(stream), *(_positions(model) for model in pair.all))
    lengths = wanted or [length for length in LENGTHS if length <= limit]
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
    stream = stream[: len(stream) // lengths[-1] * lengths[-1]]
    keep = scored_positions(len(stream), lengths)
    return [_decoder_row(pair, stream, keep, length, batch_tokens, decode_tokens) for length in lengths]


def _positions(model: Any) -> int:
    """Most tokens that the model's config speaks of."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else 1 << 62


def _decoder_row(
    pair: Pair, stream: Tensor, keep: Tensor, length: int, batch_tokens: int, decode_tokens: int
) -> Row:
    tally = Tally()
    for ids, scored, where in _windows(stream, keep, length, max(1, batch_tokens // length)):
        outs = [logits[:, :-1][scored] for logits in map(_logits, pair.run({"input_ids": ids}, where))]
        tally.add(outs[0], outs[1] if len(outs) > 1 else None, ids[:, 1:][scored], where)
    figures = _perplexities(pair, tally)
    if decode_tokens:
        ids = stream[:length][None]
        forward = forward_rates(pair.all, ids)
        # The first token needs something to follow.
        decode, held = decode_rates(pair.all, ids, min(decode_tokens, length - 1))
        figures = [
            replace(
                figure,
                forward_tokens_per_second=forward[index],
                decode_tokens_per_second=decode[index],
                cache_bytes=held[index],
            )
            for index, figure in enumerate(figures)
        ]
    return _row(length, tally, figures)


def _windows(stream: Tensor, keep: Tensor, length: int, rows: int) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Batches int64 `[B, length]`, which of their tokens but the first are scored, and their name; where
    lengths do not divide each other, the last window is shorter."""
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


def _perplexities(pair: Pair, tally: Tally) -> list[Figures]:
    found = [Figures(perplexity=tally.perplexity)]
    return found if pair.reference is None else [*found, Figures(perplexity=tally.other_perplexity)]


def _row(length: int | None, tally: Tally, figures: list[Figures]) -> Row:
    if len(figures) == 1:
        return Row(length, tally.tokens, figures[0])
    agreement, kl = tally.agreed / tally.tokens, max(tally.kl / tally.tokens, 0.0)
    return Row(length, tally.tokens, figures[0], figures[1], agreement, kl)


# ---------------------------------------------------------------------------------- encoder-decoders


def _labels_row(pair: Pair, data: Any, max_tokens: int, speed: bool) -> Row:
    tally, first = Tally(), None
    for index, batch in enumerate(_dicts(data)):
        if "labels" not in batch:
            raise InputError(f"an encoder-decoder is evaluated on dicts with labels; batch {index} has none")
        where = f"batch {index} ({shapes(batch)})"
        labels = batch["labels"]
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            raise InputError(f"{where}: labels are int64 [B, T]")
        real = labels != IGNORED
        for name in ("input_ids", "decoder_input_ids"):
            if isinstance(batch.get(name), Tensor):
                _check_vocabulary(pair, batch[name].flatten())
        _check_vocabulary(pair, labels[real])
        outs = [logits[real.to(logits.device)] for logits in map(_logits, pair.run(batch, where))]
        tally.add(outs[0], outs[1] if len(outs) > 1 else None, labels[real].cpu(), where)
        first = first or batch
        if tally.tokens >= max_tokens:
            break
    if first is None or not tally.tokens:
        raise InputError("the data holds no label to score: give dicts with labels")
    figures = _perplexities(pair, tally)
    if speed:
        count = int((first["labels"] != IGNORED).sum())
        figures = _with_forward(figures, pair, first, count)
    return _row(None, tally, figures)


def _dicts(data: Any) -> Iterable[Mapping[str, Any]]:
    for item in [data] if isinstance(data, Mapping) else data:
        if not isinstance(item, Mapping):
            raise InputError(
                "this model is evaluated on dicts of its keyword arguments, and the data holds "
                f"{type(item).__name__}"
            )
        yield item


def _with_forward(figures: list[Figures], pair: Pair, batch: Mapping[str, Any], tokens: int) -> list[Figures]:
    """With the rate of passes over one batch."""
    calls = [partial(_run, model, batch, "the first batch") for model in pair.all]
    seconds = interleaved(calls, device_of(pair.model))
    return [
        replace(figure, forward_tokens_per_second=tokens / second)
        for figure, second in zip(figures, seconds, strict=True)
    ]


# ------------------------------------------------------------------------------------------ encoders


def _encoder_rows(
    pair: Pair,
    data: Any,
    tokenizer: Any,
    wanted: Sequence[int] | None,
    max_tokens: int,
    batch_tokens: int,
    speed: bool,
) -> list[Row]:
    items = [data] if isinstance(data, (Mapping, str)) else data
    start: Iterator[Any] = iter(items)
    first = next(start, None)
    if isinstance(first, Mapping):
        if wanted is not None:
            raise ConfigError("dicts are read as they are: leave out lengths, or give texts or token ids")
        return [_embeddings_row(pair, itertools.chain([first], start), None, max_tokens, speed)]
    if isinstance(data, Tensor) and data.dim() == 1:
        raise InputError("an encoder compares several texts: give token ids [B, n], or several [n]")
    if first is None:
        raise InputError("the data is empty: give some texts")
    texts = list(_sequences(data if isinstance(data, Tensor) else itertools.chain([first], start), tokenizer))
    if not texts or not all(map(len, texts)):
        raise InputError("the data is empty, or holds an empty text: give some texts")
    _check_vocabulary(pair, torch.cat(texts))
    limits = [_positions(model) for model in pair.all] + [getattr(tokenizer, "model_max_length", 1 << 62)]
    rows = []
    for length in wanted or [min(max(map(len, texts)), *limits)]:
        cut = [ids[:length] for ids in texts]
        batches = _padded(cut, max(1, batch_tokens // length), getattr(pair.model, "config", None))
        rows.append(_embeddings_row(pair, batches, length, max_tokens, speed))
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


def _embeddings_row(
    pair: Pair, batches: Iterable[Mapping[str, Any]], length: int | None, max_tokens: int, speed: bool
) -> Row:
    found: list[list[Tensor]] = [[], []]
    tokens, first = 0, None
    for index, batch in enumerate(_dicts(batches)):
        where = f"batch {index} ({shapes(batch)})"
        mask = batch.get("attention_mask")
        for side, hidden in enumerate(map(_hidden, pair.run(batch, where))):
            vectors = pooled(hidden, None if mask is None else mask.to(hidden.device)).cpu()
            if bool(vectors.isnan().any()):
                who = ("model", "reference")[side]
                raise InputError(
                    f"the {who}'s embeddings are NaN in {where}: its weights or inputs are broken"
                )
            found[side].append(vectors)
        here = int(mask.sum()) if isinstance(mask, Tensor) else hidden.shape[0] * hidden.shape[1]
        tokens += here
        first = first or (batch, here)
        if tokens >= max_tokens:
            break
    if first is None:
        raise InputError("the data is empty: give some texts")
    cosine, correlation = compare(torch.cat(found[0]), torch.cat(found[1]))
    figures = [Figures(), Figures()]
    if speed:
        figures = _with_forward(figures, pair, *first)
    return Row(length, tokens, figures[0], figures[1], cosine=cosine, spearman=correlation)


# ------------------------------------------------------------------------------------------- running


def _run(model: nn.Module, inputs: Mapping[str, Any], where: str) -> Any:
    """The model's output, an encoder's with what can be pooled."""
    device = device_of(model)
    placed = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    if kind_of(model) == "encoder" and getattr(model, "base_model", model) is not model:
        placed["output_hidden_states"] = True  # what is on top of the encoder gives something else
    try:
        return model(**without_cache(model, placed))
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} does not run on {where}: {type(error).__name__}: {error}"
        ) from error


def _logits(out: Any) -> Tensor:
    return out.logits


def _hidden(out: Any) -> Tensor:
    """`[B, T, D]` of the last layer."""
    last = getattr(out, "last_hidden_state", None)
    return out.hidden_states[-1] if last is None else last
