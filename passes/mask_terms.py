"""The table of operators that make masks: the entry of a result from the entries of its arguments.

`Reader.entry(node, at)` is the entry of a node at indices, as an expression. What has no row here, or is used
in a way that a row cannot follow, is a term of its own: an entry of that node, of which only its indices and
the inputs behind it are known. To teach the reader an operator, add a row to `VALUES` (or to `MOVES`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

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
    index,
    is_whole,
    mapped,
    member,
    negated,
    plus,
    select,
    substitute,
    times,
)
from .axes import CASTS, overloads
from .evaluate import constant as constant_value
from .evaluate import is_size, value_leaves
from .graphs import aliased, attribute, written_arguments
from .intervals import only
from .moves import MOVES, At, argument, axis_of, broadcast, only_sum, shape, size_of, size_sum
from .tables import in_range, read_table
from .terms import Formula, Numeric, Sum, Term, UnreadableError, Value, constant, of_term

aten = torch.ops.aten
Row = Callable[["Reader", Node, At], Value]

NARROW = {torch.int8: 2**7, torch.int16: 2**15, torch.uint8: 2**8}
"""Integers that positions outgrow."""
COARSE = (torch.float16, torch.bfloat16)
"""Floating point in which positions are rounded."""


class Reader:
    """Reads entries of the nodes of one graph."""

    def __init__(self, graph: Graph) -> None:
        self._known: dict[tuple[Node, tuple[str, ...]], Value] = {}
        self._names: dict[Any, int] = {}
        self._name_of: dict[Node, int] = {}
        self._leaves: dict[Node, tuple[tuple[str, ...], bool]] = {}
        self._bound = 0
        writers = (node for node in graph.nodes if node.target not in MOVES)  # detach_ writes nothing
        self.written = {_root(target) for node in writers for target in written_arguments(node)}

    def entry(self, node: Node, at: At) -> Value:
        """The entry of a tensor at indices."""
        key = (node, tuple(place.text for place in at))
        if key not in self._known:
            self._known[key] = self._read(node, at)
        return self._known[key]

    def operand(self, argument: Any, at: At) -> Value:
        """The entry of an argument that is broadcast to a result with entry `at`; numbers are themselves."""
        if isinstance(argument, Node) and not is_size(argument):
            return self.entry(argument, broadcast(argument, at))
        if isinstance(argument, Node | torch.SymInt):
            return size_of(argument)
        if isinstance(argument, bool | int | float):
            return constant(argument)
        raise UnreadableError(f"an argument {argument!r}")

    def number(self, argument: Any, at: At) -> Numeric:
        return as_number(self.operand(argument, at))

    def fresh(self) -> Term:
        """A variable that a term binds."""
        self._bound += 1
        return index(f"t{self._bound}")

    def _read(self, node: Node, at: At) -> Value:
        try:
            if node.op in ("placeholder", "get_attr"):
                return _fitting(self._leaf(node, at), node)
            if _root(node) in self.written:
                raise UnreadableError("it is written in place")
            if node.target in MOVES:
                return self.entry(*MOVES[node.target](node, at))
            if node.target in VALUES:
                return _fitting(VALUES[node.target](self, node, at), node)
            value = constant_value(node)
            if value is not None:
                return _fitting(read_table(value, at), node)
        except UnreadableError:
            pass
        return self._opaque(node, at)

    def _leaf(self, node: Node, at: At) -> Value:
        value = attribute(node) if node.op == "get_attr" else known_value(node)
        parameter = isinstance(value, torch.nn.Parameter) and value.requires_grad
        if not isinstance(value, Tensor) or parameter or node in self.written:
            return self._opaque(node, at)
        return read_table(value, at)

    def _opaque(self, node: Node, at: At) -> Value:
        """The entry as a term of its own."""
        dtype = node.meta["val"].dtype
        names, learned = self._leaves_of(node)
        whole = not dtype.is_floating_point and not dtype.is_complex
        low, high = (0, 1) if dtype == torch.bool else (-math.inf, math.inf)
        key = f"{node.name if node.op == 'placeholder' else ''}#{self._name(node)}"
        term = Term("read", key, at, low, high, whole, node, names, learned)
        return member(of_term(term), only(1)) if dtype == torch.bool else of_term(term)

    def _leaves_of(self, node: Node) -> tuple[tuple[str, ...], bool]:
        if node not in self._leaves:
            leaves = value_leaves(node)
            inputs = [leaf for leaf in leaves if leaf.op == "placeholder" and known_value(leaf) is None]
            names = tuple(sorted({str(leaf.target) for leaf in inputs}))
            values = [attribute(n) if n.op == "get_attr" else known_value(n) for n in leaves]
            self._leaves[node] = names, any(isinstance(value, torch.nn.Parameter) for value in values)
        return self._leaves[node]

    def _name(self, node: Node) -> int:
        """A number that two nodes share when they compute the same from the same."""
        if node not in self._name_of:
            if node.op != "call_function" or _root(node) in self.written:
                key: Any = node
            elif is_size(node):
                key = str(node.meta["val"])
            else:
                arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: f"#{self._name(n)}")
                key = (node.target, repr(arguments))
            self._name_of[node] = self._names.setdefault(key, len(self._names))
        return self._name_of[node]


def known_value(placeholder: Node) -> Tensor | None:
    """The tensor a lifted parameter or buffer holds (dynamo passes them as inputs)."""
    leaf = placeholder.meta.get("leaf")
    return None if leaf is None or leaf.kind == "input" else leaf.value


def _root(node: Node) -> Node:
    """The tensor whose memory a node may share."""
    while True:
        source = node.args[0] if node.target in MOVES else aliased(node)
        if not isinstance(source, Node):
            return node
        node = source


def _fitting(value: Value, node: Node) -> Value:
    """A formula where the node is bool, a number elsewhere."""
    return as_formula(value) if node.meta["val"].dtype == torch.bool else as_number(value)


# --- rows ---------------------------------------------------------------------------------------------------


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
        return of_term(Term("ratio", str(by), (value,), integer=False))
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
        kept = value.const if abs(value.const) < 2**53 or not finite else float(value.const)
        source = torch.tensor(float(kept) if before.is_floating_point else int(kept), dtype=before)
        return constant(source.to(after).item())
    if after in NARROW:
        low, high = bounds(value)
        if low < (0 if after is torch.uint8 else -NARROW[after]) or high >= NARROW[after]:
            raise UnreadableError("positions in an integer that is too small for them")
    if after in COARSE and value.indices:
        if any(term.kind != "read" for term in value.items) or len(value.items) > 1:
            raise UnreadableError("positions in half precision, which rounds them")
    if before.is_floating_point and not after.is_floating_point:
        return _rounded_down(value, toward_zero=True)
    return value


def _where(condition: int, then: int, other: int) -> Row:
    def row(reader: Reader, node: Node, at: At) -> Value:
        chosen = [reader.operand(node.args[i], at) for i in (condition, then, other)]
        return select(as_formula(chosen[0]), chosen[1], chosen[2])

    return row


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


def _filled(position: int | None, value: int = 0) -> Row:
    def row(reader: Reader, node: Node, at: At) -> Value:
        filler = value if position is None else argument(node, position, "fill_value")
        return reader.operand(filler, ())

    return row


def _arange(reader: Reader, node: Node, at: At) -> Value:
    if node.meta["val"].dtype in (*COARSE, *NARROW):
        raise UnreadableError("positions in a dtype that is too small for them")
    start, step = (0, 1) if node.target is aten.arange.default else (node.args[0], 1)
    step = node.args[2] if len(node.args) > 2 else step
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
    tensors = node.args[0]
    assert isinstance(tensors, list | tuple)
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
    tensors = node.args[0]
    assert isinstance(tensors, list | tuple)
    axis = axis_of(node, 1, len(at))
    rest = (*at[:axis], *at[axis + 1 :])
    result = reader.entry(tensors[-1], rest)
    for place, tensor in reversed(list(enumerate(tensors[:-1]))):
        result = select(compare("eq", at[axis], constant(place)), reader.entry(tensor, rest), result)
    return result


def _both(names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{kind}" for name in names.split() for kind in ("Tensor", "Scalar"))


_ROWS: list[tuple[Row, tuple[str, ...]]] = [
    (_arange, ("arange.default", "arange.start", "arange.start_step")),
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
    (_of_constants(torch.log), ("log.default",)),
    (_of_constants(torch.exp), ("exp.default",)),
]

VALUES: dict[Any, Row] = {
    **{target: row for row, names in _ROWS for target in overloads(*names)},
    **dict.fromkeys(CASTS, _cast),
    operator.getitem: _item,
}
"""Operators that compute entries. Casts may round, so they are rows as well."""
