"""Make the linear decoder that linearize ships: the demo model converted, calibrated and distilled.

    python examples/distill_demo.py --out linearize/demo/model/linear

It reads the files that the demo model was trained on (see `train_demo.py`), in an order drawn by a fixed
seed, and writes a checkpoint in bfloat16 with its model card, and `distillation.json`, the record of the run.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

import torch
from train_demo import encode, is_validation, read_sources

import linearize as lz
from linearize.demo import load as demo

CONTEXT = 512
TOKENS = 450_000
LENGTHS = (128, 512, 2048)


def rows(ids: torch.Tensor) -> torch.Tensor:
    """[N] -> [N // CONTEXT, CONTEXT] in an order drawn by a fixed seed."""
    cut = ids[: ids.numel() // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--recipe", default="quick")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    options = parser.parse_args()

    original, tokenizer = lz.load_demo()
    sources = read_sources(Path(sysconfig.get_path("stdlib")))
    train = encode(tokenizer, [text for name, text in sources.items() if not is_validation(name)])
    held_out = encode(tokenizer, [text for name, text in sources.items() if is_validation(name)])
    linear, _ = lz.load_demo()
    report = lz.distill(linear, rows(train), recipe=options.recipe, tokens=options.tokens, progress=True)
    print(report)

    # What ships is measured: the weights as they are in the file.
    linear, original = linear.bfloat16(), original.bfloat16()
    found = lz.evaluate(
        linear,
        rows(held_out)[:64].flatten(),
        reference=original,
        lengths=LENGTHS,
        speed=False,  # the rest is the same on any machine
        name="standard library, files that training left out",
    )
    found.attach(linear)
    lz.save(linear, options.out)
    seen = json.loads((Path(demo.__file__).parent / "model" / "training.json").read_text())[
        "tokens_seen"
    ]
    record = {
        "repeat_with": "python examples/distill_demo.py --out DIR",
        "recipe": options.recipe,
        "tokens": sum(stage.tokens for stage in report.stages),
        "tokens_of_original": seen,
        "seconds": round(sum(stage.seconds for stage in report.stages)),
        "torch": torch.__version__,
    }
    (options.out / "distillation.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
