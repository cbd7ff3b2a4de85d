"""Expressions of one entry of a mask: what stands at batch b, head h, query i, key j, for every length.

A value is a number (`Sum`: a linear combination of terms), one of two values (`Choice`), or, where it is True
or False, a `Formula`. A term is what is not taken apart further: an index, a size, an entry of an input. Two
expressions are equal when they read the same, so each carries its text. Arithmetic on them is in
`algebra.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch.fx import Node

from .intervals import Bound, Integers

Number = int | Fraction | float
"""Exact, but for infinities and NaN."""


class UnreadableError(Exception):
    """An operator, or its use, that the tables cannot turn into an expression."""


class Expression:
    """Equal when the text is."""

    text: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and type(self) is type(other) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text

    def _say(self, text: str) -> None:
        object.__setattr__(self, "text", text)

    def children(self) -> Iterable[Expression]:
        """What the expression is directly made of."""
        return ()

    @cached_property
    def terms(self) -> frozenset[Term]:
        """All terms in the expression, however deep."""
        own = {self} if isinstance(self, Term) else set[Term]()
        return frozenset(own).union(*(child.terms for child in self.children()))

    @cached_property
    def indices(self) -> frozenset[str]:
        """The indices that the expression depends on, those bound by a count or a token left out."""
        if isinstance(self, Term) and self.kind == "index":
            return frozenset({self.key})
        bound = {self.bound} if isinstance(self, Term) else set[str]()
        first, *rest = [child.indices for child in self.children()] or [frozenset[str]()]
        return (first - bound).union(*rest)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph inputs that decide the expression."""
        return tuple(sorted({name for term in self.terms for name in term.leaves}))


@dataclass(frozen=True, eq=False)
class Term(Expression):
    """What a sum is made of.

    Attributes:
        kind: What it is:

            - `index`: the key names it: b, h, i (query), j (key), or a variable bound by a running count.
            - `size`: a size symbol, or an expression of sizes.
            - `read`: the entry of a node at the indices `args`; the key says which node.
            - `floor`: `args[0]` divided by the number in the key, rounded down; `ratio`: not rounded.
            - `rounded`: `args[0]` in the dtype of the key, which does not hold every position.
            - `count`: the sum of `args[0]` over its bound variable, the key, from 0 up to and with `args[1]`.
            - `token`: the value `args[0]`, with its variable, the key, at `args[1]`, taken as a whole.
            - `product`: of the arguments. `flat`: indices `args` of several axes as one, their sizes the key.
            - `test`: one where a comparison of real numbers holds; the key is the comparison with zero.
        key, args: see there.
        low, high: Bounds that always hold; an index may have a size as its highest value.
        integer: Whether it is a whole number.
        source: The node that a `read` reads.
        leaves: Names of the graph inputs whose values decide it.
        learned: Whether a parameter takes part.
    """

    kind: str
    key: str
    args: tuple[Value, ...] = ()
    low: Bound = float("-inf")
    high: Bound | Sum = float("inf")
    integer: bool = True
    source: Node | None = None
    leaves: tuple[str, ...] = ()
    learned: bool = False
    text: str = field(init=False)

    def __post_init__(self) -> None:
        inner = ", ".join(arg.text for arg in self.args)
        self._say(self.key if self.kind == "index" else f"{self.kind}:{self.key}({inner})")

    def children(self) -> Iterable[Expression]:
        return self.args

    @property
    def bound(self) -> str:
        """The index that this term binds in its first argument."""
        return self.key if self.kind in ("count", "token") else ""


@dataclass(frozen=True, eq=False)
class Sum(Expression):
    """`const` plus the sum of each term times its factor."""

    items: Mapping[Term, Number]
    const: Number = 0
    text: str = field(init=False)

    def __post_init__(self) -> None:
        parts = sorted(f"{factor}*{term.text}" for term, factor in self.items.items())
        self._say(" + ".join([*parts, str(self.const)]))

    def children(self) -> Iterable[Expression]:
        return self.items


@dataclass(frozen=True, eq=False)
class Choice(Expression):
    """`then` where the condition holds, `other` elsewhere."""

    condition: Formula
    then: Sum | Choice
    other: Sum | Choice
    text: str = field(init=False)

    def __post_init__(self) -> None:
        self._say(f"({self.then.text} if {self.condition.text} else {self.other.text})")

    def children(self) -> Iterable[Expression]:
        return self.condition, self.then, self.other


@dataclass(frozen=True, eq=False)
class Formula(Expression):
    """True or False: see `Truth`, `Member`, `Both` and `Either`."""


@dataclass(frozen=True, eq=False)
class Truth(Formula):
    """A constant."""

    value: bool
    text: str = field(init=False)

    def __post_init__(self) -> None:
        self._say(str(self.value))


@dataclass(frozen=True, eq=False)
class Member(Formula):
    """An integer combination of terms, without a constant and in lowest terms, lies in a set."""

    direction: Sum
    allowed: Integers
    text: str = field(init=False)

    def __post_init__(self) -> None:
        self._say(f"[{self.direction.text} in {self.allowed}]")

    def children(self) -> Iterable[Expression]:
        return (self.direction,)


@dataclass(frozen=True, eq=False)
class Both(Formula):
    """All of the parts hold."""

    parts: tuple[Formula, ...]
    text: str = field(init=False)

    def __post_init__(self) -> None:
        self._say(f"({' and '.join(sorted(part.text for part in self.parts))})")

    def children(self) -> Iterable[Expression]:
        return self.parts


@dataclass(frozen=True, eq=False)
class Either(Formula):
    """Some part holds."""

    parts: tuple[Formula, ...]
    text: str = field(init=False)

    def __post_init__(self) -> None:
        self._say(f"({' or '.join(sorted(part.text for part in self.parts))})")

    def children(self) -> Iterable[Expression]:
        return self.parts


Value = Sum | Choice | Formula
Numeric = Sum | Choice

TRUE, FALSE = Truth(True), Truth(False)


def number(value: Any) -> Number:
    """A Python number, exactly; whole numbers as int."""
    if isinstance(value, float) and not (value - value == 0):  # an infinity or NaN
        return value
    exact = Fraction(value)
    return int(exact) if exact.denominator == 1 else exact


def constant(value: Any) -> Sum:
    return Sum({}, number(value))


def of_term(term: Term) -> Sum:
    return Sum({term: 1})
