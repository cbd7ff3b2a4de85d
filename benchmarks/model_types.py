"""Convert a tiny random model of every model type of transformers, and write docs/model-types.md.

    python benchmarks/model_types.py                    every type, those first that no run has seen
    python benchmarks/model_types.py --only llama t5    these, again
    python benchmarks/model_types.py --every 15         a sample
    python benchmarks/model_types.py --table            only write the table from the stored results

Models are built from their config classes without a row by hand (`tests/zoo/model_types.py`). Each type runs
in a process of its own, with a limit of time and of memory, so that none ends the run. Results are lines of
JSON, written as they come: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from model_type_case import examine  # noqa: E402
from model_type_page import page  # noqa: E402
from shared_search import shared  # noqa: E402
from zoo.model_types import types  # noqa: E402

from linearize.convert import linearize as conversion  # noqa: E402

FAULTS = ("wrong", "raw", "failed", "crash", "time")


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    results = read(options.json)
    known = types()
    transformers.logging.disable_progress_bar()
    if not options.table:
        wanted = options.only or [name for name in known[:: options.every] if name not in results]
        if options.again:
            wanted = [name for name in known if results.get(name, {}).get("outcome") in options.again]
        examine("llama")  # what is imported and compiled for the first model, no child need do again
        for number, name in enumerate(wanted):
            results[name] = isolated(name, options.seconds, options.gigabytes)
            with options.json.open("a") as file:
                file.write(json.dumps(results[name]) + "\n")
            print(f"{number + 1}/{len(wanted)}", progress(results[name]), flush=True)
    options.out.write_text(page(results, known))
    print(f"wrote {options.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types, again")
    parser.add_argument("--again", nargs="+", metavar="OUTCOME", help="types that had one of these outcomes")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th type")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    parser.add_argument("--seconds", type=int, default=240, help="the most that a type may take")
    parser.add_argument("--gigabytes", type=int, default=12, help="address space that a type may take")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "model-types.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "model-types.md")
    return parser.parse_args()


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of every type in a file of earlier runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.is_file() else []
    return {result["type"]: result for result in map(json.loads, lines)}


def isolated(name: str, seconds: int, gigabytes: int) -> dict[str, Any]:
    """The result of one type from a child process. A child that dies or hangs leaves what it told."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(name, its, gigabytes), daemon=True)
    start = time.perf_counter()
    child.start()
    its.close()
    result: dict[str, Any] = {"type": name}
    while (left := start + seconds - time.perf_counter()) > 0 and mine.poll(left):
        try:
            result = mine.recv()
        except EOFError:
            break
    if "outcome" not in result:
        late = child.is_alive() and time.perf_counter() - start >= seconds
        child.kill() if late else None
        child.join()
        why = f"after {seconds} s" if late else f"exit code {child.exitcode}"
        result |= {"outcome": "time" if late else "crash", "why": f"{why}, at {result.get('stage', 'start')}"}
    child.join()
    return {**result, "wall": round(time.perf_counter() - start, 1)}


def _run(name: str, told: Connection, gigabytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    # Both conversions of a type search the same model, and the search is most of what they cost.
    conversion.search = shared(conversion.search, lambda: True)
    told.send(examine(name, told.send))


def progress(result: dict[str, Any]) -> str:
    error = f"{result['error']:.0e}" if "error" in result else ""
    return (
        f"{result['type']:32} {result['outcome']:12} {error:6} {result['wall']:5.1f} s  {result['why'][:150]}"
    )


if __name__ == "__main__":
    main()
