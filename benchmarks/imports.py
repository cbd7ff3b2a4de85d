"""Processor seconds of what a user waits for before anything runs: imports and `--help`.

    python benchmarks/imports.py [--repeats 3]

Each row is the best of the repeats, each in a new interpreter. `beyond` counts from the moment when torch and
transformers are imported, the others from the start of the interpreter.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLOCK = "import time; began = 0.0\n"
ROWS = {
    "import linearize": "import linearize",
    "import linearize, beyond torch and transformers": (
        "import torch, transformers; began = time.process_time(); import linearize"
    ),
    "every public name, beyond torch and transformers": (
        "import torch, transformers; began = time.process_time(); import linearize\n"
        "for name in linearize.__all__: getattr(linearize, name)"
    ),
    "linearize --help": "from linearize.cli import app; app(['--help'], standalone_mode=False)",
    "linearize convert --help": (
        "from linearize.cli import app; app(['convert', '--help'], standalone_mode=False)"
    ),
    "import torch, transformers": "import torch, transformers",
}
"""What is measured, by its name in the table."""


def seconds(code: str) -> float:
    """Processor seconds, of the system for it included, that one run of `code` takes."""
    text = f"{CLOCK}{code}\nimport sys; print(time.process_time() - began, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stderr.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    for name, code in ROWS.items():
        print(f"{min(seconds(code) for _ in range(repeats)):7.3f} s  {name}", flush=True)


if __name__ == "__main__":
    main()
