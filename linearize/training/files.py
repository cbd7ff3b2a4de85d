"""Files of text as training data, in the form that a model's kind asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..common.text import text_lines, text_tokens
from ..errors import InputError
from .data import is_encoder, is_pair

_ALL = 1 << 62


def read_files(
    model: nn.Module, tokenizer: Any, paths: Sequence[Path], tokens: int | None, context: int, seed: int
) -> Any:
    """What `rows_of` takes, from text files and folders of them.

    A decoder reads about `tokens` tokens (None: all), from as many files as there are. An encoder takes every
    line as a text. An encoder-decoder takes JSON lines, each an object with the texts "input" and "target".
    Raises InputError for what cannot be read.
    """
    if is_pair(model):
        return [_pair(line, tokenizer, context) for line in text_lines(paths, _ALL)]
    if is_encoder(model):
        return text_lines(paths, _ALL)
    return text_tokens(paths, tokenizer, _ALL if tokens is None else tokens, context, seed)


def _pair(line: str, tokenizer: Any, context: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
        texts = record["input"], record["target"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            'an encoder-decoder reads lines of JSON with the texts "input" and "target", one has '
            f"{line[:60]!r}"
        ) from error
    settings = dict(truncation=True, max_length=context)
    source = tokenizer(texts[0], **settings)
    return {
        "input_ids": source["input_ids"],
        "attention_mask": source["attention_mask"],
        "labels": tokenizer(text_target=texts[1], **settings)["input_ids"],
    }
