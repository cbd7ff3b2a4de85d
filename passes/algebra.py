"""Arithmetic and logic on the expressions of `terms.py`, exact over the integers.

Every function gives its result in a normal form, so that most spellings of one thing come out as one text:
comparisons as `Member`, negations pushed down to them, choices outside of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

from .intervals import ALL, NONE, Bound, Integers, only, up_to
from .terms import (
    FALSE,
    TRUE,
    Both,
    Choice,
    Either,
    Formula,
    Member,
    Number,
    Numeric,
    Sum,
    Term,
    Truth,
    UnreadableError,
    Value,
    constant,
    number,
    of_term,
)

MOST_CASES = 64
"""A value of more cases than this is not followed."""

MOST_PAIRS = 48
"""Values whose cases make more combinations than this are not put together."""

LONGEST = 2**24
"""Positions stay below this: float32 holds every integer up to here."""

# --- sums ---------------------------------------------------------------------------------------------------


def plus(left: Sum, right: Sum, times: Number = 1) -> Sum:
    """`left + times * right`."""
    items = dict(left.items)
    for term, factor in right.items.items():
        total = number(items.pop(term, 0) + times * factor)
        if total != 0:
            items[term] = total
    return Sum(items, number(left.const + times * right.const))


def times(value: Sum, factor: Number) -> Sum:
    if not value.items or factor == 0:
        return constant(value.const * factor)
    if math.isinf(factor) or math.isnan(factor):
        raise UnreadableError("an entry is multiplied by infinity")
    return plus(constant(0), value, factor)


def bounds(value: Sum) -> tuple[Bound, Bound]:
    """Numbers between which the value always lies; sizes cancel where they can."""
    return -_highest(times(value, -1)), _highest(value)


def _highest(value: Sum) -> Bound:
    for term, factor in list(value.items.items()):
        if isinstance(term.high, Sum) and factor > 0:
            with_size = plus(plus(value, of_term(term), -factor), term.high, factor)
            longest = plus(plus(value, of_term(term), -factor), constant(LONGEST), factor)
            return min(_highest(with_size), _highest(longest))
    total: Number = value.const
    for term, factor in value.items.items():
        limit = term.high if factor > 0 else term.low
        assert not isinstance(limit, Sum)
        total += factor * limit
    if math.isinf(total) or math.isnan(total):
        return -math.inf if total == -math.inf else math.inf
    return math.floor(total)


def is_whole(value: Sum) -> bool:
    """An integer for certain: whole terms, whole factors."""
    numbers = [value.const, *value.items.values()]
    return all(term.integer for term in value.items) and all(isinstance(n, int) for n in numbers)


def floored(value: Sum, divisor: int) -> Sum:
    """`value / divisor` rounded down; what is a multiple of the divisor is taken out."""
    if divisor < 0:
        return floored(times(value, -1), -divisor)
    if divisor == 0 or not is_whole(value):
        raise UnreadableError("a division that cannot be followed")
    whole = {term: int(factor) // divisor for term, factor in value.items.items() if factor % divisor == 0}
    rest = Sum({t: f for t, f in value.items.items() if t not in whole}, int(value.const) % divisor)
    outside = Sum(whole, int(value.const) // divisor)
    low, high = bounds(rest)
    if low >= 0 and high < divisor:
        return outside
    if not rest.items:
        return outside
    term = Term("floor", str(divisor), (rest,), _floor(low, divisor), _floor(high, divisor))
    return plus(outside, of_term(term))


def _floor(bound: Bound, divisor: int) -> Bound:
    return bound if math.isinf(bound) else bound // divisor


# --- formulas -----------------------------------------------------------------------------------------------


def member(value: Sum, allowed: Integers) -> Formula:
    """Whether a whole number lies in a set."""
    low, high = bounds(value)
    possible = Integers(((low, high),)) if low <= high else NONE
    if allowed.holds(possible):
        return TRUE
    if not allowed & possible:
        return FALSE
    assert isinstance(value.const, int)
    factors = [int(factor) for factor in value.items.values()]
    common = math.gcd(*factors)
    first = min(value.items, key=lambda term: (term.text != "i", term.text))
    sign = 1 if value.items[first] > 0 else -1
    allowed = allowed.shifted(-value.const).divided(common)
    direction = Sum({term: sign * int(factor) // common for term, factor in value.items.items()})
    if len(direction.items) == 1 and first.kind == "product":
        return _product_member(first, allowed if sign > 0 else allowed.negated(), direction)
    return Member(direction, allowed if sign > 0 else allowed.negated())


def _product_member(product: Term, allowed: Integers, direction: Sum) -> Formula:
    """A product is zero where a factor is; nothing else is known of it."""
    if allowed not in (only(0), ~only(0)):
        return Member(direction, allowed)
    zero = either(equal_zero(factor) for factor in product.args if not isinstance(factor, Formula))
    return zero if 0 in allowed else negated(zero)


def negated(formula: Formula) -> Formula:
    if isinstance(formula, Truth):
        return FALSE if formula.value else TRUE
    if isinstance(formula, Member):
        return member(formula.direction, ~formula.allowed)
    assert isinstance(formula, Both | Either)
    return (either if isinstance(formula, Both) else both)(negated(part) for part in formula.parts)


def both(parts: Iterable[Formula]) -> Formula:
    return _joined(parts, Both, TRUE, FALSE, ALL)


def either(parts: Iterable[Formula]) -> Formula:
    return _joined(parts, Either, FALSE, TRUE, NONE)


def _joined(
    parts: Iterable[Formula], kind: type[Both | Either], neutral: Truth, final: Truth, start: Integers
) -> Formula:
    """Parts that speak of one direction become one."""
    flat: dict[Formula, None] = {}
    sets: dict[Sum, Integers] = {}
    for part in parts:
        for one in part.parts if isinstance(part, kind) else (part,):
            if isinstance(one, Member):
                known = sets.get(one.direction, start)
                sets[one.direction] = known & one.allowed if kind is Both else known | one.allowed
            elif one == final:
                return final
            elif one != neutral:
                flat[one] = None
    for direction, allowed in sets.items():
        flat[member(direction, allowed)] = None
    flat.pop(neutral, None)
    if final in flat:
        return final
    if not flat:
        return neutral
    return next(iter(flat)) if len(flat) == 1 else kind(tuple(flat))


def exclusive(left: Formula, right: Formula) -> Formula:
    return either([both([left, negated(right)]), both([negated(left), right])])


# --- choices ------------------------------------------------------------------------------------------------


def choose(condition: Formula, then: Numeric, other: Numeric) -> Numeric:
    """`then` where the condition holds, `other` elsewhere."""
    if condition == TRUE or then == other:
        return then
    if condition == FALSE:
        return other
    return Choice(condition, _under(then, condition, True), _under(other, condition, False))


def _under(value: Numeric, condition: Formula, holds: bool) -> Numeric:
    """The value where it is known whether a condition holds."""
    if isinstance(value, Sum):
        return value
    if value.condition == condition:
        return _under(value.then if holds else value.other, condition, holds)
    if value.condition == negated(condition):
        return _under(value.other if holds else value.then, condition, holds)
    return choose(
        value.condition, _under(value.then, condition, holds), _under(value.other, condition, holds)
    )


def cases(value: Numeric, path: Formula = TRUE) -> list[tuple[Formula, Sum]]:
    """The sums that a value may be, each with where."""
    if isinstance(value, Sum):
        return [] if path == FALSE else [(path, value)]
    found = cases(value.then, both([path, value.condition]))
    found += cases(value.other, both([path, negated(value.condition)]))
    if len(found) > MOST_CASES:
        raise UnreadableError("too many cases")
    return found


def _count(value: Numeric) -> int:
    """How many sums a value may be."""
    return _count(value.then) + _count(value.other) if isinstance(value, Choice) else 1


def mapped(function: Callable[..., Value], *values: Numeric) -> Value:
    """The function of sums, on values with cases; it may give numbers or formulas."""
    position = next((i for i, value in enumerate(values) if isinstance(value, Choice)), None)
    if position is None:
        return function(*values)
    if math.prod(_count(value) for value in values) > MOST_PAIRS:
        raise UnreadableError("too many cases")
    split = values[position]
    assert isinstance(split, Choice)
    sides = []
    for side, holds in ((split.then, True), (split.other, False)):
        rest = [_under(value, split.condition, holds) for value in values]
        sides.append(mapped(function, *rest[:position], side, *rest[position + 1 :]))
    return select(split.condition, *sides)


def select(condition: Formula, then: Value, other: Value) -> Value:
    """`choose` for numbers, and the like for formulas."""
    if isinstance(then, Formula) and isinstance(other, Formula):
        return either([both([condition, then]), both([negated(condition), other])])
    chosen = choose(condition, as_number(then), as_number(other))
    cases(chosen)
    return chosen


def as_number(value: Value) -> Numeric:
    """True as one, False as zero."""
    return choose(value, constant(1), constant(0)) if isinstance(value, Formula) else value


def as_formula(value: Value) -> Formula:
    """Whether a number is not zero."""
    return value if isinstance(value, Formula) else negated(equal_zero(value))


# --- comparisons --------------------------------------------------------------------------------------------


def equal_zero(value: Numeric) -> Formula:
    return compare("eq", value, constant(0))


def compare(how: str, left: Numeric, right: Numeric) -> Formula:
    """`left how right` with how one of eq, ne, lt, le, gt, ge."""
    if how == "ne":
        return negated(compare("eq", left, right))
    if how in ("gt", "ge"):
        return compare("lt" if how == "gt" else "le", right, left)
    if how == "eq" and (isinstance(left, Choice) or isinstance(right, Choice)):
        by_token = _tokens(left, right)
        if by_token is not None:
            left, right = by_token
    result = mapped(lambda a, b: _compare(how, a, b), left, right)
    assert isinstance(result, Formula)
    return result


def _compare(how: str, left: Sum, right: Sum) -> Formula:
    if left == right:  # infinities subtract to nothing known
        return TRUE if how != "lt" else FALSE
    if math.isinf(left.const) or math.isinf(right.const):
        if left.items or right.items:
            smaller = left.const < 0 if math.isinf(left.const) else right.const > 0
        else:
            smaller = left.const < right.const
        return TRUE if how != "eq" and smaller else FALSE
    difference = plus(left, right, -1)
    if math.isnan(difference.const):
        raise UnreadableError("NaN is compared")
    if not difference.items:
        value = difference.const
        return TRUE if (value == 0 if how == "eq" else value < 0 if how == "lt" else value <= 0) else FALSE
    if not is_exact(difference):
        return _test(how, difference)
    scale = math.lcm(*(Fraction(factor).denominator for factor in difference.items.values()))
    whole = times(difference, scale)
    rest = Fraction(whole.const)
    terms = Sum(whole.items)
    if how == "eq":
        return member(terms, only(int(-rest))) if rest.denominator == 1 else FALSE
    limit = -rest
    highest = math.floor(limit) if how == "le" else math.ceil(limit) - 1
    return member(terms, up_to(highest))


def is_exact(value: Sum) -> bool:
    """Floating point computes it without rounding: whole terms times whole numbers or halves of halves."""
    factors = [Fraction(factor) for factor in value.items.values()]
    fine = all(f.denominator in (1, 2, 4, 8, 16) and abs(f.numerator) < LONGEST for f in factors)
    return fine and all(term.integer for term in value.items)


def _test(how: str, value: Sum) -> Formula:
    """A comparison of real numbers, as a term of its own."""
    term = Term("test", f"{how} 0", (value,), 0, 1)
    return member(of_term(term), only(1))


def _tokens(left: Numeric, right: Numeric) -> tuple[Sum, Sum] | None:
    """Both sides as wholes, where one speaks of the query's token and the other of the key's, by inputs."""
    sides = []
    for value in (left, right):
        own = value.indices & {"i", "j"}
        if len(own) != 1 or not value.inputs:
            return None
        (name,) = own
        sides.append((name, value))
    if {name for name, _ in sides} != {"i", "j"}:
        return None
    return tuple(of_term(token(value, name)) for name, value in sides)  # type: ignore[return-value]


def token(value: Numeric, name: str) -> Term:
    """A value as a function of the token at the index called `name`."""
    place = index("u")
    body = substitute(value, {name: of_term(place)})
    return Term("token", place.key, (body, of_term(index(name))), leaves=value.inputs)


def index(name: str, high: Bound | Sum = math.inf) -> Term:
    return Term("index", name, low=0, high=high)


# --- substitution -------------------------------------------------------------------------------------------


def substitute(value: Value, replaced: Mapping[str, Sum]) -> Value:
    """The expression with other sums in the place of terms, by their text (for an index its name)."""
    if not any(term.text in replaced for term in value.terms):
        return value
    if isinstance(value, Sum):
        total = constant(value.const)
        for term, factor in value.items.items():
            total = plus(total, _substituted(term, replaced), factor)
        return total
    if isinstance(value, Choice):
        parts = (substitute(part, replaced) for part in (value.condition, value.then, value.other))
        return select(*parts)  # type: ignore[arg-type]
    if isinstance(value, Member):
        inner = substitute(value.direction, replaced)
        assert isinstance(inner, Sum)
        return member(inner, value.allowed)
    if isinstance(value, Both | Either):
        formulas = [substitute(part, replaced) for part in value.parts]
        return (both if isinstance(value, Both) else either)(formulas)  # type: ignore[arg-type]
    return value


def _substituted(term: Term, replaced: Mapping[str, Sum]) -> Sum:
    if term.text in replaced:
        return replaced[term.text]
    free = {text: value for text, value in replaced.items() if text != term.bound}
    args = tuple(substitute(arg, free if n == 0 else replaced) for n, arg in enumerate(term.args))
    if term.kind == "index" and isinstance(term.high, Sum):
        high = substitute(term.high, replaced)
        assert isinstance(high, Sum)
        return of_term(index(term.key, high))
    if args == term.args:
        return of_term(term)
    if term.kind == "floor":
        (inner,) = args
        assert isinstance(inner, Sum)
        return floored(inner, int(term.key))
    return of_term(
        Term(
            term.kind,
            term.key,
            args,
            term.low,
            term.high,
            term.integer,
            term.source,
            term.leaves,
            term.learned,
        )
    )
