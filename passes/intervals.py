"""Sets of integers as unions of intervals: what a comparison lets through, exactly and for every length."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Bound = int | float
"""An integer, or an infinity."""


@dataclass(frozen=True)
class Integers:
    """A union of closed intervals, in order, with a gap between each two."""

    parts: tuple[tuple[Bound, Bound], ...]

    def __contains__(self, number: Bound) -> bool:
        return any(low <= number <= high for low, high in self.parts)

    def __bool__(self) -> bool:
        return bool(self.parts)

    def __invert__(self) -> Integers:
        gaps: list[tuple[Bound, Bound]] = []
        start: Bound = -math.inf
        for low, high in self.parts:
            gaps.append((start, low - 1))
            start = high + 1
        return union([*gaps, (start, math.inf)])

    def __or__(self, other: Integers) -> Integers:
        return union([*self.parts, *other.parts])

    def __and__(self, other: Integers) -> Integers:
        return ~(~self | ~other)

    def holds(self, other: Integers) -> bool:
        """Whether every number of `other` is in this set."""
        return not (other & ~self)

    def shifted(self, by: int) -> Integers:
        return Integers(tuple((low + by, high + by) for low, high in self.parts))

    def negated(self) -> Integers:
        return Integers(tuple((-high, -low) for low, high in reversed(self.parts)))

    def divided(self, by: int) -> Integers:
        """The numbers n with `by * n` in this set; `by` is positive."""
        parts = [
            (low if math.isinf(low) else -(-low // by), high if math.isinf(high) else high // by)
            for low, high in self.parts
        ]
        return union(parts)

    def __str__(self) -> str:
        return " or ".join(f"{low}..{high}" for low, high in self.parts) or "nothing"


def union(parts: Iterable[tuple[Bound, Bound]]) -> Integers:
    """The set of the numbers in any of the intervals; empty ones are left out."""
    merged: list[tuple[Bound, Bound]] = []
    for low, high in sorted(part for part in parts if part[0] <= part[1]):
        if low == math.inf or high == -math.inf:
            continue
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return Integers(tuple(merged))


def between(low: Bound, high: Bound) -> Integers:
    return union([(low, high)])


def up_to(high: Bound) -> Integers:
    return between(-math.inf, high)


def from_on(low: Bound) -> Integers:
    return between(low, math.inf)


def only(number: int) -> Integers:
    return between(number, number)


ALL = up_to(math.inf)
NONE = Integers(())


def cells(sets: Iterable[Integers]) -> list[Integers]:
    """The coarsest partition of the integers whose pieces lie in or outside of each set, in order."""
    starts = {-math.inf}
    for one in sets:
        for low, high in one.parts:
            starts |= {low} if not math.isinf(low) else set()
            starts |= {high + 1} if not math.isinf(high) else set()
    ordered = sorted(starts)
    ends = [start - 1 for start in ordered[1:]] + [math.inf]
    return [between(low, high) for low, high in zip(ordered, ends, strict=True)]
