"""Spell a `flex_attention` node out: scores, score_mod and mask_mod as operators, softmax, product.

The two sub-graphs work on one score and its (batch, head, query, key) indices. Where they hold nothing but
point-wise operators and reads of captured tensors, they mean the same on whole axes by broadcasting, and the
ordinary walk can then explain them like any other attention. Anything else is refused and left as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .anchors import Refused
from .axes import overloads, shape_of
from .graphs import remove_dead
from .site import Reason

aten = torch.ops.aten
FLEX = torch.ops.higher_order.flex_attention


def find_flex(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target is FLEX]


def _subgraph(node: Node, reference: Any) -> GraphModule:
    module = node.graph.owning_module
    assert module is not None
    found = module.get_submodule(str(reference.target)) if isinstance(reference, Node) else None
    if not isinstance(found, GraphModule):
        raise Refused(
            Reason.FLEX, node, "the score or mask function of flex_attention was not traced", "flex"
        )
    return found


def _check_pointwise(node: Node, function: GraphModule) -> None:
    for inner in function.graph.nodes:
        if inner.op in ("placeholder", "output", "get_attr"):
            continue
        pointwise = torch.Tag.pointwise in getattr(inner.target, "tags", ()) or inner.target in POINTWISE
        if not pointwise and inner.target not in _READS and not _indexes(inner):
            raise Refused(
                Reason.FLEX,
                node,
                f"a function of flex_attention uses {inner.target}, which is not point-wise",
                "flex",
            )


def _indexes(inner: Node) -> bool:
    """Whether a node is how export writes `tensor[b, i]` in a function of flex_attention.

    PyTorch gives that an autograd function of its own, which export calls by its name: what the function is
    and how its arguments lie, that name, the tensor, and the indices.
    """
    return (
        inner.target is torch.ops.higher_order.flat_apply
        and len(inner.args) > 4
        and str(inner.args[2]).endswith("._trace_wrapped_higher_order_op.ModIndex")
    )


_CONNECTIVES = ("__and__", "__or__", "__xor__", "floor_divide", "remainder", "fmod", "where")

POINTWISE = frozenset(
    getattr(packet, name)
    for packet in (getattr(aten, name) for name in _CONNECTIVES)
    for name in packet.overloads()
    if not name.endswith("out")
)
"""Point-wise operators that PyTorch does not tag as such: composites of tagged ones."""

_READS = frozenset(
    [
        *overloads(
            "index.Tensor",
            "lift_fresh_copy.default",
            "detach_.default",
            "scalar_tensor.default",
            "to.dtype",
            "to.dtype_layout",
            "_to_copy.default",
            "new_ones.default",
            "new_zeros.default",
            "full.default",
            "_assert_tensor_metadata.default",
            "clone.default",
        ),
        operator.getitem,
    ]
)
"""Reads of captured tensors, and what makes a number a tensor of no axes."""


class _Writer:
    """Adds nodes before `place` that carry its metadata."""

    def __init__(self, place: Node) -> None:
        self.place = place
        self.graph = place.graph

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.place):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {k: v for k, v in self.place.meta.items() if k in ("nn_module_stack", "stack_trace")}
        node.meta["val"] = _fake(node)
        return node

    def attribute(self, name: str, source: Node) -> Node:
        with self.graph.inserting_before(self.place):
            node = self.graph.get_attr(name)
        node.meta = dict(source.meta)
        return node

    def inline(self, function: GraphModule, arguments: list[Node], name: str) -> Node:
        """`function` applied to `arguments`; its attributes become attributes of this graph under `name`."""
        values: dict[Node, Any] = {}
        placeholders = iter(arguments)
        owner = self.graph.owning_module
        assert owner is not None
        for inner in function.graph.nodes:
            if inner.op == "placeholder":
                values[inner] = next(placeholders)
            elif inner.op == "get_attr":
                if not all(map(_indexes, inner.users)):
                    values[inner] = self.attribute(f"{name}.{inner.target}", inner)
            elif _indexes(inner):
                tensor, *indices = map_arg(inner.args[3:], values.__getitem__)
                values[inner] = self.call(aten.index.Tensor, tensor, indices)
            elif inner.op == "output":
                result = inner.args[0]
                return values[result[0] if isinstance(result, (list, tuple)) else result]
            elif inner.target is not aten._assert_tensor_metadata.default:
                args = map_arg(inner.args, values.__getitem__)
                values[inner] = self.call(inner.target, *args, **map_arg(inner.kwargs, values.__getitem__))
        raise AssertionError("a graph without an output")


def _fake(node: Node) -> Any:
    """Run one node on the traced values of its arguments."""

    def value(argument: Node) -> Any:
        return argument.meta["val"]

    assert callable(node.target)
    return node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))


def expand_flex(node: Node) -> Node:
    """Replace one flex_attention node of a graph by ordinary operators, or raise Refused and change nothing.

    Returns the softmax node it made.

    As PyTorch's own reference does: scores in float32 (float64 for float64), masked scores -inf, fully
    masked rows zero, grouped heads repeated next to each other.
    """
    query, key, value, score_mod, block_mask, scale, _, score_extra, mask_extra = node.args[:9]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    assert isinstance(score_extra, tuple) and isinstance(mask_extra, tuple) and isinstance(block_mask, tuple)
    score_function, mask_function = _subgraph(node, score_mod), _subgraph(node, block_mask[-1])
    _check_pointwise(node, score_function)
    _check_pointwise(node, mask_function)
    users = list(node.users)
    if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in users):
        raise Refused(Reason.FLEX, node, "the log-sum-exp of flex_attention is used as well", "flex")
    if not isinstance(scale, (int, float)):
        raise Refused(Reason.FLEX, node, "the scale of flex_attention is not a number", "flex")
    shapes = shape_of(query), shape_of(key)
    if (
        shapes[0] is None
        or shapes[1] is None
        or len(shapes[0]) != 4
        or not (shapes[0][1].is_Integer and shapes[1][1].is_Integer)
    ):
        raise Refused(Reason.FLEX, node, "flex_attention with an unknown number of heads", "flex")

    write = _Writer(node)
    groups = int(shapes[0][1]) // int(shapes[1][1])
    if groups > 1:
        key = write.call(aten.repeat_interleave.self_int, key, groups, 1)
        value = write.call(aten.repeat_interleave.self_int, value, groups, 1)
    traced = query.meta["val"]
    precise = torch.float64 if traced.dtype == torch.float64 else torch.float32
    scores = write.call(aten.matmul.default, query, write.call(aten.transpose.int, key, -1, -2))
    scores = write.call(aten.to.dtype, scores, precise)
    scores = write.call(aten.mul.Tensor, scores, scale)
    indices = []
    for axis in range(4):
        length = write.call(aten.sym_size.int, scores, axis)
        positions = write.call(aten.arange.default, length, dtype=torch.int32, device=traced.device)
        view = [-1 if i == axis else 1 for i in range(4)]
        indices.append(write.call(aten.view.default, positions, view))
    assert isinstance(score_mod, Node) and isinstance(block_mask[-1], Node)
    scores = write.inline(score_function, [scores, *indices, *score_extra], str(score_mod.target))
    visible = write.inline(mask_function, [*indices, *mask_extra], str(block_mask[-1].target))
    scores = write.call(aten.where.ScalarOther, visible, scores, float("-inf"))
    softmax = write.call(aten._safe_softmax.default, scores, -1)
    weights = write.call(aten.to.dtype, softmax, traced.dtype)
    result = write.call(aten.matmul.default, weights, value)
    for user in users:
        if user.args[1] == 0:
            user.replace_all_uses_with(result)
        write.graph.erase_node(user)
    inputs = node.all_input_nodes
    write.graph.erase_node(node)
    remove_dead(write.graph, inputs)
    return softmax
