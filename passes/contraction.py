"""Products of two tensors over one shared axis, whatever they are spelled with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from .axes import shape_of

aten = torch.ops.aten

Label = str | int
Labels = tuple[Label, ...]


@dataclass(frozen=True)
class Contraction:
    """`out[labels] = sum over the contracted label of left * right`, times `alpha`, plus `beta * addend`.

    Labels name axes: one in both operands and in the output is a batch axis, one in both and not in the
    output is contracted. A batch axis of size one broadcasts.
    """

    node: Node
    left: Node
    right: Node
    left_labels: Labels
    right_labels: Labels
    out_labels: Labels
    alpha: float = 1.0
    beta: float = 0.0
    addend: Node | None = None

    @property
    def contracted(self) -> Label:
        return next(iter(set(self.left_labels) & set(self.right_labels) - set(self.out_labels)))


def _matmul_labels(left_rank: int, right_rank: int) -> tuple[Labels, Labels, Labels]:
    """Batch axes are numbered from the right, as broadcasting aligns them."""
    left: Labels = (*range(left_rank - 3, -1, -1), "row", "sum")
    right: Labels = (*range(right_rank - 3, -1, -1), "sum", "column")
    out: Labels = (*range(max(left_rank, right_rank) - 3, -1, -1), "row", "column")
    return left, right, out


def _spell_ellipsis(term: str, rank: int) -> str:
    """`...id` with digits for the axes the dots stand for, numbered from the right so that they broadcast."""
    return term.replace("...", "".join(str(i) for i in range(rank - 1, -1, -1)))


def _read_einsum(node: Node) -> Contraction | None:
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow or inputs.count(",") != 1:
        return None
    first, second = operands
    assert isinstance(first, Node) and isinstance(second, Node)
    terms = inputs.split(",")
    shapes = [shape for operand in (first, second) if (shape := shape_of(operand)) is not None]
    if len(shapes) != 2:
        return None
    ranks = [len(shape) - len(term.replace("...", "")) for shape, term in zip(shapes, terms, strict=True)]
    spare = max((rank for rank, term in zip(ranks, terms, strict=True) if "..." in term), default=0)
    left, right = (_spell_ellipsis(term, rank) for term, rank in zip(terms, ranks, strict=True))
    output = _spell_ellipsis(output, spare)
    summed = (set(left) | set(right)) - set(output)
    distinct = all(len(set(term)) == len(term) for term in (left, right, output))
    if not distinct or len(summed) != 1 or not summed <= set(left) & set(right):
        return None
    return Contraction(node, first, second, tuple(left), tuple(right), tuple(output))


def read_contraction(node: Node) -> Contraction | None:
    """`node` as a contraction, None if it is not one (a projection by a parameter is one too)."""
    if node.op != "call_function":
        return None
    if node.target is aten.einsum.default:
        return _read_einsum(node)
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        left, right = node.args[0], node.args[1]
        alpha, beta, addend = 1.0, 0.0, None
    elif node.target in (aten.baddbmm.default, aten.addmm.default):
        left, right = node.args[1], node.args[2]
        beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))  # type: ignore[assignment]
        addend = node.args[0] if beta != 0 else None
    else:
        return None
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return None
    left_shape, right_shape = shape_of(left), shape_of(right)
    if left_shape is None or right_shape is None or len(left_shape) < 2 or len(right_shape) < 2:
        return None
    if addend is not None and not isinstance(addend, Node):
        return None
    if not all(isinstance(scalar, (int, float)) for scalar in (alpha, beta)):
        return None
    labels = _matmul_labels(len(left_shape), len(right_shape))
    return Contraction(node, left, right, *labels, alpha=float(alpha), beta=float(beta), addend=addend)
