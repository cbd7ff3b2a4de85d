"""What conversion costs in perplexity, and what calibration gives back: the demo decoder on held-out text.

    python benchmarks/quality.py [--json FILE]

`gap` is the share of the distance in log-perplexity between the softmax original and `augmented` as just
converted that is closed. Calibration reads training text and uses no gradient. Everything is deterministic.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

import linearize as lz
from linearize.walkthrough import encode, held_out_text, perplexity, training_text, windows

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("augmented", {}),
    ("local", {}),
    ("grouped", {}),
    ("relu", {"augmentation": True}),
    ("hedgehog", {"augmentation": True}),
    ("softmax_window", {"augmentation": True}),
    ("softmax_window", {"augmentation": True, "options": {"window": 128}}),
)
TOKENS = 12_288


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    model, tokenizer = lz.load_demo()
    held_out = windows(encode(tokenizer, held_out_text()[1]))
    batches = windows(encode(tokenizer, training_text()))[: TOKENS // 512].split(2)
    original = perplexity(model, held_out)
    worst = perplexity(lz.linearize(copy.deepcopy(model)), held_out)
    print(f"softmax {original:.1f}, {held_out.numel()} tokens of held-out text", flush=True)
    rows = []
    for mechanism, settings in CASES:
        linear = lz.linearize(copy.deepcopy(model), mechanism=mechanism, **settings)
        raw = perplexity(linear, held_out)
        began = time.perf_counter()
        report = lz.calibrate(linear, batches)
        seconds = time.perf_counter() - began
        fitted = perplexity(linear, held_out)
        gap = math.log(worst / fitted) / math.log(worst / original)
        window = settings.get("options", {}).get("window")
        name = mechanism if window is None else f"{mechanism}, window {window}"
        print(
            f"{name:28} converted {raw:8.1f}   calibrated {fitted:6.1f}   gap {gap:6.1%}   "
            f"{report.tokens} tokens, {seconds:.0f} s",
            flush=True,
        )
        rows.append(dict(case=name, converted=raw, calibrated=fitted, gap=gap, tokens=report.tokens))
    if options.json is not None:
        result = dict(torch=torch.__version__, softmax=original, rows=rows)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
