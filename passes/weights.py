"""Forward from the softmax: the way of the weights to the product with the values, and why it ends before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

from .anchors import Anchor, Refused
from .axes import Axis, Layout, leaves, shape_of
from .contraction import read_contraction
from .scores import MIXERS
from .site import Reason
from .steps import Effect, StepRule
from .walk import MAX_WALK, PlacedEffect, short_name, value_users

aten = torch.ops.aten


def follow_weights(anchor: Anchor, rules: dict[Any, StepRule]) -> tuple[list[Node], Node]:
    """The nodes between the softmax and the product with the values, and that product."""
    path: list[Node] = []
    current = anchor.node
    for _ in range(MAX_WALK):
        users = value_users(current)
        if len(users) != 1:
            raise _not_one_user(current, users, rules)
        user = users[0]
        if read_contraction(user) is not None:
            return path, user
        if user.op == "output":
            message = "the softmax is an output of the graph and multiplies no value"
            raise Refused(Reason.NOT_ATTENTION, current, message, "weights")
        if not (user.target in rules and current in _carriers(user, rules)) and not is_slice(user):
            raise _unexplained_weights(current, user)
        path.append(user)
        current = user
    message = f"no product with a value within {MAX_WALK} nodes"
    raise Refused(Reason.NOT_ATTENTION, current, message, "weights")


def _carriers(node: Node, rules: dict[Any, StepRule]) -> list[Node]:
    """The arguments of `node` that may carry the weights."""
    positions = rules[node.target].carriers
    return [a for i in positions if i < len(node.args) and isinstance(a := node.args[i], Node)]


def is_slice(node: Node) -> bool:
    """Whether `node` cuts a piece from a tensor, which is how a sink column is dropped."""
    return node.target in (aten.slice.Tensor, aten.narrow.default)


def reach_a_product(node: Node, rules: dict[Any, StepRule], depth: int = 8, skip_self: bool = False) -> bool:
    """Whether a contraction follows `node` within `depth` steps that have a rule.

    skip_self: `node` itself needs no rule.
    """
    if read_contraction(node) is not None:
        return True
    if depth == 0 or (node.target not in rules and not is_slice(node) and not skip_self):
        return False
    return any(reach_a_product(user, rules, depth - 1) for user in value_users(node))


def _not_one_user(current: Node, users: list[Node], rules: dict[Any, StepRule]) -> Refused:
    if not users:
        return Refused(Reason.NOT_ATTENTION, current, "the result of the softmax is not used", "weights")
    into_products = [user for user in users if reach_a_product(user, rules)]
    if into_products:
        names = ", ".join(sorted(str(user) for user in users))
        message = f"the attention weights are used {len(users)} times ({names})"
        rest = [user for user in users if user not in into_products]
        if rest and not _behind(rest) & _behind(into_products):
            message = (
                "the attention weights are returned as well; give an example that does not ask for them, "
                "as with need_weights=False or output_attentions=False, or convert a module around this "
                "one that does not return them"
            )
        return Refused(Reason.WEIGHTS_ESCAPE, current, message, "weights")
    return Refused(Reason.NOT_ATTENTION, current, "the result of the softmax multiplies no value", "weights")


def _behind(nodes: Iterable[Node]) -> set[Node]:
    """The nodes and everything that is computed from them, but for the graph's output."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found and node.op != "output":
            found.add(node)
            waiting += node.users
    return found


def _unexplained_weights(current: Node, user: Node) -> Refused:
    if user.target in MIXERS:
        message = "the weights of different heads are mixed by a projection"
        return Refused(Reason.HEAD_MIXING, user, message, "weights")
    if user.target in (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor):
        message = f"the attention weights go through {short_name(user)} before the values"
        return Refused(Reason.VALUE_STEP, user, message, "weights")
    message = f"after the softmax comes {short_name(user)}, not a product with a value"
    return Refused(Reason.NOT_ATTENTION, user, message, "weights")


def drops_sink(node: Node, weights: Node, effects: Sequence[PlacedEffect]) -> bool:
    """Whether `node` is a slice that really cuts, after a sink column was added."""
    return is_slice(node) and shape_of(node) != shape_of(weights) and _sink_side(effects) is not None


def _sink_side(effects: Sequence[PlacedEffect]) -> str | None:
    """Where the sink column stands, "first" or "last"; None where the scores have none."""
    return next((str(e.effect.value) for e in effects if e.effect.kind == "sink"), None)


def read_sink_slice(
    node: Node, weights: Node, layout: Layout, key_axis: Axis, effects: Sequence[PlacedEffect]
) -> Effect:
    """A slice that takes the sink column off the weights again."""
    side = _sink_side(effects)
    if side is None:
        raise Refused(Reason.VALUE_STEP, node, "part of the attention weights is cut off", "weights")
    _, dim, start = (*node.args, None, None)[:3]
    before, after = shape_of(weights), shape_of(node)
    assert before is not None and after is not None
    # Without its sink column a row has the keys again.
    fits = (
        dim in (-1, len(layout) - 1)
        and leaves(layout[-1]) == leaves(key_axis)
        and after[-1] + 1 == before[-1]
        and (start in (None, 0) if side == "last" else start == 1)
    )
    if not fits:
        message = "the slice after the softmax does not remove the sink column"
        raise Refused(Reason.VALUE_STEP, node, message, "weights")
    return Effect("drop_sink")
