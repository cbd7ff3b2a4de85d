"""Real text on every machine, for SmolLM2: what is measured, what is calibrated on and what is tuned on.

Nothing that is measured is calibrated or tuned on. Files of Debian's packages vim-runtime and base-files, and
the source and help of Python itself.
"""

from __future__ import annotations

import argparse
import doctest
import http.client
import inspect
import logging
import pathlib
import random
import subprocess
import sysconfig
import tarfile
import textwrap
import typing
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

CALIBRATION_LENGTH = 2048
LICENCES, VIM = Path("/usr/share/common-licenses"), Path("/usr/share/vim/vim90/doc")
OTHERS = ("starting.txt", "change.txt", "insert.txt")
"""Files of vim's help that are long enough for 8192 tokens and that no constant was chosen on."""
PER_FILE = 2
"""Rows to tune on, of a file."""


def measured(paths: Sequence[Path] | None, others: bool = False) -> dict[str, str]:
    """The files' texts by name.

    Without files, three on which sizes and constants were chosen and three others; with `others`, six that
    are longer. Those of Debian's packages are left out where they are not installed.
    """
    if paths is not None:
        return {path.name: path.read_text() for path in paths}
    if others:
        files = [VIM / name for name in OTHERS]
        modules = {"subprocess.py": subprocess, "inspect.py": inspect, "doctest.py": doctest}
    else:
        files = [LICENCES / "GPL-3", VIM / "usr_41.txt", LICENCES / "MPL-2.0", VIM / "usr_05.txt"]
        modules = {"argparse.py": argparse}
    texts = {path.name: path.read_text() for path in files if path.is_file()}
    texts |= {name: inspect.getsource(module) for name, module in modules.items()}
    if not others:
        texts["textwrap.py, pathlib.py"] = inspect.getsource(textwrap) + inspect.getsource(pathlib)
    return texts


def calibration_batches(tokenizer: Any) -> Iterator[Tensor]:
    """Prose and code in turn, none of it among the texts that are measured."""
    topic = "\n\n".join(topics[name] for name in sorted(topics))
    vim = [VIM / f"usr_{number}.txt" for number in ("03", "27", "10", "29")]
    licences = [LICENCES / name for name in ("LGPL-2.1", "Apache-2.0", "GFDL-1.2")]
    if not all(path.is_file() for path in (*vim, *licences)):
        raise SystemExit("calibration reads Debian's vim-runtime and base-files: install them")
    a, b, c, d = (path.read_text() for path in vim)
    lgpl, apache, gfdl = (path.read_text() for path in licences)
    source = inspect.getsource
    for text in (
        *(topic[20_000:], a, source(random), lgpl, b, source(typing)[20_000:], apache, source(logging)),
        *(c, source(http.client), d, topic[200_000:], source(tarfile)[9_000:], gfdl, source(zipfile)),
    ):
        yield tokenizer(text, return_tensors="pt").input_ids[:, :CALIBRATION_LENGTH]


def tuning_rows(tokenizer: Any, count: int, length: int) -> list[Tensor]:
    """Rows int64 `[length]` of documentation and code, in an order drawn once, a few of each file."""
    seen = {"argparse.py", "textwrap.py", "pathlib.py", "subprocess.py", "inspect.py", "doctest.py"}
    seen |= {"usr_41.txt", "usr_05.txt", *OTHERS}
    folders = (VIM.glob("*.txt"), Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files = [path for folder in folders for path in sorted(folder) if path.name not in seen]
    draw = random.Random(0)
    draw.shuffle(files)
    rows: list[Tensor] = []
    for path in files:
        # A token has fewer than 12 characters of text on average, so that this is enough and is quick.
        ids = tokenizer(path.read_text(errors="ignore")[: 12 * length * PER_FILE], verbose=False)["input_ids"]
        whole = torch.tensor(ids).split(length)[:PER_FILE]
        rows += [row for row in whole if len(row) == length]
        if len(rows) >= count:
            draw.shuffle(rows)
            return rows[:count]
    raise SystemExit(f"only {len(rows)} rows of {length} tokens to tune on, and {count} are wanted")
