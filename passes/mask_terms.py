"""The table of operators that make masks: what an entry of the result is, from the entries of the arguments.

To teach the matcher an operator, add a row: its overloads, and a function from the reader, the node and the
indices to an expression (`terms.py`). Rows that look entries up elsewhere are in `lookups.py`, operators that
only move entries in `moves.py`. A row raises UnreadableError for a use that it cannot follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .algebra import (
    as_formula,
    as_number,
    both,
    bounds,
    choose,
    compare,
    either,
    exclusive,
    floored,
    is_whole,
    mapped,
    negated,
    plus,
    select,
    times,
)
from .axes import CASTS, overloads
from .entries import Reader, Row
from .evaluate import constant as constant_value
from .lookups import LOOKUPS
from .moves import At, argument
from .terms import Formula, Numeric, Sum, Term, UnreadableError, Value, constant, of_term

NARROW = {torch.int8: 2**7, torch.int16: 2**15, torch.uint8: 2**8}
"""Integers that positions outgrow."""
COARSE = (torch.float16, torch.bfloat16)
"""Floating point in which positions are rounded."""


def _pointwise(function: Callable[..., Value], count: int) -> Row:
    """A function of the numbers that stand at the same place in the first `count` arguments."""

    def row(reader: Reader, node: Node, at: At) -> Value:
        return function(*(reader.number(argument, at) for argument in node.args[:count]))

    return row


def _case_by_case(function: Callable[..., Value], count: int) -> Row:
    return _pointwise(lambda *values: mapped(function, *values), count)


def _logical(function: Callable[..., Value], bitwise: bool = True) -> Row:
    """A function of truth values; on integers, `bitwise` operators mean something else."""

    def row(reader: Reader, node: Node, at: At) -> Value:
        values = [reader.operand(a, at) for a in node.args[: 1 if function is negated else 2]]
        if bitwise and node.meta["val"].dtype != torch.bool:
            raise UnreadableError("bits of integers")
        return function(*map(as_formula, values))

    return row


def _comparison(how: str) -> Row:
    return _pointwise(lambda left, right: compare(how, left, right), 2)


def _sum(sign: int, reverse: bool = False) -> Row:
    def row(reader: Reader, node: Node, at: At) -> Value:
        left, right = (reader.number(a, at) for a in node.args[:2])
        alpha = argument(node, 2, "alpha", 1)
        if not isinstance(alpha, int | float):
            raise UnreadableError("alpha is no number")
        left, right = (right, left) if reverse else (left, right)
        return mapped(lambda a, b: plus(a, b, sign * Fraction(alpha)), left, right)

    return row


def _product(left: Sum, right: Sum) -> Sum:
    for one, other in ((left, right), (right, left)):
        if not one.items:
            return times(other, one.const)
    whole = is_whole(left) and is_whole(right)
    first, second = sorted((left, right), key=lambda value: value.text)
    return of_term(Term("product", "", (first, second), integer=whole))


def _divide(reader: Reader, node: Node, at: At) -> Value:
    value, divisor = (reader.number(a, at) for a in node.args[:2])
    mode = argument(node, 2, "rounding_mode")
    return mapped(lambda a, b: _quotient(a, b, mode), value, divisor)


def _quotient(value: Sum, divisor: Sum, mode: str | None) -> Sum:
    if divisor.items:
        low, high = bounds(plus(divisor, value, -1))[0], bounds(value)[0]
        if mode is not None and is_whole(value) and low > 0 and high >= 0:
            return constant(0)
        raise UnreadableError("a division by what is no number")
    by = divisor.const
    if by == 0 or math.isinf(by) or math.isnan(by):
        raise UnreadableError("a division by zero or infinity")
    if mode is None:
        exact = not value.items or not is_whole(value) or Fraction(by).numerator in (1, 2, 4, 8, 16, 32, 64)
        if exact:
            return times(value, 1 / Fraction(by))
        low = 0 if bounds(value)[0] >= 0 and by > 0 else -math.inf
        return of_term(Term("ratio", str(by), (value,), low, integer=False))
    if not isinstance(by, int) or (mode == "trunc" and (bounds(value)[0] < 0 or by < 0)):
        raise UnreadableError("a rounded division of what may be negative")
    return floored(value, by)


def _rounded_down(value: Sum, toward_zero: bool = False) -> Sum:
    """floor, or the integer part, of a sum that is a whole number over another."""
    if is_whole(value) or not value.items:
        return value if value.items else constant((math.trunc if toward_zero else math.floor)(value.const))
    if toward_zero and bounds(value)[0] < 0:
        raise UnreadableError("the integer part of what may be negative")
    (term, factor), *more = value.items.items()
    if term.kind == "ratio" and not more and factor == 1 and value.const == 0:
        (inner,) = term.args
        assert isinstance(inner, Sum)
        by = Fraction(term.key)
        if by.denominator != 1 or (toward_zero and bounds(inner)[0] < 0):
            raise UnreadableError("a division that cannot be followed")
        return floored(inner, int(by))
    scale = math.lcm(*(Fraction(n).denominator for n in [value.const, *value.items.values()]))
    return floored(times(value, scale), scale)


def _remainder(sign_of_divisor: bool) -> Row:
    def of(value: Sum, divisor: Sum) -> Sum:
        by = divisor.const
        if divisor.items or not isinstance(by, int) or by <= 0:
            raise UnreadableError("a remainder by what is no positive number")
        if not sign_of_divisor and bounds(value)[0] < 0:
            raise UnreadableError("a remainder of what may be negative")
        return plus(value, floored(value, by), -by)

    return _case_by_case(of, 2)


def _least(left: Numeric, right: Numeric) -> Numeric:
    return choose(compare("le", left, right), left, right)


def _greatest(left: Numeric, right: Numeric) -> Numeric:
    return choose(compare("le", left, right), right, left)


def _size_of_number(value: Numeric) -> Numeric:
    return choose(compare("le", constant(0), value), value, _negative(value))


def _negative(value: Numeric) -> Numeric:
    return as_number(mapped(lambda one: times(one, -1), value))


def _clamp(low: int | None, high: int | None) -> Row:
    """Positions of the two limits among the arguments."""

    def row(reader: Reader, node: Node, at: At) -> Value:
        value = reader.number(node.args[0], at)
        for position, name, limit in ((low, "min", _greatest), (high, "max", _least)):
            bound = argument(node, position, name) if position is not None else None
            value = value if bound is None else limit(value, reader.number(bound, at))
        return value

    return row


def _cast(reader: Reader, node: Node, at: At) -> Value:
    source = node.args[0]
    assert isinstance(source, Node)
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    value = reader.entry(source, at)
    if isinstance(value, Formula) or before == after:
        return value
    if after == torch.bool:
        return as_formula(value)
    return mapped(lambda one: _converted(one, before, after), value)


def _converted(value: Sum, before: torch.dtype, after: torch.dtype) -> Sum:
    if not value.items:
        finite = math.isfinite(value.const)
        if not finite and not after.is_floating_point:
            raise UnreadableError("infinity as an integer")
        kept = float(value.const) if before.is_floating_point else int(value.const)
        source = torch.tensor(kept, dtype=before)
        return constant(source.to(after).item())
    if after in NARROW:
        low, high = bounds(value)
        if low < (0 if after is torch.uint8 else -NARROW[after]) or high >= NARROW[after]:
            raise UnreadableError("positions in an integer that is too small for them")
    if after in COARSE and value.indices:
        if any(term.kind != "read" for term in value.items) or len(value.items) > 1:
            return of_term(Term("rounded", str(after), (value,), integer=False))
    if before.is_floating_point and not after.is_floating_point:
        return _rounded_down(value, toward_zero=True)
    return value


def _where(condition: int, then: int, other: int) -> Row:
    def row(reader: Reader, node: Node, at: At) -> Value:
        chosen = [reader.operand(node.args[i], at) for i in (condition, then, other)]
        return select(as_formula(chosen[0]), chosen[1], chosen[2])

    return row


def _filled(position: int | None, value: int = 0) -> Row:
    def row(reader: Reader, node: Node, at: At) -> Value:
        filler = value if position is None else argument(node, position, "fill_value")
        return reader.operand(filler, ())

    return row


def _is_in(reader: Reader, node: Node, at: At) -> Value:
    elements, tests = node.args[:2]
    inverted = argument(node, 3, "invert", False)
    value = reader.number(elements, at)
    if isinstance(tests, Node):
        known = constant_value(tests)
        if known is None or known.numel() > 64:
            raise UnreadableError("membership in a set that is no constant")
        wanted: Sequence[Any] = known.flatten().tolist()
    else:
        wanted = [tests]
    found = either(compare("eq", value, constant(one)) for one in wanted)
    return negated(found) if inverted else found


def _of_constants(function: Callable[[Tensor], Tensor]) -> Row:
    """A real function, followed on constants only: what it makes of them is a constant."""

    def of(value: Sum) -> Sum:
        if value.items:
            raise UnreadableError("a function of what is no constant")
        return constant(function(torch.tensor(float(value.const), dtype=torch.float64)).item())

    return _case_by_case(of, 1)


def _both(names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in names.split() for kind in ("Tensor", "Scalar"))


_ROWS: list[tuple[Row, tuple[str, ...]]] = [
    (_filled(1), ("full.default", "full_like.default")),
    (_filled(2), ("new_full.default",)),
    (_filled(0), ("scalar_tensor.default",)),
    (_filled(None, 1), ("ones.default", "ones_like.default", "new_ones.default")),
    (_filled(None, 0), ("zeros.default", "zeros_like.default", "new_zeros.default")),
    (_pointwise(lambda value: value, 1), ("float.default",)),
    (_sum(1), ("add.Tensor", "add.Scalar")),
    (_sum(-1), ("sub.Tensor", "sub.Scalar", "subtract.Tensor", "subtract.Scalar")),
    (_sum(-1, reverse=True), ("rsub.Scalar", "rsub.Tensor")),
    (_case_by_case(_product, 2), ("mul.Tensor", "mul.Scalar", "multiply.Tensor", "multiply.Scalar")),
    (
        _divide,
        (
            "div.Tensor",
            "div.Scalar",
            "div.Tensor_mode",
            "div.Scalar_mode",
            "divide.Tensor",
            "true_divide.Tensor",
        ),
    ),
    (
        _case_by_case(lambda a, b: _quotient(a, b, "floor"), 2),
        ("floor_divide.default", "floor_divide.Scalar"),
    ),
    (_case_by_case(_rounded_down, 1), ("floor.default",)),
    (_case_by_case(lambda value: _rounded_down(value, True), 1), ("trunc.default",)),
    (_remainder(True), _both("remainder")),
    (_remainder(False), _both("fmod")),
    (_case_by_case(lambda value: times(value, -1), 1), ("neg.default", "negative.default")),
    (_pointwise(_size_of_number, 1), ("abs.default", "absolute.default")),
    (_pointwise(_least, 2), ("minimum.default", "min.other")),
    (_pointwise(_greatest, 2), ("maximum.default", "max.other")),
    (_clamp(1, 2), ("clamp.default", "clamp.Tensor", "clip.default")),
    (_clamp(1, None), ("clamp_min.default", "clamp_min.Tensor")),
    (_clamp(None, 1), ("clamp_max.default", "clamp_max.Tensor")),
    (_comparison("eq"), _both("eq")),
    (_comparison("ne"), _both("ne not_equal")),
    (_comparison("lt"), _both("lt less")),
    (_comparison("le"), _both("le less_equal")),
    (_comparison("gt"), _both("gt greater")),
    (_comparison("ge"), _both("ge greater_equal")),
    (_is_in, ("isin.Tensor_Tensor", "isin.Tensor_Scalar")),
    (_logical(lambda a, b: both([a, b])), _both("bitwise_and __and__")),
    (_logical(lambda a, b: either([a, b])), _both("bitwise_or __or__")),
    (_logical(exclusive), _both("bitwise_xor __xor__")),
    (_logical(negated), ("bitwise_not.default",)),
    (_logical(lambda a, b: both([a, b]), False), ("logical_and.default",)),
    (_logical(lambda a, b: either([a, b]), False), ("logical_or.default",)),
    (_logical(exclusive, False), ("logical_xor.default",)),
    (_logical(negated, False), ("logical_not.default",)),
    (_where(0, 1, 2), ("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")),
    (_where(1, 2, 0), ("masked_fill.Scalar", "masked_fill.Tensor")),
    (_of_constants(torch.log), ("log.default",)),
    (_of_constants(torch.exp), ("exp.default",)),
]

VALUES: dict[Any, Row] = {
    **LOOKUPS,
    **{target: row for row, names in _ROWS for target in overloads(*names)},
    **dict.fromkeys(CASTS, _cast),
}
"""Operators that compute entries. Casts may round, so they are rows as well."""
