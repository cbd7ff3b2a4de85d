"""Operators that only move entries, as functions of indices: where an entry of the result stood before.

A row of `MOVES` gives, for the indices of the result, the tensor and the indices that it was taken from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
from torch.fx import Node

from .algebra import LONGEST, bounds, floored, is_whole, plus
from .axes import WHOLE_SLICE_END, expr, is_one, overloads, shape_of
from .terms import Numeric, Sum, Term, UnreadableError, constant, of_term

At = tuple[Numeric, ...]
Move = Callable[[Node, At], tuple[Node, At]]

ZERO = constant(0)


def size_of(value: Any) -> Sum:
    """A traced size as a sum over the size symbols."""
    if isinstance(value, Node):
        value = value.meta["val"]
    return size_sum(expr(value))


def size_sum(size: sympy.Expr) -> Sum:
    size = sympy.expand(size)
    total = constant(0)
    for part, factor in size.as_coefficients_dict().items():
        if part == 1:
            total = plus(total, constant(int(factor)))
        else:
            whole = factor.is_Integer
            total = plus(
                total, of_term(_size_term(part if whole else factor * part)), int(factor) if whole else 1
            )
    return total


def _size_term(size: sympy.Expr) -> Term:
    """A symbol, or an expression of symbols that is no sum."""
    low = 0 if size.is_Symbol or size.is_nonnegative else -math.inf
    return Term("size", str(size), low=low, high=LONGEST if size.is_Symbol else math.inf)


def shape(node: Any) -> tuple[sympy.Expr, ...]:
    found = shape_of(node) if isinstance(node, Node) else None
    if found is None:
        raise UnreadableError("a tensor was traced without a shape")
    plain = [size.is_Symbol or size.is_Integer for size in found]
    return tuple(
        size if p or not is_one(size) else sympy.Integer(1) for size, p in zip(found, plain, strict=True)
    )


def only_sum(place: Numeric) -> Sum:
    if not isinstance(place, Sum) or not is_whole(place):
        raise UnreadableError("an index with cases")
    return place


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def axis_of(node: Node, position: int, rank: int, name: str = "dim", default: int = 0) -> int:
    value = argument(node, position, name, default)
    if not isinstance(value, int):
        raise UnreadableError("an axis that is no number")
    return value % rank if rank else 0


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _same(node: Node, at: At) -> tuple[Node, At]:
    return _source(node), at


def _unsqueeze(node: Node, at: At) -> tuple[Node, At]:
    axis = axis_of(node, 1, len(at))
    return _source(node), (*at[:axis], *at[axis + 1 :])


def _swap(node: Node, at: At) -> tuple[Node, At]:
    order = list(at)
    first, second = (
        (axis_of(node, 1, len(at), "dim0"), axis_of(node, 2, len(at), "dim1"))
        if len(node.args) > 1
        else (-2, -1)
    )
    if len(at) > 1:
        order[first], order[second] = order[second], order[first]
    return _source(node), tuple(order)


def _permute(node: Node, at: At) -> tuple[Node, At]:
    dims = argument(node, 1, "dims")
    before: list[Numeric] = [ZERO] * len(at)
    for position, dim in enumerate(dims):
        before[dim % len(at)] = at[position]
    return _source(node), tuple(before)


def _movedim(node: Node, at: At) -> tuple[Node, At]:
    order = list(range(len(at)))
    start, end = axis_of(node, 1, len(at)), axis_of(node, 2, len(at))
    order.insert(end, order.pop(start))
    before: list[Numeric] = [ZERO] * len(at)
    for position, dim in enumerate(order):
        before[dim] = at[position]
    return _source(node), tuple(before)


def _expand(node: Node, at: At) -> tuple[Node, At]:
    return _source(node), broadcast(_source(node), at)


def broadcast(source: Node, at: At) -> At:
    """The indices of an operand that is broadcast to a result."""
    return broadcast_to(shape(source), at)


def broadcast_to(sizes: Sequence[sympy.Expr], at: At) -> At:
    """`broadcast` for an operand of known sizes."""
    own = at[len(at) - len(sizes) :] if sizes else ()
    return tuple(ZERO if size == 1 else place for size, place in zip(sizes, own, strict=True))


def _slice(node: Node, at: At) -> tuple[Node, At]:
    source = _source(node)
    axis = axis_of(node, 1, len(at))
    start, end, step = (argument(node, n + 2, name) for n, name in enumerate(("start", "end", "step")))
    if start in (None, 0) and step in (None, 1):
        return source, at
    size = size_sum(shape(source)[axis])
    first = size_of(start or 0)
    if bounds(first)[1] < 0:
        first = plus(first, size)
    if bounds(first)[0] < 0:
        # Export has asked whether the start is negative; the shape of the result says what it found.
        whole = end is None or (isinstance(end, int) and end >= WHOLE_SLICE_END)
        last = size if whole else size_of(end)
        last = plus(last, size) if bounds(last)[1] < 0 else last
        if step not in (None, 1) or size_sum(shape(node)[axis]) != plus(last, first, -1):
            raise UnreadableError("a slice whose start may be negative")
    moved = plus(first, only_sum(at[axis]), step or 1)
    return source, (*at[:axis], moved, *at[axis + 1 :])


def _select(node: Node, at: At) -> tuple[Node, At]:
    source = _source(node)
    axis = axis_of(node, 1, len(at) + 1)
    place = size_of(argument(node, 2, "index"))
    if bounds(place)[1] < 0:
        place = plus(place, size_sum(shape(source)[axis]))
    if bounds(place)[0] < 0:
        raise UnreadableError("an index that may be negative")
    return source, (*at[:axis], place, *at[axis:])


def _flip(node: Node, at: At) -> tuple[Node, At]:
    before = list(at)
    for dim in argument(node, 1, "dims"):
        last = plus(size_sum(shape(node)[dim % len(at)]), constant(-1))
        before[dim % len(at)] = plus(last, only_sum(at[dim]), -1)
    return _source(node), tuple(before)


def _repeat(node: Node, at: At) -> tuple[Node, At]:
    source, counts = _source(node), argument(node, 1, "repeats") or argument(node, 1, "dims")
    sizes = shape(source)
    before = []
    for place, size, count in zip(at[len(at) - len(sizes) :], sizes, counts[-len(sizes) :], strict=True):
        if count == 1 or size == 1:
            before.append(ZERO if size == 1 else place)
        elif size.is_Integer:
            whole = only_sum(place)
            before.append(plus(whole, floored(whole, int(size)), -int(size)))
        else:
            raise UnreadableError("a repeat of an axis of unknown size")
    return source, tuple(before)


def _repeat_interleave(node: Node, at: At) -> tuple[Node, At]:
    count, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(count, int) or not isinstance(dim, int):
        raise UnreadableError("a repeat of unknown size")
    before = list(at)
    before[dim] = floored(only_sum(at[dim]), count)
    return _source(node), tuple(before)


def _reshape(node: Node, at: At) -> tuple[Node, At]:
    return _source(node), reshaped(at, shape(node), shape(_source(node)))


def reshaped(at: At, after: Sequence[sympy.Expr], before: Sequence[sympy.Expr]) -> At:
    """Indices in the shape `after` as indices in the shape `before`."""
    after = _same_symbols(after, before)
    result: dict[int, Numeric] = {i: ZERO for i, size in enumerate(before) if size == 1}
    olds = [i for i, size in enumerate(before) if size != 1]
    news = [i for i, size in enumerate(after) if size != 1]
    while olds or news:
        group, held = [news.pop(0)] if news else [], [olds.pop(0)] if olds else []
        while True:
            ours = sympy.expand(sympy.prod([after[i] for i in group]))
            theirs = sympy.expand(sympy.prod([before[i] for i in held]))
            if ours == theirs:
                break
            if (news and not _divides(theirs, ours)) or not olds:
                if not news:
                    raise UnreadableError("a reshape that cannot be followed")
                group.append(news.pop(0))
            else:
                held.append(olds.pop(0))
        places = [at[i] for i in group]
        if len(group) == len(held) == 1:
            result[held[0]] = places[0]
        else:
            flat = _flat([only_sum(place) for place in places], [after[i] for i in group])
            for i, place in zip(held, _unflat(flat, [before[i] for i in held]), strict=True):
                result[i] = place
    return tuple(result[i] for i in range(len(before)))


def _same_symbols(after: Sequence[sympy.Expr], before: Sequence[sympy.Expr]) -> Sequence[sympy.Expr]:
    """`after` in the symbols of `before`: as many entries stand in both, so two names are of one size."""
    ratio = sympy.cancel(sympy.prod(after) / sympy.prod(before)) if tuple(after) != tuple(before) else 1
    ours, theirs = sympy.fraction(ratio)
    return [size.subs({ours: theirs}) for size in after] if ours.is_Symbol and theirs.is_Symbol else after


def _divides(divisor: sympy.Expr, size: sympy.Expr) -> bool:
    return bool(sympy.cancel(size / divisor).as_numer_denom()[1] == 1)


def _flat(places: list[Sum], sizes: list[sympy.Expr]) -> Sum:
    """The index of an axis that was several."""
    if len(places) == 1:
        return places[0]
    if all(size.is_Integer for size in sizes[1:]):
        total = places[0]
        for place, size in zip(places[1:], sizes[1:], strict=True):
            total = plus(place, total, int(size))
        return total
    key = ",".join(str(size) for size in sizes)
    return of_term(Term("flat", key, tuple(places), low=0))


def _unflat(flat: Sum, sizes: list[sympy.Expr]) -> list[Sum]:
    if len(sizes) == 1:
        return [flat]
    if all(size.is_Integer for size in sizes[1:]):
        places = []
        for size in reversed(sizes[1:]):
            outer = floored(flat, int(size))
            places.append(plus(flat, outer, -int(size)))
            flat = outer
        return [flat, *reversed(places)]
    ((term, factor),) = flat.items.items() if len(flat.items) == 1 else ((None, 0),)
    if isinstance(term, Term) and term.kind == "flat" and factor == 1 and flat.const == 0:
        if term.key == ",".join(str(size) for size in sizes):
            return [place for place in term.args if isinstance(place, Sum)]
    raise UnreadableError("a reshape that cannot be followed")


_SHAPES = (
    "view.default",
    "reshape.default",
    "_unsafe_view.default",
    "flatten.using_ints",
    "unflatten.int",
    "view_as.default",
    "reshape_as.default",
    "squeeze.dim",
    "squeeze.dims",
    "squeeze.default",
)
_COPIES = (
    "contiguous.default",
    "clone.default",
    "alias.default",
    "detach.default",
    "detach_.default",
    "lift_fresh_copy.default",
    "positive.default",
)
_ROWS: list[tuple[Move, list[Any]]] = [
    (_same, overloads(*_COPIES)),
    (_unsqueeze, overloads("unsqueeze.default")),
    (
        _swap,
        overloads(
            "transpose.int",
            "swapaxes.default",
            "swapdims.default",
            "mT.default",
            "t.default",
            "adjoint.default",
            "matrix_H.default",
            "numpy_T.default",
        ),
    ),
    (_permute, overloads("permute.default")),
    (_movedim, overloads("movedim.int", "moveaxis.int")),
    (_expand, overloads("expand.default", "expand_as.default", "broadcast_to.default")),
    (_slice, overloads("slice.Tensor")),
    (_select, overloads("select.int")),
    (_flip, overloads("flip.default")),
    (_repeat, overloads("repeat.default", "tile.default")),
    (_repeat_interleave, overloads("repeat_interleave.self_int")),
    (_reshape, overloads(*_SHAPES)),
]

MOVES: dict[Any, Move] = {target: move for move, targets in _ROWS for target in targets}
"""Operators that only move entries."""
