"""Constant tensors as expressions: a buffer is read whole, so that what it says holds wherever it reaches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .algebra import both, bounds, choose, compare, constant, either, floored, is_whole, member, plus
from .intervals import between
from .terms import Formula, Numeric, Sum, UnreadableError

LARGEST = 2**26
"""Tables of more entries are not read."""

MOST_RUNS = 8
"""A line of more runs of equal entries is no mask."""


def read_table(table: Tensor, at: Sequence[Numeric]) -> Numeric:
    """The entry of a constant at indices that are known to be in range."""
    plain = type(table) in (Tensor, torch.nn.Parameter) and not table.is_meta
    if not plain or not 0 < table.numel() <= LARGEST:
        raise UnreadableError("a constant that is too large to read, or has no values")
    table, places = _varying(table.detach(), list(at))
    if table.dim() == 0:
        return constant(table.item())
    if not all(isinstance(place, Sum) and is_whole(place) for place in places):
        raise UnreadableError("a constant is read at places that are not known")
    sums = [place for place in places if isinstance(place, Sum)]
    if table.dim() == 1:
        return _line(table, sums[0], 0)
    if table.dim() == 2:
        return _square(table, *sums)
    raise UnreadableError("a constant differs along more than two axes")


def _varying(table: Tensor, places: list[Numeric]) -> tuple[Tensor, list[Numeric]]:
    """Without the axes along which all entries are the same."""
    for axis in reversed(range(table.dim())):
        first = table.select(axis, 0)
        if bool((table == first.unsqueeze(axis)).all()):
            table = first
            del places[axis]
    return table, places


def _line(values: Tensor, place: Sum, start: int) -> Numeric:
    """Entry `place` of a line whose first entry is number `start`: a few runs, or steps of one size."""
    changes = (values[1:] != values[:-1]).nonzero().flatten().tolist()
    if len(changes) < MOST_RUNS:
        result: Numeric = constant(values[-1].item())
        for change in reversed(changes):
            before = member(place, between(-math.inf, change + start))
            result = choose(before, constant(values[change].item()), result)
        return result
    steps = values[1:] - values[:-1] if values.dtype != torch.bool else values
    if not values.is_floating_point() and values.dtype != torch.bool and bool((steps == steps[0]).all()):
        step = int(steps[0])
        return plus(constant(int(values[0]) - step * start), place, step)
    raise UnreadableError("a constant is no run of equal entries")


def _square(table: Tensor, row: Sum, column: Sum) -> Numeric:
    if bool((table[1:, 1:] == table[:-1, :-1]).all()):
        rows, columns = table.shape
        # Entries by row - column, the lowest first.
        line = torch.cat([table[0].flip(0), table[1:, 0]])
        return _line(line, plus(row, column, -1), 1 - columns)
    low, high = table.min().item(), table.max().item()
    if not bool(((table == low) | (table == high)).all()):
        raise UnreadableError("a constant is no mask of its rows and columns")
    for value, other in ((high, low), (low, high)):
        seen = _shown(table == value, row, column)
        if seen is not None:
            return choose(seen, constant(value), constant(other))
    raise UnreadableError("a constant is no known pattern of its rows and columns")


def _shown(seen: Tensor, row: Sum, column: Sum) -> Formula | None:
    """The formula of a table of truth values, None where none of the known ones gives every entry."""
    rows, columns = seen.shape
    i = torch.arange(rows, device=seen.device)[:, None]
    j = torch.arange(columns, device=seen.device)
    prefix = int(seen[0].sum())
    if bool((seen == ((j <= i) | (j < prefix))).all()):
        causal = compare("le", column, row)
        return either([causal, compare("lt", column, constant(prefix))])
    hidden = (~seen[:, 0]).nonzero()
    width = int(hidden[0]) if len(hidden) else 0
    if width < 1:
        return None
    same = i // width == j // width
    together = compare("eq", floored(row, width), floored(column, width))
    if bool((seen == same).all()):
        return together
    if bool((seen == (same & (j <= i))).all()):
        return both([together, compare("le", column, row)])
    return None


def in_range(place: Numeric, size: Sum) -> Numeric:
    """An index of an axis as PyTorch takes it: negative ones count from the end."""
    if isinstance(place, Sum) and bounds(place)[0] < 0 and is_whole(place):
        return choose(compare("le", constant(0), place), place, plus(place, size))
    return place
