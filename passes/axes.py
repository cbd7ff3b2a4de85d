"""Axis algebra: which piece of which source axis stands at every position of a viewed tensor.

A tensor's layout is one tuple of atoms per axis. An atom is an indivisible piece of a source axis (`B`, `H`,
`D`) or a repeat that `expand` or `repeat` made. View operators only regroup, reorder, split and repeat atoms,
so following them tells merged heads from batch, interleaved from tiled key/value heads, and query from key
axes, with symbolic sizes, without pattern lists. Axes of size one hold no atom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.functions import Max, Min

aten = torch.ops.aten

WHOLE_SLICE_END = 2**62
"""A slice end at or above this means "to the end" (tracers write 2**63 - 1)."""


def expr(size: Any) -> sympy.Expr:
    """A size as a sympy expression; symbolic sizes compare by structure, no guard is added."""
    if isinstance(size, torch.SymInt):
        return _unclamped(sympy.sympify(size.node.expr), size.node.shape_env)
    return sympy.sympify(size)


def _unclamped(size: sympy.Expr, environment: Any) -> sympy.Expr:
    """A slice clamped to its buffer has `Min(64, length)` rows: `length` where the trace demands that."""
    if not size.has(Min, Max):
        return size
    for guard in environment.guards:
        sides = guard.expr.args if isinstance(guard.expr, sympy.Eq) else ()
        for clamped, plain in zip(sides, sides[::-1], strict=True):
            if plain.is_Symbol and plain in clamped.free_symbols:
                size = size.subs(clamped, plain)
    return size


def quotient(size: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    """`size / divisor` when that is a whole number for every value of the symbols, else None."""
    ratio = sympy.cancel(size / divisor)
    numerator, denominator = ratio.as_numer_denom()
    return sympy.expand(numerator) if denominator == 1 else None


def product(sizes: Sequence[sympy.Expr]) -> sympy.Expr:
    return sympy.expand(sympy.prod(sizes)) if sizes else sympy.Integer(1)


def is_one(size: sympy.Expr) -> bool:
    """Whether a size is one: as a number, or as an expression that is one at two sets of sizes.

    A slice that is clamped to its buffer gives such an expression.
    """
    symbols = sorted(size.free_symbols, key=str)
    trials = ({symbol: start + 2 * i for i, symbol in enumerate(symbols)} for start in (11, 29))
    return all(size.subs(trial) == 1 for trial in trials)


class Atom:
    """A piece of an axis. Splitting it is seen by every layout that holds it.

    size: elements. repeated: made by expand or repeat, so all its positions hold the same data.
    root: the source axis it came from; two atoms split from one axis share it.
    """

    __slots__ = ("parts", "repeated", "root", "size")

    def __init__(self, size: sympy.Expr, repeated: bool = False, root: object | None = None) -> None:
        self.size = size
        self.repeated = repeated
        self.root = root if root is not None else self
        self.parts: tuple[Atom, Atom] | None = None

    def leaves(self) -> tuple[Atom, ...]:
        if self.parts is None:
            return (self,)
        return self.parts[0].leaves() + self.parts[1].leaves()

    def split(self, outer: sympy.Expr, inner: sympy.Expr) -> tuple[Atom, Atom]:
        self.parts = (Atom(outer, self.repeated, self.root), Atom(inner, self.repeated, self.root))
        return self.parts

    def __repr__(self) -> str:
        return f"{self.size}{'*' if self.repeated else ''}"


Axis = tuple[Atom, ...]
Layout = tuple[Axis, ...]


def leaves(axis: Axis) -> Axis:
    return tuple(leaf for atom in axis for leaf in atom.leaves())


def resolve(layout: Layout) -> Layout:
    return tuple(leaves(axis) for axis in layout)


def shape_of(node: Node) -> tuple[sympy.Expr, ...] | None:
    """Sizes of the tensor `node` produces, None if it is not a tensor or was not traced with shapes."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(expr(size) for size in value.shape)


def fresh(node: Node) -> Layout | None:
    """A layout with one new atom per axis of `node`."""
    shape = shape_of(node)
    return None if shape is None else tuple(() if size == 1 else (Atom(size),) for size in shape)


