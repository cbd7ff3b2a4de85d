"""Rows of the table for operators that look entries up elsewhere: by index, by place, or along an axis."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from .algebra import (
    as_formula,
    as_number,
    both,
    choose,
    compare,
    index,
    is_whole,
    mapped,
    plus,
    select,
    substitute,
    times,
)
from .axes import overloads
from .entries import Reader, Row
from .moves import At, argument, axis_of, only_sum, shape, size_of, size_sum
from .tables import in_range
from .terms import Formula, Numeric, Sum, Term, UnreadableError, Value, constant, of_term

aten = torch.ops.aten

_TOO_SMALL = (torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.uint8)
"""Dtypes in which positions are rounded or wrap around."""


def _triangle(lower: bool) -> Row:
    def row(reader: Reader, node: Node, at: At) -> Value:
        diagonal = size_of(argument(node, 1, "diagonal", 0))
        limit = mapped(lambda row: plus(row, diagonal), at[-2])
        assert not isinstance(limit, Formula)
        kept = compare("le" if lower else "ge", at[-1], limit)
        value = reader.operand(node.args[0], at)
        if isinstance(value, Formula):
            return both([kept, value])
        return choose(kept, value, constant(0))

    return row


def _arange(reader: Reader, node: Node, at: At) -> Value:
    if node.meta["val"].dtype in _TOO_SMALL:
        raise UnreadableError("positions in a dtype that is too small for them")
    start = 0 if node.target is aten.arange.default else node.args[0]
    step: Any = node.args[2] if len(node.args) > 2 else 1
    if not isinstance(step, int):
        raise UnreadableError("a fractional step")
    return mapped(lambda first, place: plus(first, place, step), reader.number(start, ()), at[0])


def _cumulative(reader: Reader, node: Node, at: At) -> Value:
    axis = axis_of(node, 1, len(at))
    place, variable = only_sum(at[axis]), reader.fresh()
    body = reader.number(node.args[0], (*at[:axis], of_term(variable), *at[axis + 1 :]))
    if isinstance(body, Sum) and not body.items:
        return times(plus(place, constant(1)), body.const)
    steps = [body] if isinstance(body, Sum) else _leaves(body)
    whole = all(is_whole(step) for step in steps)
    grows = all(not step.items and step.const >= 0 for step in steps)
    if not any(term.kind == "count" for term in body.terms):
        # Two counts of the same are equal: their variable is called alike.
        body = as_number(substitute(body, {variable.key: of_term(index("t"))}))
        variable = index("t")
    low = 0 if grows else -math.inf
    return of_term(Term("count", variable.key, (body, place), low, integer=whole))


def _leaves(value: Numeric) -> list[Sum]:
    return [value] if isinstance(value, Sum) else [*_leaves(value.then), *_leaves(value.other)]


def _difference(reader: Reader, node: Node, at: At) -> Value:
    source, prepended = node.args[0], argument(node, 3, "prepend")
    axis = axis_of(node, 2, len(at), default=-1)
    assert isinstance(source, Node)
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None:
        raise UnreadableError("a difference of a higher order")

    def shifted(by: int) -> At:
        return (*at[:axis], plus(only_sum(at[axis]), constant(by)), *at[axis + 1 :])

    if prepended is None:
        later, earlier = reader.number(source, shifted(1)), reader.number(source, at)
    else:
        if not isinstance(prepended, Node) or shape(prepended)[axis] != 1:
            raise UnreadableError("more than one entry before a difference")
        before = as_number(reader.entry(prepended, (*at[:axis], constant(0), *at[axis + 1 :])))
        first = compare("le", at[axis], constant(0))
        later = reader.number(source, at)
        earlier = choose(first, before, as_number(reader.entry(source, shifted(-1))))
    return mapped(lambda a, b: plus(a, b, -1), later, earlier)


def _index(reader: Reader, node: Node, at: At) -> Value:
    source, places = node.args[:2]
    assert isinstance(source, Node) and isinstance(places, list | tuple)
    given = [i for i, place in enumerate(places) if place is not None]
    rank = len(at) - (len(shape(source)) - len(given))
    if not given or given != list(range(given[0], given[-1] + 1)):
        raise UnreadableError("indices with a gap between them")
    first = given[0]
    inner, after = at[first : first + rank], at[first + rank :]
    found: list[Numeric] = []
    for axis in given:
        place = places[axis]
        if not isinstance(place, Node) or place.meta["val"].dtype == torch.bool:
            raise UnreadableError("a selection of entries that are True")
        found.append(_wrapped(reader, source, axis, reader.number(place, inner)))
    return _at_cases(reader, source, (*at[:first], *found, *after))


def _wrapped(reader: Reader, source: Node, axis: int, place: Numeric) -> Numeric:
    size = shape(source)[axis]
    if size == 1:
        return constant(0)
    return as_number(mapped(lambda one: in_range(one, size_sum(size)), place))


def _at_cases(reader: Reader, source: Node, at: At) -> Value:
    """The entry at indices that have cases: the case of the index is the case of the entry."""
    return mapped(lambda *places: reader.entry(source, places), *at)


def _index_select(reader: Reader, node: Node, at: At) -> Value:
    source, place = node.args[0], node.args[2]
    assert isinstance(source, Node)
    axis = axis_of(node, 1, len(at))
    chosen = reader.number(place, (at[axis],))
    return _at_cases(reader, source, (*at[:axis], chosen, *at[axis + 1 :]))


def _gather(reader: Reader, node: Node, at: At) -> Value:
    source, place = node.args[0], node.args[2]
    assert isinstance(source, Node)
    axis = axis_of(node, 1, len(at))
    return _at_cases(reader, source, (*at[:axis], reader.number(place, at), *at[axis + 1 :]))


def _embedding(reader: Reader, node: Node, at: At) -> Value:
    weight, places = node.args[:2]
    assert isinstance(weight, Node)
    return _at_cases(reader, weight, (reader.number(places, at[:-1]), at[-1]))


def _cat(reader: Reader, node: Node, at: At) -> Value:
    tensors: Any = node.args[0]
    axis = axis_of(node, 1, len(at))
    place = only_sum(at[axis])
    *others, last = tensors
    starts = [constant(0)]
    for tensor in others:
        starts.append(plus(starts[-1], size_sum(shape(tensor)[axis])))

    def part(tensor: Node, start: Sum) -> Value:
        own = constant(0) if shape(tensor)[axis] == 1 else plus(place, start, -1)
        return reader.entry(tensor, (*at[:axis], own, *at[axis + 1 :]))

    result = part(last, starts[-1])
    for tensor, start, end in reversed(list(zip(others, starts, starts[1:], strict=False))):
        result = select(compare("lt", place, end), part(tensor, start), result)
    return result


def _pad(reader: Reader, node: Node, at: At) -> Value:
    source, pads = node.args[:2]
    assert isinstance(source, Node) and isinstance(pads, list | tuple)
    if argument(node, 2, "mode", "constant") != "constant" or not all(isinstance(n, int) for n in pads):
        raise UnreadableError("padding that repeats entries")
    filler = argument(node, 3 if node.target is aten.pad.default else 2, "value") or 0
    before, inside = list(at), []
    for back, first in enumerate(pads[::2]):
        axis = len(at) - 1 - back
        moved = plus(only_sum(at[axis]), constant(-first))
        size = size_sum(shape(source)[axis])
        inside += [compare("le", constant(0), moved), compare("lt", moved, size)]
        before[axis] = moved
    return select(both(inside), reader.entry(source, tuple(before)), _like(filler, node))


def _like(value: Any, node: Node) -> Value:
    number = constant(value)
    return as_formula(number) if node.meta["val"].dtype == torch.bool else number


def _roll(reader: Reader, node: Node, at: At) -> Value:
    source, shifts, dims = node.args[0], node.args[1], argument(node, 2, "dims", [])
    assert isinstance(source, Node)
    shift, dim = (x[0] if isinstance(x, list | tuple) and len(x) == 1 else x for x in (shifts, dims))
    if not isinstance(shift, int) or not isinstance(dim, int) or shift == 0:
        raise UnreadableError("a roll that cannot be followed")
    axis = dim % len(at)
    place, size = only_sum(at[axis]), size_sum(shape(source)[axis])
    edge = constant(shift) if shift > 0 else plus(size, constant(shift))

    def part(by: Sum) -> Value:
        return reader.entry(source, (*at[:axis], plus(place, by), *at[axis + 1 :]))

    high = part(constant(-shift)) if shift > 0 else part(plus(constant(-shift), size, -1))
    low = part(plus(size, constant(-shift))) if shift > 0 else part(constant(-shift))
    return select(compare("le", edge, place), high, low)


def _item(reader: Reader, node: Node, at: At) -> Value:
    source, place = node.args[:2]
    assert isinstance(source, Node) and isinstance(place, int)
    if source.target is not aten.unbind.int:
        raise UnreadableError("one of several results")
    tensor = source.args[0]
    assert isinstance(tensor, Node)
    axis = axis_of(source, 1, len(at) + 1)
    return reader.entry(tensor, (*at[:axis], constant(place), *at[axis:]))


def _stack(reader: Reader, node: Node, at: At) -> Value:
    tensors: Any = node.args[0]
    axis = axis_of(node, 1, len(at))
    rest = (*at[:axis], *at[axis + 1 :])
    result = reader.entry(tensors[-1], rest)
    for place, tensor in reversed(list(enumerate(tensors[:-1]))):
        result = select(compare("eq", at[axis], constant(place)), reader.entry(tensor, rest), result)
    return result


_ROWS: list[tuple[Row, tuple[str, ...]]] = [
    (_arange, ("arange.default", "arange.start", "arange.start_step")),
    (_triangle(True), ("tril.default",)),
    (_triangle(False), ("triu.default",)),
    (_cumulative, ("cumsum.default",)),
    (_difference, ("diff.default",)),
    (_index, ("index.Tensor",)),
    (_index_select, ("index_select.default",)),
    (_gather, ("gather.default",)),
    (_embedding, ("embedding.default",)),
    (_cat, ("cat.default", "concat.default")),
    (_stack, ("stack.default",)),
    (_pad, ("constant_pad_nd.default", "pad.default")),
    (_roll, ("roll.default",)),
]

LOOKUPS: dict[Any, Row] = {
    **{target: row for row, names in _ROWS for target in overloads(*names)},
    operator.getitem: _item,
}
"""Operators that look entries up elsewhere."""
