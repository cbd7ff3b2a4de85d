"""The language of masks: from a formula over query i and key j to the pattern that it is, or why it is none.

A formula is a boolean function of a few directions, each a combination of indices and inputs that lies in
some sets of integers or not. Its truth table over the pieces of those sets is small. Where the table is a
product, every direction has a say of its own: the distance of query and key gives the pattern, predicates of
the key alone are padding, tokens of one document share a term. Everything is for all lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from .algebra import as_formula, compare, either, plus, substitute
from .intervals import ALL, NONE, Integers, cells, from_on, only
from .site import Pattern
from .terms import Both, Either, Expression, Formula, Member, Sum, Term, Truth, of_term
from .terms import constant as number

MOST_ENTRIES = 2**16
"""Truth tables of more entries are not made."""

CAUSAL = from_on(0)


@dataclass(frozen=True)
class Meaning:
    """What a formula shows.

    Attributes:
        pattern, width, padding, own_column, documents, top_left, per_head: As in `Mask`.
        why: What the language does not say, for a refusal; "" where it says everything.
        inputs: The graph inputs that decide what is not said, or which tokens are one document.
        culprit: A node that computes it, where one can be named.
        given: As in `Mask`.
    """

    pattern: Pattern
    width: int | None = None
    padding: bool = False
    own_column: bool = True
    documents: bool = False
    top_left: bool = False
    per_head: bool = False
    why: str = ""
    inputs: tuple[str, ...] = ()
    culprit: Node | None = None
    given: bool = False


@dataclass(frozen=True)
class Axis:
    """A direction of a truth table and the pieces of the integers along it."""

    direction: Sum
    pieces: tuple[Integers, ...]

    def chosen(self, shown: Tensor) -> Integers:
        """The union of the pieces that are True."""
        found = NONE
        for piece, wanted in zip(self.pieces, shown.tolist(), strict=True):
            found = found | piece if wanted else found
        return found


def classify(formula: Formula, shift: Sum) -> Meaning:
    """The meaning of what a mask shows; `shift` is the number of keys minus that of queries."""
    table = truth_table(formula)
    if table is None:
        return unknown("its mask has too many cases", [formula])
    axes, values = table
    if not bool(values.any()):
        return unknown("its mask hides every key", [formula])
    return _Reading(axes, values, shift).meaning()


def satisfiable(formula: Formula) -> bool:
    """Whether the formula may hold somewhere; True where it is not known."""
    table = truth_table(formula)
    return table is None or bool(table[1].any())


def truth_table(formula: Formula) -> tuple[list[Axis], Tensor] | None:
    """The formula on every combination of pieces; None where there are too many."""
    sets: dict[Sum, list[Integers]] = {}
    _collect(formula, sets)
    axes = [Axis(direction, tuple(cells(found))) for direction, found in sets.items()]
    if math.prod(len(axis.pieces) for axis in axes) > MOST_ENTRIES:
        return None
    places = {axis.direction: place for place, axis in enumerate(axes)}
    shape = [len(axis.pieces) for axis in axes]
    return axes, _values(formula, axes, places).expand(shape)


def _collect(formula: Formula, sets: dict[Sum, list[Integers]]) -> None:
    if isinstance(formula, Member):
        sets.setdefault(formula.direction, []).append(formula.allowed)
    elif isinstance(formula, Both | Either):
        for part in formula.parts:
            _collect(part, sets)


def _values(formula: Formula, axes: Sequence[Axis], places: dict[Sum, int]) -> Tensor:
    if isinstance(formula, Member):
        place = places[formula.direction]
        inside = torch.tensor([formula.allowed.holds(piece) for piece in axes[place].pieces])
        return inside.view([-1 if n == place else 1 for n in range(len(axes))])
    if isinstance(formula, Both | Either):
        parts = [_values(part, axes, places) for part in formula.parts]
        total = parts[0]
        for part in parts[1:]:
            total = total & part if isinstance(formula, Both) else total | part
        return total
    assert isinstance(formula, Truth)
    return torch.full([1] * len(axes), formula.value)


def unknown(why: str, blamed: Sequence[Expression], per_head: bool = False) -> Meaning:
    """A mask that the language does not say; `blamed` is what decides it."""
    inputs = tuple(sorted({name for one in blamed for name in one.inputs}))
    sources = [term.source for one in blamed for term in one.terms if term.source is not None]
    culprit = next((node for node in sources if node.op != "placeholder"), None)
    if inputs:
        why = f"{why}, decided by the input {' and '.join(map(repr, inputs))}"
    decided = [part for one in blamed for part in _decided_by_inputs(one)]
    given = any(map(_is_pairwise, decided)) and all(
        _is_pairwise(part) or part.indices <= {"b", "h", "j"} for part in decided
    )
    return Meaning(Pattern.OTHER, per_head=per_head, why=why, inputs=inputs, culprit=culprit, given=given)


def _decided_by_inputs(value: Expression) -> list[Term]:
    """The outermost terms in an expression that inputs decide."""
    if isinstance(value, Term):
        return [value] if value.inputs else []
    return [term for child in value.children() for term in _decided_by_inputs(child)]


def _is_pairwise(term: Term) -> bool:
    """Whether a term is an entry for a query and a key, of a tensor that nobody has learned."""
    return term.kind == "read" and {"i", "j"} <= term.indices and not term.learned


class _Reading:
    """The truth table of one formula, taken apart by what its directions speak of."""

    def __init__(self, axes: list[Axis], values: Tensor, shift: Sum) -> None:
        self.shift = shift
        used = [n for n in range(len(axes)) if not _constant_along(values, n)]
        for n in reversed(range(len(axes))):
            if n not in used:
                values = values.select(n, 0)
        self.axes, self.values = [axes[n] for n in used], values
        spoken = [axis.direction.indices & {"h", "i", "j"} for axis in self.axes]
        self.keys = [n for n, names in enumerate(spoken) if names == {"j"}]
        self.rest = [n for n in range(len(self.axes)) if n not in self.keys]

    def meaning(self) -> Meaning:
        if any("h" in axis.direction.indices for axis in self.axes):
            return unknown("its mask differs from head to head", self._directions(), per_head=True)
        if not _is_product(self.values, [[n] for n in self.rest], self.keys):
            return self._prefix() or unknown(
                "its mask is none of full, causal, window, band, chunk, padding, documents",
                self._directions(),
            )
        allowed = {n: self.axes[n].chosen(_along(self.values, n)) for n in self.rest}
        return self._product(allowed)

    def _directions(self) -> list[Sum]:
        return [axis.direction for axis in self.axes]

    def _product(self, allowed: dict[int, Integers]) -> Meaning:
        documents = [n for n in self.rest if self._is_document(n, allowed[n])]
        counted = [self.axes[n].direction for n in documents]
        distance, top_left, others = ALL, False, []
        for n in self.rest:
            if n in documents:
                continue
            found = self._distance(_by_position(self.axes[n].direction, counted), allowed[n])
            if found is None:
                others.append(n)
                continue
            distance, top_left = distance & found[0], top_left or found[1]
        causal = CAUSAL.holds(distance) and not top_left
        width = None
        for n in list(others):
            direction, ahead = self.axes[n].direction, allowed[n]
            ahead = ahead & CAUSAL if causal and self._grows(direction) else ahead
            chunk = self._chunk(direction)
            if ahead == only(0) and chunk is not None and width is None:
                width = chunk
                others.remove(n)
            elif ahead == only(0) and self._is_document(n, ahead):
                documents.append(n)
                others.remove(n)
        if others:
            blamed = [self.axes[n].direction for n in others]
            return unknown("its mask has a part that is no padding and no document", blamed)
        pattern = _pattern(distance, width)
        if pattern is None:
            return unknown(f"its mask shows keys at distances {distance} before the query", [])
        aligned = not self.shift.items and self.shift.const == 0 or pattern[0] is Pattern.FULL
        inputs = tuple(sorted({name for n in documents for name in self.axes[n].direction.inputs}))
        own = all(_at_own_column(self.axes[n].direction) for n in self.keys)
        return Meaning(
            *pattern,
            padding=bool(self.keys),
            own_column=own,
            documents=bool(documents),
            top_left=top_left and not aligned,
            inputs=inputs,
        )

    # --- one direction ---

    def _distance(self, direction: Sum, allowed: Integers) -> tuple[Integers, bool] | None:
        """The set of the distances that a query looks back, and whether they start at key 0 of more keys."""
        rest = plus(plus(direction, _INDEX_I, -1), _INDEX_J)
        if not rest.items and self.shift.items:
            return allowed, True
        if not rest.items or plus(Sum(self.shift.items), rest, -1) == number(0):
            assert isinstance(self.shift.const, int)
            return allowed.shifted(self.shift.const), False
        return None

    def _sides(self, direction: Sum) -> tuple[Sum, Sum] | None:
        """The parts about the query and the key, where they are one function of a token."""
        query = Sum({t: f for t, f in direction.items.items() if t.indices & {"i", "j"} == {"i"}})
        key = Sum({t: f for t, f in direction.items.items() if t.indices & {"i", "j"} == {"j"}})
        if len(query.items) + len(key.items) != len(direction.items) or not key.items:
            return None
        there = substitute(query, {"i": plus(_INDEX_J, self.shift, -1)})
        assert isinstance(there, Sum)
        return (query, key) if plus(there, key) == number(0) else None

    def _is_document(self, n: int, allowed: Integers) -> bool:
        """Query and key share a term that inputs decide."""
        direction = self.axes[n].direction
        sides = self._sides(direction) if allowed == only(0) and direction.inputs else None
        # A term of the position itself, such as chunks that start behind the padding, is no document.
        return sides is not None and not _asks_place(sides[1], "j")

    def _chunk(self, direction: Sum) -> int | None:
        """The width of the chunks whose difference a direction is."""
        sides = self._sides(direction)
        if sides is None or direction.inputs:
            return None
        ((term, factor),) = sides[1].items.items() if len(sides[1].items) == 1 else ((None, 0),)
        plain = isinstance(term, Term) and term.kind == "floor" and term.args == (_INDEX_J,)
        return int(term.key) if plain and term is not None and abs(factor) == 1 else None

    def _grows(self, direction: Sum) -> bool:
        """A function of a token that never falls from one token to the next, minus the same of the key."""
        sides = self._sides(direction)
        terms = list(sides[0].items) if sides is not None else []
        rising = [term.kind == "count" and term.low == 0 or term.kind == "floor" for term in terms]
        return bool(terms) and all(rising) and all(factor > 0 for factor in sides[0].items.values())  # type: ignore[index]

    def _prefix(self) -> Meaning | None:
        """Causal, and keys that a predicate names are seen by all."""
        hidden = ~self.values
        if len(self.rest) != 1 or not self.keys or not _is_product(hidden, [self.rest], self.keys):
            return None
        (n,) = self.rest
        found = self._distance(self.axes[n].direction, self.axes[n].chosen(_along(hidden, n)))
        if found is None or found[0] != ~CAUSAL:
            return None
        keys = [self.axes[n] for n in self.keys]
        blamed = [axis.direction for axis in keys]
        said = unknown("its mask shows a prefix to every query", blamed)
        width = None
        if len(keys) == 1 and keys[0].direction == _INDEX_J:
            seen = keys[0].chosen(~_along(hidden, self.keys[0])) & CAUSAL
            width = int(seen.parts[0][1]) + 1 if len(seen.parts) == 1 and seen.parts[0][0] == 0 else None
        return Meaning(Pattern.PREFIX, width, why=said.why, inputs=said.inputs, culprit=said.culprit)


_INDEX_I, _INDEX_J = (of_term(Term("index", name, low=0)) for name in "ij")


def _pattern(distance: Integers, chunk: int | None) -> tuple[Pattern, int | None] | None:
    """The pattern of the distances that a query looks back, inside chunks of a width."""
    if chunk is not None:
        return (Pattern.CHUNK, chunk) if distance == CAUSAL else None
    if distance == ALL:
        return Pattern.FULL, None
    if distance == CAUSAL:
        return Pattern.CAUSAL, None
    if len(distance.parts) != 1:
        return None
    ((low, high),) = distance.parts
    if low == 0 and not math.isinf(high):
        return Pattern.WINDOW, int(high) + 1
    if low == -high and not math.isinf(high) and high > 0:
        return Pattern.BAND, int(high)
    return None


def _constant_along(values: Tensor, axis: int) -> bool:
    return bool((values == values.select(axis, 0).unsqueeze(axis)).all())


def _along(values: Tensor, axis: int) -> Tensor:
    """Which pieces of an axis hold a True entry."""
    others = [n for n in range(values.dim()) if n != axis]
    return values.amax(others) if others else values


def _is_product(values: Tensor, groups: Sequence[Sequence[int]], keys: Sequence[int]) -> bool:
    """Whether the table is True exactly where every group of axes is."""
    total = torch.ones_like(values)
    for group in [*groups, keys]:
        others = [n for n in range(values.dim()) if n not in group]
        total = total & (values.amax(others, keepdim=True) if others else values)
    return bool((total == values).all())


def _at_own_column(value: Sum) -> bool:
    """Every entry that is read is an input's at the key's own place, or the same for all keys."""
    for term in value.terms:
        if term.kind == "read":
            if term.source is None or term.source.op != "placeholder":
                return False
            if any("j" in arg.indices and arg != _INDEX_J for arg in term.args):
                return False
        elif term.kind in ("count", "token", "flat", "size"):
            return False
    # The index itself may stand in such an entry only.
    return not _asks_place(value, "j")


def _asks_place(value: Expression, name: str) -> bool:
    """Whether an index has a say itself, not only as the place of an entry or of a running count."""
    if isinstance(value, Term) and value.kind in ("index", "read", "count"):
        return value.kind == "index" and value.key == name
    if isinstance(value, Term) and value.kind == "token":
        return _asks_place(value.args[0], value.bound)
    return any(_asks_place(child, name) for child in value.children())


def _by_position(direction: Sum, documents: Sequence[Sum]) -> Sum:
    """The distance of query and key, in the place of that of their positions inside one document.

    Where a document is counted by the places at which positions do not go up by one, positions inside it
    are as far apart as their tokens.
    """
    items = dict(direction.items)
    if len(items) != 2 or {abs(factor) for factor in items.values()} != {1} or direction.const != 0:
        return direction
    for term, factor in items.items():
        if factor == 1 and term.indices & {"i", "j"} == {"i"}:
            here = of_term(term)
            other = substitute(here, {"i": _INDEX_J})
            if plus(here, other, -1) == direction and any(_counts_jumps(d, here) for d in documents):  # type: ignore[arg-type]
                return plus(_INDEX_I, _INDEX_J, -1)
    return direction


def _counts_jumps(document: Sum, position: Sum) -> bool:
    """Whether a count of jumps tells documents apart: between equal counts, positions go up by one."""
    for term in document.items:
        if term.kind != "count" or term.low != 0:
            continue
        variable = of_term(Term("index", term.key, low=0))
        later = substitute(position, {"i": variable})
        before = substitute(position, {"i": plus(variable, number(-1))})
        assert isinstance(later, Sum) and isinstance(before, Sum)
        if len(document.items) == 2 and _no_count_unless(term, plus(later, before, -1), variable):
            return True
    return False


def _no_count_unless(count: Term, step: Sum, variable: Sum) -> bool:
    """Wherever nothing is counted, past the first token, the step is one."""
    counted = as_formula(count.args[0])
    first = compare("le", variable, number(0))
    table = truth_table(either([counted, first, compare("eq", step, number(1))]))
    return table is not None and bool(table[1].all())
