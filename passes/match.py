"""Find attention: from the softmax forward to the product with the values, backward to that of q and k.

Nothing is rewritten here. The walk reads each node through the step tables (`steps.py`) and follows axes
through views (`axes.py`); `verify.py` then decides. What cannot be explained becomes a `Refusal` that names
the node.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from .anchors import Anchor, Refused
from .explain import explain
from .scores import come_from_a_product, score_paths, unexplained_scores
from .walk import Rules, Walk
from .weights import follow_weights, reach_a_product

aten = torch.ops.aten


def walk(anchor: Anchor, rules: Rules) -> Walk:
    """Explain everything between q, k, v and the output of the attention at `anchor`, or raise Refused."""
    try:
        weight_path, output = follow_weights(anchor, rules.weights)
    except Refused as refused:
        # What follows the softmax of a router or a classifier says nothing about attention.
        scores = come_from_a_product(anchor.scores, rules.scores)
        raise (refused if scores else unexplained_scores(anchor.scores, rules.scores)) from None
    refusal: Refused | None = None
    for product, path in score_paths(anchor.scores, rules.scores):
        try:
            return explain(anchor, product, path, weight_path, output, rules)
        except Refused as candidate:
            refusal = refusal or candidate
    raise refusal or unexplained_scores(anchor.scores, rules.scores)


def find_lookalikes(graph: Graph, rules: Rules) -> Iterator[Node]:
    """Sigmoids that stand where attention has its softmax: between a product and one with values."""
    for node in graph.nodes:
        if node.target is aten.sigmoid.default and reach_a_product(node, rules.weights, skip_self=True):
            if come_from_a_product(node.args[0], rules.scores):
                yield node
