"""Training data from text files, in the form that each kind of model needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..common.text import text_lines, text_tokens
from ..errors import InputError
from .data import is_encoder, is_encoder_decoder

_NO_LIMIT = 1 << 62


def read_files(
    model: nn.Module, tokenizer: Any, paths: Sequence[Path], tokens: int | None, context: int, seed: int
) -> Any:
    """Read text files, and folders of them, into the form that `training_data` takes.

    For a decoder, about `tokens` tokens (None: all), spread over all files. For an encoder, every line is a
    text. For an encoder-decoder, every line is a JSON object with the texts "input" and "target".
    Raises InputError for a file that cannot be read.
    """
    if is_encoder_decoder(model):
        return [_pair(line, tokenizer, context) for line in text_lines(paths, _NO_LIMIT)]
    if is_encoder(model):
        return text_lines(paths, _NO_LIMIT)
    return text_tokens(paths, tokenizer, _NO_LIMIT if tokens is None else tokens, context, seed)


def _pair(line: str, tokenizer: Any, context: int) -> dict[str, Any]:
    try:
        example = json.loads(line)
        texts = example["input"], example["target"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            'an encoder-decoder reads lines of JSON with the texts "input" and "target", but one line is '
            f"{line[:60]!r}"
        ) from error
    settings = dict(truncation=True, max_length=context)
    source = tokenizer(texts[0], **settings)
    return {
        "input_ids": source["input_ids"],
        "attention_mask": source["attention_mask"],
        "labels": tokenizer(text_target=texts[1], **settings)["input_ids"],
    }
