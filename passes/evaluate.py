"""The value of a node from sizes alone: run its ancestors on made-up inputs at chosen lengths.

Reads of a tensor's shape are answered from its traced symbolic shape, so an activation whose size a mask
copies is never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.fx.node import map_arg

from .axes import expr, overloads
from .graphs import ancestors, attribute

aten = torch.ops.aten

SHAPE_ONLY = frozenset(
    overloads(
        "sym_size.int",
        "sym_numel.default",
        "new_ones.default",
        "new_zeros.default",
        "new_full.default",
        "new_empty.default",
        "zeros_like.default",
        "ones_like.default",
        "full_like.default",
        "empty_like.default",
        "_assert_tensor_metadata.default",
        "new_tensor.default",
        "rand_like.default",
        "randn_like.default",
    )
)
"""Operators that read the shape, dtype or device of their first argument and never its values."""

SECOND_SHAPE_ONLY = frozenset(
    overloads("expand_as.default", "view_as.default", "type_as.default", "reshape_as.default", "to.other")
)
"""Operators that read only the shape or dtype of their second argument."""


def value_inputs(node: Node) -> list[Node]:
    """The tensors (and computed numbers) whose values `node` depends on."""
    if node.op in ("placeholder", "get_attr"):
        return []
    if node.target in SHAPE_ONLY:
        return [n for n in node.all_input_nodes if n is not node.args[0]]
    if node.target in SECOND_SHAPE_ONLY:
        return [n for n in node.all_input_nodes if n is not node.args[1]]
    return node.all_input_nodes


def is_size(node: Node) -> bool:
    """`node` is a number known from the traced symbolic shapes."""
    return isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt)) and node.op != "get_attr"


def value_ancestors(node: Node) -> list[Node]:
    """`node` and every ancestor whose value it depends on, in graph order; sizes are not followed."""
    found = ancestors([node], lambda current: [] if is_size(current) else value_inputs(current))
    return [n for n in node.graph.nodes if n in found]


def value_leaves(node: Node) -> list[Node]:
    """Placeholders and attributes whose values `node` depends on."""
    return [n for n in value_ancestors(node) if n.op in ("placeholder", "get_attr") and not is_size(n)]


@dataclass(frozen=True)
class Sizes:
    """Numbers for the size symbols of a graph."""

    values: Mapping[sympy.Symbol, int]

    def number(self, size: Any) -> Any:
        """A traced size as a Python number."""
        if isinstance(size, (bool, float)):
            return size
        result = expr(size).subs(dict(self.values))
        if not result.is_number:
            raise ValueError(f"size {size} has unknown symbols")
        return int(result)

    def shape(self, value: torch.Tensor) -> tuple[int, ...]:
        return tuple(self.number(size) for size in value.shape)


def evaluate(
    node: Node,
    sizes: Sizes,
    feed: Callable[[Node, tuple[int, ...]], torch.Tensor],
    replaced: Mapping[int, int] | None = None,
    replace_in: frozenset[Any] = frozenset(),
) -> torch.Tensor:
    """The value of `node` at `sizes`.

    `feed(placeholder, shape)` supplies inputs; attributes are read from the owning module. Integer
    arguments of the operators in `replace_in` are looked up in `replaced` (their sign is kept).

    Raises whatever an operator raises when the sizes do not fit the graph (for example past a buffer's end).
    """
    wanted = value_ancestors(node)
    computed = set(wanted)
    values: dict[Node, Any] = {}

    def lookup(argument: Node) -> Any:
        if argument not in computed:  # only its shape or dtype is read
            traced = argument.meta["val"]
            if not isinstance(traced, torch.Tensor):
                return sizes.number(traced)
            return torch.empty(sizes.shape(traced), dtype=traced.dtype, device=traced.device)
        return values[argument]

    with torch.no_grad():
        for current in wanted:
            traced = current.meta.get("val")
            if is_size(current):
                values[current] = sizes.number(traced)
            elif current.op == "placeholder":
                assert isinstance(traced, torch.Tensor)
                values[current] = feed(current, sizes.shape(traced))
            elif current.op == "get_attr":
                values[current] = attribute(current)
            else:
                arguments = map_arg(current.args, lookup)
                if replaced and current.target in replace_in:
                    arguments = tuple(_replace(value, replaced) for value in arguments)
                keywords = map_arg(current.kwargs, lookup)
                assert callable(current.target)
                values[current] = current.target(*arguments, **keywords)
    result = values[node]
    if not isinstance(result, torch.Tensor):
        raise TypeError(f"{node} is not a tensor")
    return result


def _replace(value: Any, replaced: Mapping[int, int]) -> Any:
    if type(value) is not int or abs(value) not in replaced:
        return value
    return replaced[abs(value)] if value > 0 else -replaced[abs(value)]


def constant(node: Node, limit: int = 64) -> torch.Tensor | None:
    """The value of `node` when it depends on no input, parameter or symbolic size; None otherwise.

    `limit` bounds how many nodes are run.
    """
    needed = value_ancestors(node)
    if len(needed) > limit or node.graph.owning_module is None:
        return None
    for ancestor in needed:
        if ancestor.op == "placeholder" or isinstance(ancestor.meta.get("val"), torch.SymInt):
            return None
        if ancestor.op == "get_attr" and isinstance(attribute(ancestor), torch.nn.Parameter):
            return None
    try:
        return evaluate(node, Sizes({}), _no_inputs)
    except (ValueError, TypeError, RuntimeError, KeyError):
        return None


def _no_inputs(node: Node, shape: tuple[int, ...]) -> torch.Tensor:
    raise ValueError(f"{node} is an input")
