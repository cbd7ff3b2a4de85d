"""Survey the model zoo and write docs/survey.md.

    python benchmarks/survey.py                     every entry, every implementation, with and without a mask
    python benchmarks/survey.py --only llama bert   some of them
    python benchmarks/survey.py --table             only write the table from the stored results

Results are kept in a JSON file as they come, so that a run can be stopped and taken up again; `--fresh`
starts over. `--live` also converts each model with `linearize(model, mechanism="softmax")` and compares it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from survey_case import TOLERANCE, Row, examine, live_error  # noqa: E402
from zoo import ENTRIES, OTHERS, TRACED, Entry  # noqa: E402

Key = tuple[str, str, bool]


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    results: dict[Key, dict[str, Any]] = {}
    if options.json.is_file() and not options.fresh:
        stored = json.loads(options.json.read_text())
        results = {(r["name"], r["implementation"], r["masked"]): r for r in stored}
    if not options.table:
        for entry, implementation, masked in selected(options):
            key = (entry.name, implementation, masked)
            if key in results and not (options.only or options.live and "live" not in results[key]):
                continue
            if key not in results or options.only:
                results[key] = as_data(examine(entry, implementation, masked))
            if options.live and masked == entry.paddable:
                results[key]["live"] = live_error(entry, implementation)
            print(progress(results[key]), flush=True)
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(list(results.values()), indent=1))
    options.out.write_text(table(results))
    print(f"wrote {options.out}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="entries to run again")
    parser.add_argument("--kind", nargs="+", help="only these kinds")
    parser.add_argument("--quick", action="store_true", help="only what the default test run builds")
    parser.add_argument("--live", action="store_true", help="also convert the live model")
    parser.add_argument("--fresh", action="store_true", help="forget stored results")
    parser.add_argument("--table", action="store_true", help="run nothing, write the table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "survey.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "survey.md")
    return parser.parse_args()


def selected(options: argparse.Namespace) -> list[tuple[Entry, str, bool]]:
    """The rows to run, those of the default tests first: a run that is stopped early has seen them."""
    rows = []
    for entry in ENTRIES:
        if options.only and entry.name not in options.only:
            continue
        if options.kind and entry.kind not in options.kind:
            continue
        for implementation in entry.implementations:
            last = implementation == entry.implementations[-1]
            for masked in (True, False) if entry.paddable else (False,):
                extra = entry.paddable and len(entry.implementations) > 1 and masked != last
                if not (options.quick and (entry.slow or extra)):
                    rows.append((entry.slow, extra, entry, implementation, masked))
    return [row[2:] for row in sorted(rows, key=lambda row: row[:2])]


def as_data(row: Row) -> dict[str, Any]:
    return {
        "name": row.entry.name,
        "implementation": row.implementation,
        "masked": row.masked,
        "sites": dict(row.sites),
        "padded_sites": row.padded_sites,
        "refusals": row.refusals,
        "errors": row.errors,
        "sensitivity": row.sensitivity,
        "seconds": row.seconds,
        "failure": row.failure,
    }


def progress(result: dict[str, Any]) -> str:
    worst = max(result["errors"].values(), default=float("nan"))
    seconds = sum(result["seconds"].values())
    mask = "mask" if result["masked"] else "plain"
    what = (
        result["failure"][:80].strip()
        or f"{result['sites']} refused {len(result['refusals'])} error {worst:.1e}"
    )
    live = result.get("live", "")
    return f"{result['name']:30s} {result['implementation']:5s} {mask:5s} {what} {live} {seconds:.1f} s"


def table(results: dict[Key, dict[str, Any]]) -> str:
    """The page: what was done, totals, one row per architecture and implementation, refusals in words."""
    lines, notes = [], []
    totals: Counter[str] = Counter()
    for entry in ENTRIES:
        for implementation in entry.implementations:
            found = [r for r in (results.get((entry.name, implementation, m)) for m in (True, False)) if r]
            if not found:
                continue
            lines.append(line(entry, implementation, found))
            totals["rows"] += len(found)
            totals["pairs"] += 1
            totals["sites"] += sum(found[0]["sites"].values())
            totals["expected"] += entry.total
        shown = [results[key] for key in results if key[0] == entry.name]
        if entry.why and shown:
            notes.append(f"- **{entry.name}**: {', '.join(entry.refused)}. {entry.why}.")
    kinds = Counter(e.kind for e in ENTRIES if any(key[0] == e.name for key in results))
    summary = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    types = {e.model_type for e in ENTRIES if any(key[0] == e.name for key in results)}
    sizes = ", ".join(f"{b}x{n}" for b, n in (TRACED, *OTHERS))
    return HEADER.format(
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        torch=torch.__version__,
        transformers=transformers.__version__,
        types=len(types),
        summary=summary,
        sizes=sizes,
        tolerance=TOLERANCE,
        table="\n".join(lines),
        notes="\n".join(notes) or "- none",
        **totals,
    )


HEADER = """# Survey: attention in {types} architectures of transformers {transformers}

Generated by `python benchmarks/survey.py` on {date} with torch {torch}; do not edit.

Tiny random models built from config classes (`tests/zoo/`), float32: {summary}. Each is captured at
batch x length {sizes_first}, its attention is found and raised to exact attention calls, and the raised
graph is compared with the original model there and at the other sizes ({sizes}), captured with a padding
mask (run with keys off on both sides, and with all keys on) and captured without one. Where the
architecture fixes the length, only the batch changes.

{pairs} pairs of architecture and implementation, {rows} captured graphs; {sites} of {expected} expected
sites found. *error* is the largest of |raised - original| / max(1, |original|); the bound that the tests
assert is {tolerance:.0e}. *live* is the same for `linearize(model, mechanism="softmax")` on real tokens,
where it was run.

| architecture | kind | impl | sites | masks | error, masked | error, plain | live | seconds |
|---|---|---|---|---|---|---|---|---|
{table}

Masks: `causal`, `full`, `window(w)` causal and the last w keys, `band(w)` at most w apart, `chunk(w)`;
`+bias` adds finite values to visible scores (ALiBi, T5, relative positions); `other+bias` is a bias that is
computed from the tokens.

## Refused, and why

{notes}
""".replace("{sizes_first}", f"{TRACED[0]}x{TRACED[1]}")


def line(entry: Entry, implementation: str, found: list[dict[str, Any]]) -> str:
    def error(masked: bool) -> str:
        result = next((r for r in found if r["masked"] == masked), None)
        if result is None:
            return ""
        if result["failure"]:
            return "not captured" if "capture" in entry.refused else "FAILED"
        worst = max(result["errors"].values())
        return "0" if worst == 0 else f"{worst:.0e}" + ("" if worst <= TOLERANCE else " FAILED")

    sites = Counter(found[0]["sites"])
    masks = ", ".join(f"{count} {label}" for label, count in sorted(sites.items()))
    same = all(Counter(r["sites"]) == Counter(entry.expected(r["masked"])) or r["failure"] for r in found)
    reasons = Counter(reason for reason, _, _ in found[0]["refusals"])
    refused = "; refused " + ", ".join(f"{n} {r}" for r, n in sorted(reasons.items())) if reasons else ""
    live = next((r["live"] for r in found if r.get("live")), "")
    seconds = sum(sum(r["seconds"].values()) for r in found)
    count = f"{sum(sites.values())}/{entry.total}{'' if same else ' FAILED'}"
    cells = [entry.name, entry.kind, implementation, count, masks + refused, error(True), error(False), live]
    return "| " + " | ".join([*cells, f"{seconds:.1f}"]) + " |"


if __name__ == "__main__":
    main()
