"""Results that print: as tables in terminals, as text, and as HTML in notebooks."""

from __future__ import annotations

import html
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

WIDTH = 160
"""Columns of a result as text, where it is not printed on a terminal."""
_CELL = "text-align: left; vertical-align: top; padding: 2px 10px"


@dataclass(frozen=True)
class Grid:
    """A table: headings, and rows of as many cells."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


class Printed:
    """A result that prints. What of it is said is in `blocks`."""

    def blocks(self) -> Iterable[Grid | str]:
        """Tables and sentences, in their order."""
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        for block in self.blocks():
            if isinstance(block, str):
                yield Text(block)
                continue
            table = Table(*block.headings)
            for row in block.rows:
                table.add_row(*map(Text, row))
            yield table

    def __str__(self) -> str:
        return as_text(self, shutil.get_terminal_size((WIDTH, 1)).columns)

    def _repr_html_(self) -> str:
        return as_html(self.blocks())


def as_text(printed: object, width: int) -> str:
    """What rich prints of an object, as plain text."""
    from rich.console import Console

    out = StringIO()
    Console(width=width, color_system=None, file=out, legacy_windows=False).print(printed)
    return out.getvalue().rstrip("\n")


def as_html(blocks: Iterable[Grid | str]) -> str:
    """Tables and sentences as a piece of HTML that changes nothing of the page around it."""
    parts = [f"<p>{html.escape(x)}</p>" if isinstance(x, str) else _table(x) for x in blocks]
    return f"<div>{''.join(parts)}</div>"


def _table(grid: Grid) -> str:
    def row(kind: str, cells: Sequence[str]) -> str:
        said = (f'<{kind} style="{_CELL}">{html.escape(x)}</{kind}>' for x in cells)
        return f"<tr>{''.join(said)}</tr>"

    head, body = row("th", grid.headings), "".join(row("td", cells) for cells in grid.rows)
    return f'<table style="border-collapse: collapse"><thead>{head}</thead><tbody>{body}</tbody></table>'


def alike(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    """Rows of layers, the first cell a path: those that differ in their number alone become one row.

    Layers 0 to 29 of a model that says the same of each are `model.layers.0-29.self_attn`.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for path, *cells in rows:
        before, number, after = _numbered(path)
        groups.setdefault((before, after, *cells), []).extend([] if number is None else [number])
    return [
        [before + _ranges(numbers) + after, *cells] for (before, after, *cells), numbers in groups.items()
    ]


def _numbered(path: str) -> tuple[str, int | None, str]:
    """A path in front of its first number, that, and what follows it."""
    parts = path.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if place is None:
        return path, None, ""
    before, after = ".".join(parts[:place]), ".".join(parts[place + 1 :])
    return before + "." * bool(before), int(parts[place]), "." * bool(after) + after


def _ranges(numbers: Sequence[int]) -> str:
    """`0-5,7` for these numbers, in ascending order."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in _runs(sorted(set(numbers))))


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = None
    for place, number in enumerate(numbers):
        first = number if first is None else first
        if place + 1 == len(numbers) or numbers[place + 1] != number + 1:
            yield first, number
            first = None
