"""Sites that are already one node: `scaled_dot_product_attention`, by the same axis algebra as the walk."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch.fx import Node

from .anchors import Refused
from .axes import Atom, Axis, Layout, leaves, pair, provenance, quotient, resolve, shape_of
from .site import Reason
from .steps import Effect
from .walk import PlacedEffect, Walk, join_axes

aten = torch.ops.aten
FUSED = aten.scaled_dot_product_attention.default
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a fused node by name, defaults filled in."""
    given: dict[str, Any] = {
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
    }
    return {**given, **dict(zip(NAMES, node.args, strict=False)), **node.kwargs}


def read_fused(node: Node) -> Walk:
    """The walk of a fused node, or Refused."""
    given = arguments(node)
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    chains = [provenance(operand) for operand in (query, key, value)]
    if not all(chains):
        raise Refused(Reason.SHAPE_UNKNOWN, node, "an operand was traced without a shape", "axes")
    (q, k, v) = (list(resolve(chain[-1][1])) for chain in chains)
    if min(map(len, (q, k, v))) < 3:
        raise Refused(Reason.AXES, node, "an operand has fewer than three axes", "axes")
    if given["enable_gqa"]:
        k, v = _repeat_heads(node, q, k), _repeat_heads(node, q, v)
    scale = given["scale"]
    if scale is None:
        features = shape_of(query)
        assert features is not None
        if not features[-1].is_Integer:
            raise Refused(Reason.SCALE, node, "head_dim is not a fixed number", "scale")
        scale = 1.0 / math.sqrt(int(features[-1]))
    if not isinstance(scale, (int, float)) or not isinstance(given["dropout_p"], (int, float)):
        raise Refused(Reason.SCALE, node, "the scale of the fused attention is not a number", "scale")
    for first, second in ((q[-1], k[-1]), (k[-2], v[-2])):
        if pair(first, second) is None:
            raise Refused(Reason.AXES, node, "the operands of the fused attention do not line up", "axes")
    batch, layout = _batch_pairs(node, q, k)
    value_batch, _ = _batch_pairs(node, list(layout) + [(), ()], v)
    options = {
        "scale": float(scale),
        "causal": bool(given["is_causal"]),
        "dropout": float(given["dropout_p"]),
    }
    effects = [PlacedEffect(Effect("sdpa", options, mask), (*layout, leaves(q[-2]), leaves(k[-2])))]
    return Walk(
        anchor=node,
        query=query,
        key=key,
        value=value,
        output=node,
        query_chain=chains[0],
        key_chain=chains[1],
        value_chain=chains[2],
        batch=batch,
        query_leads=True,
        value_batch=value_batch,
        query_own=[leaves(q[-2])],
        key_axis=leaves(k[-2]),
        value_key_axis=v[-2],
        query_feature=q[-1],
        key_feature=k[-1],
        value_feature=v[-1],
        output_layout=(*layout, leaves(q[-2]), leaves(v[-1])),
        effects=effects,
        body=[],
        spelling=["scaled_dot_product_attention"],
        contractions=(node,),
    )


def _repeat_heads(node: Node, query: list[Axis], other: list[Axis]) -> list[Axis]:
    """`enable_gqa` repeats each key/value head over neighbouring query heads."""
    heads, own = (sympy.prod([leaf.size for leaf in axis]) for axis in (query[-3], other[-3]))
    groups = quotient(sympy.sympify(heads), sympy.sympify(own))
    if groups is None:
        raise Refused(Reason.KV_MAP, node, f"{heads} query heads cannot share {own} key/value heads", "heads")
    if groups == 1:
        return other
    return [*other[:-3], (*other[-3], Atom(groups, repeated=True)), *other[-2:]]


def _batch_pairs(node: Node, lead: list[Axis], follow: list[Axis]) -> tuple[list[tuple[Axis, Axis]], Layout]:
    """Pairs of leading axes aligned from the right, and the axes of the result."""
    rank = max(len(lead), len(follow)) - 2
    pairs, layout = [], []
    for position in range(rank, 0, -1):
        first = lead[-2 - position] if len(lead) >= position + 2 else ()
        second = follow[-2 - position] if len(follow) >= position + 2 else ()
        both, joined = join_axes(node, first, second)
        pairs.append(both)
        layout.append(joined)
    return pairs, tuple(layout)
