"""What the benchmarks share: a row of two sides measured in one run, tables of rows, and files written whole.

Needs nothing but the standard library, so that it runs wherever the kernels do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """Ours against theirs on one case. Times are milliseconds; None where a side did not run: see `note`.

    goal: the least `ratio` wanted. details: whatever else was measured, for readers of the JSON.
    """

    section: str
    case: str
    ours: str
    theirs: str
    ours_ms: float | None = None
    theirs_ms: float | None = None
    goal: float | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """How many times faster ours is."""
        return self.theirs_ms / self.ours_ms if self.ours_ms and self.theirs_ms else None

    @property
    def verdict(self) -> str:
        """ "met" or "MISSED"; "not run" when a goal was set and a side is missing; "" without a goal."""
        if self.goal is None:
            return ""
        if self.ratio is None:
            return "not run"
        return "met" if self.ratio >= self.goal else "MISSED"

    def record(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "ratio": self.ratio, "verdict": self.verdict}


def row_of(record: Mapping[str, Any]) -> Row:
    """Inverse of `Row.record`."""
    return Row(**{item.name: record[item.name] for item in dataclasses.fields(Row)})


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text, one block per section, in the order they were measured."""
    head = ("case", "ours", "ms", "theirs", "ms", "ratio", "goal", "", "note")
    left = (0, 1, 3, 7, 8)
    out: list[str] = []
    for section in dict.fromkeys(row.section for row in rows):
        cells = [head, *(_cells(row) for row in rows if row.section == section)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        out += ["", section]
        for line in cells:
            parts = (
                text.ljust(width) if column in left else text.rjust(width)
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            out.append("  " + "  ".join(parts).rstrip())
    return "\n".join(out)


def _cells(row: Row) -> tuple[str, ...]:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x" if row.ratio < 10 else f"{row.ratio:.0f}x"
    goal = "" if row.goal is None else f"{row.goal:g}x"
    times = (_ms(row.ours_ms), _ms(row.theirs_ms))
    return row.case, row.ours, times[0], row.theirs, times[1], ratio, goal, row.verdict, row.note


def _ms(x: float | None) -> str:
    return "" if x is None else f"{x:.4f}" if x < 1 else f"{x:.2f}" if x < 100 else f"{x:.0f}"


def summary(rows: Iterable[Row]) -> str:
    """One line: how many goals were met, and the missed ones by name."""
    judged = [row for row in rows if row.goal is not None]
    missed = [f"{row.section}, {row.case}, {row.ours}" for row in judged if row.verdict == "MISSED"]
    met = sum(row.verdict == "met" for row in judged)
    tail = f"; missed: {'; '.join(missed)}" if missed else ""
    return f"{met} of {len(judged)} goals met{tail}"


def write_json(path: Path, payload: Any) -> None:
    """Write whole or not at all: whoever reads `path` finds the old file or the new one."""
    text = json.dumps(payload, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def sources_hash() -> str:
    """Of every file that decides what the kernels compute: figures of other sources are other figures."""
    digest = hashlib.sha256()
    folder = ROOT / "kernels"
    for path in sorted(p for end in ("py", "h", "cpp") for p in folder.rglob(f"*.{end}")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
