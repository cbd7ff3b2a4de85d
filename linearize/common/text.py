"""Token ids of texts and of text files."""

from __future__ import annotations

import itertools
import random
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

IGNORED = -100
"""The label of a position that is not scored, as in transformers."""


def check_tokenizer(tokenizer: Any) -> None:
    """Raise InputError for what is no tokenizer, such as the name of one."""
    if tokenizer is not None and not callable(tokenizer):
        named = isinstance(tokenizer, str)
        hint = f"; AutoTokenizer.from_pretrained({tokenizer!r}) loads it" if named else ""
        raise InputError(f"tokenizer must be a tokenizer, got {type(tokenizer).__name__}{hint}")


def sequences(data: Any, tokenizer: Any) -> list[Tensor]:
    """Sequences int64 `[n]` of texts, or of ids `[n]` or `[B, n]`. Raises InputError for anything else."""
    check_tokenizer(tokenizer)
    items: Any = [data] if isinstance(data, Tensor | str) else data
    if not isinstance(items, Iterable):
        raise InputError(f"data is token ids or texts, or several of these, got {type(data).__name__}")
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, str):
            if tokenizer is None:
                raise InputError("texts need their tokenizer: give tokenizer=")
            item = tokenizer(item, verbose=False)["input_ids"]
        wrong = InputError("data is token ids, int64 [n] or [B, n], several of these, or texts")
        try:
            tensor = torch.as_tensor(item)
        except (TypeError, ValueError, RuntimeError) as error:
            raise wrong from error
        if tensor.dim() not in (1, 2) or (tensor.is_floating_point() and tensor.numel()):
            raise wrong
        found += tensor.long().cpu() if tensor.dim() == 2 else [tensor.long().cpu()]
    return found


def text_tokens(paths: Sequence[Path], tokenizer: Any, limit: int, context: int, seed: int) -> list[Tensor]:
    """Token ids of text files, and of those in folders: about `limit` tokens, from as many files as can give
    `context` each, so that there is some of all kinds.

    Files come in an order drawn by `seed`, and of each a part of it. A folder's files that are no text are
    passed over. Raises InputError for a path that cannot be read.
    """
    draw = random.Random(seed)
    files = [(file, path.is_dir()) for path in paths for file in _files(path)]
    draw.shuffle(files)
    share = max(context, limit // max(1, len(files)))
    found: list[Tensor] = []
    for file, optional in files:
        if limit <= 0:
            break
        text = _read(file, optional)
        if text:
            ids = sequences(text, tokenizer)[0]
            start = draw.randint(0, max(0, len(ids) - share))
            found.append(ids[start : start + share])
            limit -= len(found[-1])
    return found


def text_lines(paths: Sequence[Path], limit: int) -> list[str]:
    """The lines of text files, and of those in folders, that are not blank: the first `limit`.

    Raises and passes over files as `text_tokens` does.
    """
    files = ((file, path.is_dir()) for path in paths for file in _files(path))
    lines = (line.strip() for file, optional in files for line in _read(file, optional).splitlines())
    return list(itertools.islice(filter(None, lines), limit))


def _read(file: Path, optional: bool) -> str:
    """The text of a file; nothing where an `optional` one is no text."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if optional:
            return ""
        raise InputError(f"cannot read the text in {file}: {error}") from error


def readable_texts(paths: Iterable[Path]) -> None:
    """Raise InputError for a path that is neither a file that can be read nor a folder with files, or where
    all of them are empty."""
    filled, empty = False, None
    for path in paths:
        try:
            kind = path.stat().st_mode
            if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
                raise InputError(f"{path} is a device; a text is a file")
            files = _files(path)
            if not files:
                raise InputError(f"there are no files in {path}")
            if stat.S_ISREG(kind):  # what comes through a pipe can be read only once
                with path.open("rb") as file:
                    file.read(1)
            piped = not stat.S_ISREG(kind) and not stat.S_ISDIR(kind)
            filled = filled or piped or any(file.stat().st_size for file in files)
            empty = path
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot read the text in {path}: {error}") from error
    if empty is not None and not filled:
        raise InputError(f"there is no text in {empty}: it is empty")


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
