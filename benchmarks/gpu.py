"""Every Triton kernel checked against the oracle, then timed beside PyTorch's and others' attention.

    python benchmarks/gpu.py --json OUT [--section NAME ...] [--budget-seconds 540] [--checked EARLIER.json]
    python benchmarks/gpu.py --interpret [--kernels step] [--dims 64]      # small checks, without a GPU

Runs from a plain checkout, nothing installed but torch, triton and numpy. What fails its check is recorded
and not timed. Checks and sections run in processes of their own, so that a kernel that hangs or breaks its
context costs its own figures only; OUT is written whole after each section. `--checked` takes over the checks
of an earlier run of the same sources on the same device. With `--interpret`, sections named by `--section`
run dry: the torch form on the CPU, at tiny sizes, to show that their code runs.

flash-linear-attention is compared where it can be imported (pip install fla-core).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any

from measured import ROOT, Row, row_of, sources_hash, summary, table, write_json

KERNELS = ("forward", "forward_split", "backward", "backward_split", "step", "tree")
DTYPES = ("bfloat16", "float16", "float32")
DIMS = (128, 64, 80, 256)
GROUPS = (64, 128)

SECTIONS = {
    "forward": ("forward",),
    "training": ("forward", "backward"),
    "fla": ("forward", "backward"),
    "decode": ("step",),
    "tree": ("step", "tree"),
    "long": ("forward", "forward_split", "backward", "backward_split"),
    "profile": ("forward", "backward"),
}
"""What is timed, in this order, and the kernels that must have passed."""

NO_GPU = (
    "benchmarks/gpu.py found no GPU that PyTorch can use: run it where there is one, or with --interpret to "
    "check the kernels on the CPU."
)
_MARK = "@linearize "
"""Starts a worker's records among whatever else libraries print."""


class Results:
    """What was found so far, and the file it goes to."""

    def __init__(self, path: Path | None, environment: dict[str, Any], checked: dict[str, Any]) -> None:
        self.path = path
        self.environment = environment
        self.checks: dict[str, dict[str, Any]] = dict(checked)
        self.sections: dict[str, str] = {}
        self.rows: list[Row] = []

    def save(self) -> None:
        if self.path is not None:
            rows = [row.record() for row in self.rows]
            payload = dict(
                environment=self.environment, checks=self.checks, sections=self.sections, rows=rows
            )
            write_json(self.path, payload)

    def refused(self) -> dict[str, str]:
        """The checks that did not pass, and why."""
        return {name: check["failure"] for name, check in self.checks.items() if check["failure"]}


def checkout() -> None:
    """Make `linearize.ops` importable from this checkout, whatever is installed.

    Only the folders are joined, as in a wheel: `linearize/__init__.py` would load transformers, which the
    kernels do not need.
    """
    package = ModuleType("linearize")
    package.__path__ = [str(ROOT / "linearize"), str(ROOT)]
    sys.modules["linearize"] = package


