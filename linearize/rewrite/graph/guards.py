"""What export took to hold of the sizes of a call on its way: a branch on a length, say."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.printers import PythonPrinter

_MORE_THAN_ONE = (("!=", 1), (">=", 2), (">", 1))


@dataclass(frozen=True)
class Guard:
    """One condition.

    Attributes:
        symbols: the sizes it is about.
        test: the condition, a plain function of numbers, which compilers can follow.
        of_one: it says that something is not one.
    """

    symbols: tuple[sympy.Symbol, ...]
    test: Callable[..., bool]
    of_one: bool

    def holds(self, sizes: Mapping[sympy.Symbol, int]) -> bool:
        """Whether the condition holds of the sizes of a call."""
        values = [sizes[symbol] for symbol in self.symbols]
        # Graphs of several tokens run for one as well, which export tells apart wherever it can.
        return self.test(*values) or (self.of_one and any(value == 1 for value in values))


def guards_of(placeholders: Sequence[Node], known: Collection[sympy.Symbol]) -> tuple[Guard, ...]:
    """The conditions of a graph with these inputs that are about `known` sizes."""
    symbolic = [
        size for node in placeholders for size in node.meta["val"].shape if isinstance(size, torch.SymInt)
    ]
    if not symbolic:
        return ()
    environment: Any = symbolic[0].node.shape_env
    found: list[Guard] = []
    for guard in environment.guards:
        condition = environment.replace(guard.expr)
        symbols = tuple(sorted(condition.free_symbols, key=str))
        if symbols and set(symbols) <= set(known):
            names = ", ".join(str(symbol) for symbol in symbols)
            test = eval(f"lambda {names}: {PythonPrinter().doprint(condition)}", {"math": math})
            rest = (condition.rel_op, condition.rhs) if isinstance(condition, sympy.Rel) else None
            found.append(Guard(symbols, test, rest in _MORE_THAN_ONE))
    return tuple(found)
