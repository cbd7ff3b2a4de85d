"""Plots of perplexity, time and memory against length."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..common.files import write_whole
from ..errors import InputError, MissingExtraError
from .figures import Figures, Measurement

FORMATS = ("png", "svg", "pdf")
Value = Callable[[Figures, int], float | None]


def _forward(figures: Figures, length: int) -> float | None:
    rate = figures.forward_tokens_per_second
    return None if rate is None else 1000 * length / rate


def _decode(figures: Figures, length: int) -> float | None:
    rate = figures.decode_tokens_per_second
    return None if rate is None else 1000 / rate


def _memory(figures: Figures, length: int) -> float | None:
    return None if figures.cache_bytes is None else figures.cache_bytes / 1e6


PANELS: tuple[tuple[str, Value], ...] = (
    ("perplexity", lambda figures, length: figures.perplexity),
    ("forward pass, ms", _forward),
    ("decoded token, ms", _decode),
    ("cache, MB", _memory),
)


def plot(
    rows: Sequence[Measurement], model: str, reference: str | None, path: str | os.PathLike[str]
) -> None:
    """See `Evaluation.plot`. model, reference: their names in the legend."""
    suffix = check_format(path)
    sides: list[tuple[str, Callable[[Measurement], Figures | None]]] = [(model, lambda row: row.model)]
    if reference is not None:
        sides.insert(0, (f"{reference}, original", lambda row: row.reference))
    curves = [(label, [(name, curve(rows, side, value)) for name, side in sides]) for label, value in PANELS]
    curves = [(label, lines) for label, lines in curves if any(len(points) > 1 for _, points in lines)]
    if not curves:
        raise InputError("there is nothing to draw against length: evaluate a decoder at two lengths or more")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'linearize[eval]'") from error
    figure = Figure(figsize=(4 * len(curves), 3.6), layout="constrained")
    for axes, (label, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        for name, points in lines:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        lengths = sorted({length for _, points in lines for length, _ in points})
        axes.set(xlabel="length in tokens", ylabel=label, xscale="log", ylim=(0, None))
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=suffix, dpi=120)
    write_whole(path, drawn.getvalue())


def check_format(path: str | os.PathLike[str]) -> str:
    """The format of a plot, by the suffix of its file. Raises InputError for another one."""
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise InputError(f"a plot must be of the kind {', '.join(FORMATS)}, got {os.fspath(path)!r}")
    return suffix


def curve(
    rows: Sequence[Measurement], side: Callable[[Measurement], Figures | None], value: Value
) -> list[tuple[int, float]]:
    """The points (length, value) of one model, where both are known."""
    found = []
    for row in rows:
        figures = side(row)
        number = None if figures is None or row.length is None else value(figures, row.length)
        if row.length is not None and number is not None:
            found.append((row.length, number))
    return found
