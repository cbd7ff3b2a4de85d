"""Finding and emitting the data movement between a traced layout and the canonical one."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from .axes import Atom, Axis, Layout, product, quotient, resolve, shape_of
from .site import Relayout

aten = torch.ops.aten
ONE = sympy.Integer(1)


def find_relayout(layout: Layout, target: Sequence[Axis], full_axes: Iterable[int] = ()) -> Relayout | None:
    """How to bring a tensor laid out as `layout` to the axes `target`.

    A target atom that the tensor does not hold becomes size one. A target axis that is partly held, or named
    in `full_axes`, is expanded to its full size. None if the tensor holds an atom that the target does not.
    """
    held: list[Atom] = [leaf for axis in resolve(layout) for leaf in axis]
    wanted: list[Atom] = [leaf for axis in target for leaf in axis]
    if set(held) - set(wanted) or len(set(held)) != len(held):
        return None
    order = tuple(held.index(leaf) for leaf in wanted if leaf in held)
    spread, full, merged = [], [], []
    for position, axis in enumerate(target):
        present = [leaf in held for leaf in axis]
        expand = any(present) or position in full_axes
        spread += [leaf.size if has else ONE for leaf, has in zip(axis, present, strict=True)]
        full += [leaf.size if expand else ONE for leaf in axis]
        merged.append(product([leaf.size for leaf in axis]) if expand else ONE)
    return Relayout(tuple(leaf.size for leaf in held), order, tuple(spread), tuple(full), tuple(merged))


def _moves(shape: Sequence[sympy.Expr], relayout: Relayout) -> Iterable[tuple[str, tuple[Any, ...]]]:
    """The moves that are not no-ops, in order: ("reshape" | "permute" | "expand", sizes or axes)."""
    current = tuple(shape)
    for kind, sizes in (
        ("reshape", relayout.split),
        ("permute", relayout.order),
        ("reshape", relayout.spread),
        ("expand", relayout.full),
        ("reshape", relayout.merged),
    ):
        if kind == "permute":
            if tuple(sizes) == tuple(range(len(sizes))):
                continue
            yield kind, sizes
            current = tuple(current[i] for i in sizes)
        elif current != tuple(sizes):
            yield kind, sizes
            current = tuple(sizes)


def _simplest(shape: Sequence[sympy.Expr], relayout: Relayout) -> list[tuple[str, tuple[Any, ...]]]:
    """`_moves` with reshapes that follow each other folded into the last, and a round trip dropped."""
    folded: list[tuple[str, tuple[Any, ...]]] = []
    for move in _moves(shape, relayout):
        if folded and folded[-1][0] == "reshape" and move[0] == "reshape":
            folded.pop()
        folded.append(move)
    if len(folded) == 1 and folded[0] == ("reshape", tuple(shape)):
        return []
    return folded


class Emitter:
    """Writes data movement into a graph before `place`; sizes are read from tensors known to be there."""

    def __init__(self, graph: Graph, place: Node, sources: Sequence[Node]) -> None:
        self.graph = graph
        self.place = place
        self.created: list[Node] = []
        self._known: dict[sympy.Expr, Any] = {}
        self._axes: list[tuple[sympy.Expr, Node, int]] = [
            (size, source, axis)
            for source in sources
            for axis, size in enumerate(shape_of(source) or ())
            if not size.is_Integer
        ]

    def call(self, target: Any, *args: Any) -> Node:
        with self.graph.inserting_before(self.place):
            node = self.graph.call_function(target, args)
        node.meta = {
            k: v
            for k, v in self.place.meta.items()
            if k in ("nn_module_stack", "stack_trace", "source_fn_stack")
        }
        self.created.append(node)
        return node

    def size(self, size: sympy.Expr) -> Any:
        """`size` as an int or as a node that computes it."""
        if size.is_Integer:
            return int(size)
        if size not in self._known:
            self._known[size] = self._compute(size)
        return self._known[size]

    def _compute(self, size: sympy.Expr) -> Node:
        for known, node, axis in self._axes:
            if known == size:
                return self._numbered(self.call(aten.sym_size.int, node, axis), node, axis)
        for known, node, axis in self._axes:
            divisor = quotient(known, size)
            if divisor is not None and divisor.is_Integer:
                whole = self._numbered(self.call(aten.sym_size.int, node, axis), node, axis)
                return self.call(operator.floordiv, whole, int(divisor))
        if isinstance(size, sympy.Mul):
            first, *rest = size.args
            result: Any = self.size(sympy.sympify(first))
            for factor in rest:
                result = self.call(operator.mul, result, self.size(sympy.sympify(factor)))
            return result
        raise KeyError(f"no tensor of the site has a size from which {size} follows")

    @staticmethod
    def _numbered(node: Node, source: Node, axis: int) -> Node:
        node.meta["val"] = source.meta["val"].shape[axis]
        return node

    def move(self, node: Node, relayout: Relayout) -> Node:
        """The movement as graph nodes; `node` itself where nothing moves."""
        shape = shape_of(node)
        assert shape is not None
        return self._emit(node, shape, relayout)

    def restore(self, node: Node, shape: Sequence[sympy.Expr], relayout: Relayout) -> Node:
        """`move` for a node whose traced shape is not recorded yet."""
        return self._emit(node, shape, relayout)

    def _emit(self, node: Node, shape: Sequence[sympy.Expr], relayout: Relayout) -> Node:
        for kind, values in _simplest(shape, relayout):
            target = {
                "reshape": aten.reshape.default,
                "permute": aten.permute.default,
                "expand": aten.expand.default,
            }[kind]
            node = self.call(target, node, [self.size(v) if kind != "permute" else v for v in values])
        return node