def regroup(layout: Layout, shape: Sequence[sympy.Expr]) -> Layout | None:
    """The layout after a reshape to `shape`, None where an axis boundary does not fall between pieces."""
    queue = [leaf for axis in resolve(layout) for leaf in axis]
    grouped: list[Axis] = []
    for size in shape:
        taken: list[Atom] = []
        missing = size
        while missing != 1:
            if not queue:
                return None
            atom = queue.pop(0)
            rest = quotient(missing, atom.size)
            if rest is not None:
                taken.append(atom)
                missing = rest
                continue
            inner = quotient(atom.size, missing)
            if inner is None:
                return None
            outer_atom, inner_atom = atom.split(missing, inner)
            taken.append(outer_atom)
            queue.insert(0, inner_atom)
            missing = sympy.Integer(1)
        grouped.append(tuple(taken))
    return None if queue else tuple(grouped)


def pair(left: Axis, right: Axis) -> list[tuple[Atom, Atom]] | None:
    """Match two axes of equal size piece by piece, splitting where one is finer; None if they do not fit.

    The operator that joins the axes demands that they agree, so two last pieces of variable size are one
    even where two inputs (past keys, past values) name that size differently.
    """
    lefts, rights = list(leaves(left)), list(leaves(right))
    pairs = []
    while lefts and rights:
        a, b = lefts.pop(0), rights.pop(0)
        if a.size != b.size:
            if (inner := quotient(a.size, b.size)) is not None:
                a, remainder = a.split(b.size, inner)
                lefts.insert(0, remainder)
            elif (inner := quotient(b.size, a.size)) is not None:
                b, remainder = b.split(a.size, inner)
                rights.insert(0, remainder)
            elif lefts or rights or (a.size.is_Integer and b.size.is_Integer):
                return None
        pairs.append((a, b))
    return None if lefts or rights else pairs


def _dim(node: Node, position: int, rank: int, default: int | None = None) -> int:
    value = node.args[position] if len(node.args) > position else default
    assert isinstance(value, int)
    return value % rank if rank else 0


def _reorder(layout: Layout, order: Sequence[int]) -> Layout:
    return tuple(layout[i] for i in order)


def _transpose(node: Node, layout: Layout) -> Layout | None:
    rank = len(layout)
    first, second = _dim(node, 1, rank), _dim(node, 2, rank)
    order = list(range(rank))
    order[first], order[second] = second, first
    return _reorder(layout, order)


def _permute(node: Node, layout: Layout) -> Layout | None:
    dims = node.args[1]
    assert isinstance(dims, (list, tuple))
    return _reorder(layout, [int(d) % len(layout) for d in dims])  # type: ignore[arg-type]


def _movedim(node: Node, layout: Layout) -> Layout | None:
    order = list(range(len(layout)))
    source, target = _dim(node, 1, len(layout)), _dim(node, 2, len(layout))
    order.insert(target, order.pop(source))
    return _reorder(layout, order)


def _swap_last(node: Node, layout: Layout) -> Layout | None:
    order = list(range(len(layout)))
    order[-2:] = order[:-3:-1]
    return _reorder(layout, order)


def _same(node: Node, layout: Layout) -> Layout | None:
    return layout


def _cast(node: Node, layout: Layout) -> Layout | None:
    """Casts count as views only when they change no dtype."""
    source, result = node.args[0], node.meta.get("val")
    value = source.meta.get("val") if isinstance(source, Node) else None
    same = (
        isinstance(value, torch.Tensor) and isinstance(result, torch.Tensor) and value.dtype == result.dtype
    )
    return layout if same else None


def _whole_slice(node: Node, layout: Layout) -> Layout | None:
    _, dim, start, end, step = (*node.args, *(None,) * 5)[:5]
    whole = (
        start in (None, 0)
        and step in (None, 1)
        and (end is None or (isinstance(end, int) and end >= WHOLE_SLICE_END))
    )
    if whole:
        return layout
    before = shape_of(node.args[0]) if isinstance(node.args[0], Node) else None
    return layout if before is not None and before == shape_of(node) else None


def _reshape(node: Node, layout: Layout) -> Layout | None:
    shape = shape_of(node)
    return None if shape is None else regroup(layout, shape)


def _unsqueeze(node: Node, layout: Layout) -> Layout | None:
    dim = _dim(node, 1, len(layout) + 1)
    return (*layout[:dim], (), *layout[dim:])


def _squeeze(node: Node, layout: Layout) -> Layout | None:
    rank = len(layout)
    dims = node.args[1] if len(node.args) > 1 else list(range(rank))
    chosen = {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}  # type: ignore[arg-type]
    return tuple(axis for i, axis in enumerate(layout) if not (i in chosen and not axis))


