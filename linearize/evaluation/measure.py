"""`evaluate`: figures of a model, and of its original beside it, on the same data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checks import require, require_number, require_whole, several
from ..common.running import quiet_run
from ..common.text import check_tokenizer
from ..errors import ConfigError, InputError, InvalidModelError
from .compared import Compared, kind_of
from .embeddings import encoder_measurements
from .figures import Measurement
from .perplexity import decoder_measurements, encoder_decoder_measurement, joined
from .result import Evaluation, describe, fingerprint
from .speed import device_of

TOKENS = 32_768
"""The default number of tokens that are used."""


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    reference: nn.Module | None = None,
    tokenizer: Any = None,
    lengths: Sequence[int] | int | None = None,
    max_tokens: int = TOKENS,
    batch_tokens: int = 2048,
    speed: bool = True,
    decode_tokens: int = 32,
    name: str = "",
    progress: bool | None = None,
) -> Evaluation:
    """Measure a transformers model, converted or not, beside its original.

    What is measured depends on the model:

    - A decoder: perplexity at each of `lengths`. The data is joined to one stream and cut to a multiple of
      the longest length. Windows of a length follow each other without overlap, and each is read by itself.
      The same tokens are scored at every length: all except those that begin a window of any length, because
      they have nothing before them there.
    - An encoder-decoder: perplexity of the `labels` that are not -100. There are no lengths.
    - Any other model (an encoder): the mean cosine between its mean-pooled embeddings and those of
      `reference`, and Spearman's correlation of the similarities of all pairs of texts. Texts are truncated
      to each of `lengths`.

    With `reference`, also how often the likeliest tokens agree, and mean KL(reference || model) at the scored
    positions. With `speed`, also tokens per second of a forward pass over one window (one batch where there
    are no lengths), and for decoders tokens per second of greedy decoding up to each length and the bytes of
    the cache then; the models take turns, and the median counts.

    Both models run in evaluation mode, on their own devices and in their own dtypes, and do not change.

    Args:
        model: The model.
        data: Token ids int64 `[n]` or `[B, n]`, a list of these, texts, or dicts of the model's keyword
            arguments. From dicts for a decoder, the `input_ids` where `attention_mask` is 1 are used.
        reference: What to compare with, such as the original; required for an encoder.
        tokenizer: The tokenizer of the models; needed for texts.
        lengths: Context lengths in tokens; by default those of 128, 512 and 2048 that data and models have
            room for, and for an encoder the length that the models take.
        max_tokens: How many tokens of the data are used at most.
        batch_tokens: How many tokens run at once.
        speed: Whether to measure speed and memory.
        decode_tokens: How many tokens are decoded for that.
        name: A name for the data.
        progress: Whether to show a progress bar; on terminals and in notebooks by default.

    Returns:
        The figures at each length; they can be printed, plotted, and stored as JSON or with the model.

    Raises:
        InvalidModelError: A model is not a transformers model, or the models are of different kinds.
        ConfigError: A setting is out of range, or does not fit the kind of the model.
        InputError: The data is empty, shorter than a window, or of another vocabulary, or a model does not
            run on it or gives NaN.
    """
    compared = Compared(model, reference)
    kind = _check_models(compared)
    asked = several(lengths)
    check_settings(asked, max_tokens, batch_tokens, decode_tokens)
    check_tokenizer(tokenizer)
    if not isinstance(data, (Tensor, Iterable)):
        raise InputError(f"data must be token ids, texts or dicts, got {type(data).__name__}")
    wanted = None if asked is None else sorted(set(asked))
    with quiet_run(model), quiet_run(model if reference is None else reference):
        rows: list[Measurement]
        if kind == "decoder":
            stream = joined(compared, data, tokenizer, max_tokens)
            decoded = decode_tokens if speed else 0
            rows = decoder_measurements(compared, stream, wanted, batch_tokens, decoded, progress)
        elif kind == "encoder-decoder":
            if wanted is not None:
                raise ConfigError("an encoder-decoder reads its batches as they are: leave out lengths")
            rows = [encoder_decoder_measurement(compared, data, max_tokens, speed, progress)]
        else:
            if reference is None:
                raise InputError("an encoder is compared with its original: give reference=")
            rows = encoder_measurements(
                compared, data, tokenizer, wanted, max_tokens, batch_tokens, speed, progress
            )
    return Evaluation(
        kind=kind,
        name=name,
        model=describe(model),
        reference=None if reference is None else describe(reference),
        rows=tuple(rows),
        setting=setting_of(model),
        weights=fingerprint(model),
    )


def _check_models(compared: Compared) -> str:
    """The kind of the models. Raises InvalidModelError if they are of different kinds."""
    kind = kind_of(compared.model)
    other = compared.reference
    if other is not None and kind_of(other) != kind:
        raise InvalidModelError(
            f"the model is of the kind {kind}, and the reference ({type(other).__name__}) of the kind "
            f"{kind_of(other)}"
        )
    return kind


def check_settings(
    lengths: tuple[int, ...] | None, max_tokens: int, batch_tokens: int, decode_tokens: int
) -> None:
    """Raise ConfigError for settings out of range."""
    require_whole("max_tokens", max_tokens)
    require_whole("batch_tokens", batch_tokens)
    expected = "an int, 1 or more (speed=False leaves speed out)"
    require_number(
        "decode_tokens", decode_tokens, expected, lambda value: value >= 1 and isinstance(value, int)
    )
    if lengths is not None:
        whole = [n for n in lengths if isinstance(n, int) and n >= 2] if isinstance(lengths, tuple) else []
        require(bool(whole) and len(whole) == len(lengths), "lengths", lengths, "2 or more tokens each")


def setting_of(model: nn.Module) -> str:
    """The dtype, device and threads of the run."""
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "no weights")
    threads = f", {torch.get_num_threads()} threads" if device_of(model).type == "cpu" else ""
    return f"{dtype} on {device_of(model)}{threads}"