def workers(arguments: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """The records of one worker process, as they come; the last one says how it ended.

    {"end": ""} for a worker that finished, otherwise the reason.
    """
    environment = dict(os.environ)
    if arguments.get("interpret"):
        # Triton's own and only switch; it counts before triton is imported, hence in a process of its own.
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-u", str(Path(__file__).resolve()), "--worker", json.dumps(arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(max(seconds, 0), stop)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(_MARK):
                yield json.loads(line.removeprefix(_MARK))
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
    yield {"end": "out of time" if late.is_set() else f"exit status {code}" if code else ""}


def check(
    cases: list[dict[str, Any]], interpret: bool, deadline: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Check in one process, or in another one from the case on that broke it: (name, outcome)."""
    while cases:
        done, end = 0, ""
        arguments = dict(check=cases, interpret=interpret)
        for record in workers(arguments, deadline - time.monotonic()):
            if "end" in record:
                end = record["end"]
            else:
                done += 1
                yield record["name"], record
        if end == "out of time":
            for case in cases[done:]:
                yield _name(case), dict(failure="not checked: out of time", errors={})
            return
        if done < len(cases) and not end.startswith(_BROKEN):
            yield (
                _name(cases[done]),
                dict(failure=f"its process ended: {end or 'without a word'}", errors={}),
            )
            done += 1
        cases = cases[done:]


_BROKEN = "exit status 3"
"""A worker that recorded the failure itself, and left because the device would answer nothing more."""


def _name(case: dict[str, Any]) -> str:
    return "{kernel}/{dtype}/D{head_dim}/G{group_size}".format(**case)


def run_checks(options: argparse.Namespace, results: Results, deadline: float) -> None:
    """Cases of one dtype and head_dim go to one process: they share the time of its start."""
    sections = [] if options.interpret else options.section
    timed = {name for section in sections for name in SECTIONS.get(section, ())}
    whole = "checks" in options.section
    batches = []
    for dtype in options.dtypes:
        for dim in options.dims:
            batch = [
                dict(kernel=kernel, dtype=dtype, head_dim=dim, group_size=group)
                for group in options.groups
                for kernel in options.kernels
                if whole or (kernel in timed and (dtype, group) == ("bfloat16", 64) and dim in (64, 128))
            ]
            batches.append([case for case in batch if _name(case) not in results.checks])

    def one(batch: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
        return list(check(batch, options.interpret, deadline))

    with ThreadPoolExecutor(options.workers) as pool:
        for finished in as_completed([pool.submit(one, batch) for batch in batches if batch]):
            for name, outcome in finished.result():
                results.checks[name] = outcome
                figures = ", ".join(f"{key} {error:.1e}" for key, error in outcome["errors"].items())
                print(
                    f"{'FAILED' if outcome['failure'] else 'ok':6}  {name:32} {outcome['failure'] or figures}"
                )
            results.save()


def run_section(name: str, results: Results, deadline: float, dry: bool) -> None:
    started, end = time.monotonic(), "out of time"
    arguments = dict(section=name, refused=results.refused(), checked=sorted(results.checks), dry=dry)
    for record in workers(arguments, deadline - time.monotonic()):
        if "end" in record:
            end = record["end"]
        else:
            results.rows.append(row_of(record))
    if name == "forward":
        results.rows += crossovers(results.rows)
    spent = f"{time.monotonic() - started:.0f} s"
    results.sections[name] = f"stopped after {spent}: {end}" if end else f"done in {spent}"
    results.save()
    print(table([row for row in results.rows if row.section == name]))
    print(f"  {results.sections[name]}", flush=True)


def crossovers(rows: Iterable[Row], goal: int = 1024) -> list[Row]:
    """For each pair of sides, the length from which on ours is faster, between the lengths measured.

    In the row's two figures: tokens, and `goal` tokens, so that the ratio is 1 or more when the goal is met.
    """
    sides: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row.section == "forward" and row.ratio is not None and row.details.get("call") == "eager":
            key = (row.details["shape"], row.ours, row.theirs)
            sides.setdefault(key, []).append((row.details["length"], row.ratio))
    out = []
    for (shape, ours, theirs), points in sides.items():
        points.sort()
        behind = [place for place, (_, ratio) in enumerate(points) if ratio < 1]
        if not behind:
            at, note = float(points[0][0]), f"ahead at {points[0][0]} tokens already, the fewest measured"
        elif behind[-1] == len(points) - 1:
            at, note = float(max(points[-1][0], 2 * goal)), f"not ahead up to {points[-1][0]} tokens"
        else:
            (low, below), (high, above) = points[behind[-1] : behind[-1] + 2]
            at = low + (high - low) * (1 - below) / (above - below)
            note = f"ahead from about {at:.0f} tokens on"
        judged = shape == "B8 H32 D128" and "flash" in theirs
        case = f"{shape} crossover, in tokens"
        out.append(
            Row("forward", case, ours, theirs, at, goal, 1 if judged else None, note, dict(shape=shape))
        )
    return out


def environment(interpret: bool) -> dict[str, Any]:
    """Versions and device. Ends the program with one sentence where there is nothing to run on."""
    import torch

    if not interpret and not torch.cuda.is_available():
        sys.exit(NO_GPU)
    try:
        import triton
    except ImportError:
        sys.exit("benchmarks/gpu.py needs triton: pip install triton")
    found = dict(
        device="Triton's interpreter",
        python=sys.version.split()[0],
        torch=torch.__version__,
        triton=triton.__version__,
        sources=sources_hash(),
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    if not interpret:
        device = torch.cuda.get_device_properties(0)
        found |= dict(device=device.name, processors=device.multi_processor_count)
        found |= dict(
            memory_gib=round(device.total_memory / 2**30), runtime=torch.version.cuda or torch.version.hip
        )
    return found


def earlier_checks(path: Path | None, now: dict[str, Any]) -> dict[str, Any]:
    """Checks of an earlier run that hold now. Ends the program when its sources or device were others."""
    if path is None:
        return {}
    found = json.loads(path.read_text())
    for key in ("sources", "device", "torch", "triton"):
        if found["environment"][key] != now[key]:
            sys.exit(f"{path} was checked with another {key}: {found['environment'][key]}, now {now[key]}")
    return {
        name: item for name, item in found["checks"].items() if not item["failure"].startswith("not checked")
    }


def work(arguments: dict[str, Any]) -> None:
    """A worker process: print one record for each case or row."""
    checkout()
    if arguments.get("interpret"):
        sys.path.append(str(ROOT / "tests"))
        from interpreter import _repair_bfloat16

        _repair_bfloat16()
    import torch

    def say(record: dict[str, Any]) -> None:
        print(_MARK + json.dumps(record), flush=True)

    if "check" in arguments:
        import kernel_checks

        interpret = arguments["interpret"]
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
        device = torch.device("cpu" if interpret else "cuda")
        for fields in arguments["check"]:
            outcome = kernel_checks.run(kernel_checks.Case(**fields), device, small=interpret)
            errors = {key: x if math.isfinite(x) else None for key, x in outcome.errors.items()}
            say(dict(name=outcome.case.name, errors=errors, failure=outcome.failure))
            if outcome.failure and not interpret:
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    sys.exit(3)
    else:
        import gpu_sections

        torch.set_num_threads(1 if arguments["dry"] else torch.get_num_threads())
        bench = gpu_sections.Bench(arguments["refused"], arguments["checked"], arguments["dry"])
        for row in gpu_sections.SECTIONS[arguments["section"]](bench):
            say(row.record())


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--section", nargs="+", choices=["checks", *SECTIONS], help="default: all of them")
    parser.add_argument("--budget-seconds", type=float, default=540, help="stop by then; default 540")
    parser.add_argument("--checked", type=Path, help="JSON of an earlier run whose checks still hold")
    parser.add_argument("--interpret", action="store_true", help="small checks in Triton's interpreter")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--dims", nargs="+", type=int)
    parser.add_argument("--groups", nargs="+", type=int)
    parser.add_argument("--workers", type=int, help="processes that check at the same time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    few = options.interpret  # the interpreter takes about a second for what a GPU does in a microsecond
    options.section = options.section or (["checks"] if few else ["checks", *SECTIONS])
    options.dtypes = options.dtypes or (["float32", "bfloat16"] if few else list(DTYPES))
    options.dims = options.dims or ([64] if few else list(DIMS))
    options.groups = options.groups or ([64] if few else list(GROUPS))
    options.workers = options.workers or (1 if few else max(1, min(12, (os.cpu_count() or 4) - 2)))
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.worker is not None:
        work(json.loads(options.worker))
        return
    started = time.monotonic()
    deadline = started + options.budget_seconds
    found = environment(options.interpret)
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    results = Results(options.json, found, earlier_checks(options.checked, found))
    sections = [name for name in SECTIONS if name in options.section]
    # Half of the time at least is for the timings, when there are any.
    run_checks(options, results, started + options.budget_seconds * (0.5 if sections else 1))
    for name in sections:
        run_section(name, results, deadline, dry=options.interpret)
    results.save()
    failed = results.refused()
    print(f"\n{len(results.checks) - len(failed)} of {len(results.checks)} checks passed")
    if results.rows and not options.interpret:
        print(table([row for row in results.rows if row.goal is not None]))
        print(summary(results.rows))
    if failed:
        sys.exit("failed: " + ", ".join(failed))


if __name__ == "__main__":
    main()