def _expand(node: Node, layout: Layout) -> Layout | None:
    shape = shape_of(node)
    if shape is None:
        return None
    padded = ((),) * (len(shape) - len(layout)) + layout
    return tuple(
        axis if axis or size == 1 else (Atom(size, repeated=True),)
        for axis, size in zip(padded, shape, strict=True)
    )


def _repeat(node: Node, layout: Layout) -> Layout | None:
    counts = node.args[1]
    assert isinstance(counts, (list, tuple))
    if len(counts) < len(layout) or not all(isinstance(c, int) for c in counts):
        return None
    padded = ((),) * (len(counts) - len(layout)) + layout
    return tuple(
        axis if count == 1 else (Atom(sympy.Integer(count), repeated=True), *axis)
        for axis, count in zip(padded, counts, strict=True)
    )


def _repeat_interleave(node: Node, layout: Layout) -> Layout | None:
    count = node.args[1]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if not isinstance(count, int) or not isinstance(dim, int):
        return None
    dim %= len(layout)
    repeated = (*layout[dim], *((Atom(sympy.Integer(count), repeated=True),) if count != 1 else ()))
    return (*layout[:dim], repeated, *layout[dim + 1 :])


def overloads(*names: str) -> list[Any]:
    """Overloads by name; a name this torch version does not have is left out."""
    found = []
    for name in names:
        packet, overload = name.split(".")
        if hasattr(aten, packet) and hasattr(getattr(aten, packet), overload):
            found.append(getattr(getattr(aten, packet), overload))
    return found


CASTS = tuple(
    overloads(
        "to.dtype",
        "to.device",
        "to.dtype_layout",
        "to.other",
        "_to_copy.default",
        "type_as.default",
        "float.default",
    )
)
"""Operators that may change the dtype and nothing else."""

_RULES: list[tuple[Callable[[Node, Layout], Layout | None], list[Any]]] = [
    (
        _same,
        overloads(
            "contiguous.default",
            "clone.default",
            "alias.default",
            "lift_fresh_copy.default",
            "positive.default",
        ),
    ),
    (_cast, list(CASTS)),
    (_whole_slice, overloads("slice.Tensor")),
    (_transpose, overloads("transpose.int", "swapaxes.default", "swapdims.default")),
    (_permute, overloads("permute.default")),
    (_movedim, overloads("movedim.int", "moveaxis.int")),
    (
        _swap_last,
        overloads("mT.default", "adjoint.default", "t.default", "matrix_H.default", "numpy_T.default"),
    ),
    (
        _reshape,
        overloads(
            "view.default",
            "reshape.default",
            "_unsafe_view.default",
            "flatten.using_ints",
            "unflatten.int",
            "view_as.default",
            "reshape_as.default",
        ),
    ),
    (_unsqueeze, overloads("unsqueeze.default")),
    (_squeeze, overloads("squeeze.dim", "squeeze.dims", "squeeze.default")),
    (_expand, overloads("expand.default", "expand_as.default", "broadcast_to.default")),
    (_repeat, overloads("repeat.default", "tile.default")),
    (_repeat_interleave, overloads("repeat_interleave.self_int")),
]

VIEWS: dict[Any, Callable[[Node, Layout], Layout | None]] = {
    t: rule for rule, targets in _RULES for t in targets
}
"""Operators that only move data, and what they do to a layout."""

REPEATS = frozenset(
    overloads(
        "expand.default",
        "expand_as.default",
        "broadcast_to.default",
        "repeat.default",
        "tile.default",
        "repeat_interleave.self_int",
    )
)


def view_source(node: Node) -> Node | None:
    """The tensor `node` is a view (or plain copy) of, None if it computes something."""
    if node.op != "call_function" or node.target not in VIEWS or not node.args:
        return None
    source = node.args[0]
    return source if isinstance(source, Node) and shape_of(source) is not None else None


def apply_view(node: Node, layout: Layout) -> Layout | None:
    """The layout of `node` given that of the tensor it views, None where the algebra cannot follow."""
    return VIEWS[node.target](node, resolve(layout))


def provenance(node: Node) -> list[tuple[Node, Layout]]:
    """The chain of views that ends in `node`, source first, each with its layout in the source's atoms.

    Where the algebra cannot follow, the chain starts later, so the list is never empty for a tensor.
    """
    chain = [node]
    while (source := view_source(chain[-1])) is not None:
        chain.append(source)
    steps: list[tuple[Node, Layout]] = []
    for current in reversed(chain):
        layout = apply_view(current, steps[-1][1]) if steps else None
        if layout is None:
            start = fresh(current)
            if start is None:
                return []
            steps, layout = [], start
        steps.append((current, layout))
    return steps
