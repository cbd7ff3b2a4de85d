"""Telling a cached decoding step from cross-attention, in a graph that shows one step only.

One query that sees every key may be either. It is the last step of a causal self-attention when its keys are
`cat([cache, new])`: the cache an input of the graph, the new key computed from what the query comes from.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ..passes.graphs import ancestors
from ..passes.site import Site

_aten = torch.ops.aten


def is_cached_decode(site: Site) -> bool:
    """Whether the keys are those of a cache, an input of the graph, followed by the query's own token."""
    source = _projected(site.query.node)
    if source is None:
        return False
    for node in ancestors([site.key.node]):
        if (
            node.target is _aten.cat.default
            and isinstance(node.args[0], list | tuple)
            and len(node.args[0]) > 1
        ):
            first, *_, last = node.args[0]
            assert isinstance(first, Node) and isinstance(last, Node)
            past = ancestors([first])
            cached = any(leaf.op == "placeholder" and _is_activation(leaf) for leaf in past)
            if cached and source not in past and source in ancestors([last]):
                return True
    return False


def _projected(node: Node) -> Node | None:
    """The activation that the projection nearest above `node` reads."""
    seen: set[Node] = set()
    while node not in seen:
        seen.add(node)
        if node.target in (_aten.linear.default, _aten.matmul.default, _aten.mm.default):
            return node.args[0] if isinstance(node.args[0], Node) else None
        if node.target is _aten.addmm.default:
            return node.args[1] if isinstance(node.args[1], Node) else None
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if not inputs:
            return None
        node = inputs[0]
    return None


def _is_activation(node: Node) -> bool:
    leaf, value = node.meta.get("leaf"), node.meta.get("val")
    return (leaf is None or leaf.kind == "input") and isinstance(value, Tensor) and value.is_floating_point()
