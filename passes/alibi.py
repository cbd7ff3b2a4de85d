"""ALiBi, told from other biases: a slope per head times the position of the key.

What is added to a query's whole row cancels in the softmax, so distances and positions are the same here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from .axes import expr
from .evaluate import is_size, value_ancestors
from .graphs import attribute
from .site import Operand, Site

HIDES = -9e3
"""Added scores at or below this hide a key; -1e4 is the least negative mask in use."""


def is_alibi(site: Site) -> bool:
    """Whether the finite scores that are added, at the traced sizes and without padding, are ALiBi.

    For the name of what a user drops knowingly: no rewrite keeps a bias on this evidence.
    """
    added: Tensor | float = 0.0
    for step in site.program:
        if step.term is None or step.kind not in ("add", "sdpa"):
            continue
        term = _value(step.term)
        if term is None:
            return False
        if term.dtype == torch.bool:
            continue
        added = added + term.double() * (step.value if step.kind == "add" else 1.0)
    if not isinstance(added, Tensor) or added.shape[-1] < 3:
        return False
    finite = added > HIDES
    slopes = added.diff(dim=-1).masked_fill(~(finite[..., 1:] & finite[..., :-1]), torch.nan)
    slope = slopes.nan_to_num(-torch.inf).amax((0, 2, 3), keepdim=True)  # one per head
    off = (slopes - slope).abs().nan_to_num(0.0)
    return bool(slope.isfinite().all() and (slope != 0).any() and (off <= 1e-4 * slope.abs() + 1e-6).all())


def _value(operand: Operand) -> Tensor | None:
    """The value of a score term `[b, h, T, S]` at the traced sizes; None where activations take part."""
    traced = _traced(operand.node)

    def number(size: Any) -> int:
        return int(expr(size).subs(traced))

    try:
        value, moves = _run(operand.node, number), operand.relayout
        value = value.reshape([*map(number, moves.split)]).permute(moves.order)
        value = value.reshape([*map(number, moves.spread)]).expand([*map(number, moves.full)])
        return value.reshape([*map(number, moves.merged)])
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError):
        return None


def _run(node: Node, number: Callable[[Any], int]) -> Tensor:
    """`node` at the traced sizes, of integer inputs with every token real.

    Raises ValueError where scores are computed of inputs, and whatever an operator raises.
    """
    values: dict[Node, Any] = {}

    def shape(argument: Node) -> list[int]:
        return [number(size) for size in argument.meta["val"].shape]

    def read(argument: Node) -> Any:
        if argument in values:
            return values[argument]
        found = argument.meta["val"]  # only its shape or dtype is read
        return torch.empty(shape(argument), dtype=found.dtype) if isinstance(found, Tensor) else number(found)

    with torch.no_grad():
        for current in value_ancestors(node):
            found = current.meta.get("val")
            if is_size(current):
                values[current] = found if isinstance(found, (bool, float)) else number(found)
            elif current.op == "get_attr":
                values[current] = attribute(current)
            elif current.op == "placeholder":
                if not isinstance(found, Tensor) or found.is_floating_point():
                    raise ValueError(f"{current} is an input of scores")
                values[current] = torch.ones(shape(current), dtype=found.dtype)
            else:
                assert callable(current.target)
                values[current] = current.target(
                    *map_arg(current.args, read), **map_arg(current.kwargs, read)
                )
    return values[node]


def _traced(node: Node) -> dict[sympy.Symbol, int]:
    """The number that each size symbol had when the graph of `node` was traced."""
    found: dict[sympy.Symbol, int] = {}
    for current in (*node.graph.find_nodes(op="placeholder"), *value_ancestors(node)):
        value = current.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.hint is not None:
                found[size.node.expr] = int(size.node.hint)
    return found
