"""The entry of a tensor of a graph at given indices, as an expression, found backwards from the node.

What has no row in the tables, or is used in a way that a row cannot follow, is a term of its own: an entry of
that node, of which only its indices and the inputs behind it are known. So nothing is ever guessed: what
cannot be read stands in the formula as something that the language of masks does not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .algebra import as_formula, as_number, index, member
from .evaluate import constant as constant_value
from .evaluate import is_size, value_leaves
from .graphs import aliased, attribute, written_arguments
from .intervals import only
from .moves import MOVES, At, broadcast, size_of
from .tables import read_table
from .terms import Numeric, Term, UnreadableError, Value, constant, of_term

Row = Callable[["Reader", Node, At], Value]
"""The entry of a node at indices, from the entries of its arguments."""


_UNREADABLE = (UnreadableError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError)
"""What a row may raise on a use that it does not foresee; the entry is then a term of its own."""


class Reader:
    """Reads entries of the nodes of one graph; `rows` is the table of operators that compute."""

    def __init__(self, graph: Graph, rows: Mapping[Any, Row]) -> None:
        self._rows = rows
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
            if node.target in self._rows:
                return _fitting(self._rows[node.target](self, node, at), node)
            value = constant_value(node)
            if value is not None:
                return _fitting(read_table(value, at), node)
        except _UNREADABLE:
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
