"""Prove a walk and make it a `Site`: what are heads, that nothing escapes or is mutated, the mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from .anchors import Refused
from .axes import overloads, view_source
from .capture import module_path, source_line
from .evaluate import value_ancestors
from .fused import FUSED, arguments
from .graphs import aliased, written_arguments
from .heads import Heads
from .mask import MaskReader
from .site import Operand, Reason, Site, Step, term_operands
from .walk import PlacedEffect, Walk, reads_shape_only, short_name

aten = torch.ops.aten


def verify(walk: Walk, masks: MaskReader) -> Site:
    """The site of a walk, or Refused with the first thing that does not hold."""
    check_containment(walk)
    heads = Heads(walk)
    query, key, value = heads.query(), heads.key(), heads.value()
    program = _program(walk, heads, masks)
    check_terms(walk, program)
    check_mutation(walk, program, (query, key, value))
    owner, owner_type, call = find_owner([walk.anchor, *walk.contractions])
    scale, softcap = read_scale(program, walk)
    mask = masks.read(program, query.relayout.merged[2], key.relayout.merged[2])
    softmax_dtype = next(
        (s.value for s in program if s.kind in ("softmax", "safe_softmax") and s.value), None
    )
    return Site(
        path=owner,
        ordinal=0,
        anchor=walk.anchor,
        query=query,
        key=key,
        value=value,
        output=walk.output,
        restore=heads.restore(),
        program=program,
        mask=mask,
        scale=scale,
        softcap=softcap,
        sinks=any(step.kind == "sink" for step in program),
        kv_map=heads.kv_map,
        dropout=_dropout(program),
        score_dtype=softmax_dtype or str(walk.anchor.meta["val"].dtype).removeprefix("torch."),
        body=tuple(walk.body),
        spelling=">".join(walk.spelling),
        source=source_line(walk.anchor),
        owner_type=owner_type,
        call=call,
    )


def _dropout(program: Sequence[Step]) -> float:
    for step in program:
        if step.kind == "dropout":
            return float(step.value)
        if step.kind == "sdpa":
            return float(step.value["dropout"])
    return 0.0


# --- containment and effects --------------------------------------------------------------------------------


def check_containment(walk: Walk) -> None:
    """Scores and weights are used inside the attention only."""
    inside = {*walk.body, walk.output}
    for node in walk.body:
        for user in node.users:
            reads_shape = reads_shape_only(user, node)
            dead = not user.users and user.op == "call_function"
            if user not in inside and not reads_shape and not dead:
                raise Refused(
                    Reason.WEIGHTS_ESCAPE,
                    node,
                    f"{short_name(node)} is also used by {user}, outside the attention",
                    "containment",
                )


def check_terms(walk: Walk, program: Sequence[Step]) -> None:
    """Masks and biases do not depend on the scores they change, nor on chance."""
    body = set(walk.body)
    for term in term_operands(program):
        for node in value_ancestors(term.node):
            if node in body:
                message = "a mask or bias of the scores is computed from the scores"
                raise Refused(Reason.SCORE_STEP, term.node, message, "terms")
            if _is_random(node):
                raise Refused(Reason.SCORE_STEP, node, "a random tensor is added to the scores", "terms")


def _is_random(node: Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if node.target is aten.dropout.default:
        return bool(node.args[1] and node.args[2])
    return node.target is not FUSED or arguments(node)["dropout_p"] != 0.0


def _root(node: Node) -> Node:
    """The tensor whose memory `node` may share."""
    while (source := view_source(node) or aliased(node)) is not None:
        node = source
    return node


_COPIES = frozenset(
    overloads("contiguous.default", "clone.default", "reshape.default", "repeat.default", "to.dtype",
             "repeat_interleave.self_int", "flatten.using_ints", "_to_copy.default")
)  # fmt: skip
"""Views that may copy, so that a later write to their source does not reach them."""


def check_mutation(walk: Walk, program: Sequence[Step], operands: Sequence[Operand]) -> None:
    """Nothing the site reads is written between where it was read and its output, where it will be read."""
    order = {node: position for position, node in enumerate(walk.output.graph.nodes)}
    end = order[walk.output]
    start = min([order[node] for node in walk.body], default=end)
    read_from: dict[Node, int] = {}
    for operand, original in zip(operands, (walk.query, walk.key, walk.value), strict=True):
        copied = [order[node] for node in _chain(original, operand.node) if node.target in _COPIES]
        read_from[_root(original)] = min([start, *copied])
    for node in walk.body:
        read_from.setdefault(_root(node), start)
    last_first = sorted(walk.body, key=order.__getitem__, reverse=True)
    read_at = {_root(read): order[node] for node in last_first for read in node.all_input_nodes}
    for term in term_operands(program):  # may be finished in place before it joins the scores
        read_from.setdefault(_root(term.node), read_at.get(_root(term.node), start))
    for node, position in order.items():
        for target in written_arguments(node) if position < end else ():
            if position > read_from.get(_root(target), end):
                raise Refused(
                    Reason.MUTATION,
                    node,
                    f"{short_name(node)} writes {target} in place inside the attention",
                    "mutation",
                )


def _chain(node: Node, source: Node) -> list[Node]:
    """`node` and the views between it and `source`, which is left out."""
    found = []
    while node is not source and (before := view_source(node)) is not None:
        found.append(node)
        node = before
    return found


# --- the program ------------------------------------------------------------------------------------------


def _program(walk: Walk, heads: Heads, masks: MaskReader) -> tuple[Step, ...]:
    steps, wide = [], False
    for placed in walk.effects:
        effect = placed.effect
        term = None if effect.term is None else _term(heads, placed, effect.term)
        if wide and term is not None and term.relayout.merged[3] != 1:
            raise Refused(
                Reason.SCORE_STEP,
                term.node,
                "what is added to the scores and their sink column has a column too many for the keys",
                "sink",
            )
        wide = effect.kind == "sink" or wide and effect.kind != "drop_sink"
        step = Step(effect.kind, effect.value, term)
        if term is not None and step.is_gate and (effect.kind == "div" or not masks.is_gate(term)):
            raise Refused(
                Reason.SCALE,
                term.node,
                "the scores are multiplied by something that differs from key to key",
                "scale",
            )
        steps.append(step)
    return tuple(steps)


def _term(heads: Heads, placed: PlacedEffect, term: Node) -> Operand:
    column = placed.effect.kind == "sink"
    return heads.term(term, (*placed.layout[:-1], ()) if column else placed.layout)


def read_scale(program: Sequence[Step], walk: Walk) -> tuple[float | None, float | None]:
    """The product of the constant scales and c of the softcap.

    The first is None where a tensor takes part, the second where there is no softcap.
    """
    scale: float | None = 1.0
    outer: float | None = None
    added = False
    for step in program:
        if step.kind == "sdpa":
            return float(step.value["scale"]), None
        if step.kind in ("softmax", "safe_softmax"):
            break
        if step.kind == "tanh":
            if added or outer is not None:
                raise Refused(
                    Reason.SOFTCAP_UNSUPPORTED,
                    walk.anchor,
                    "the softcap is not the first step after the scale",
                    "softcap",
                )
            outer = 1.0
        elif step.is_gate:
            added = True  # half of a mask
        elif step.kind in ("scale", "div"):
            factor = None if step.value is None else step.value if step.kind == "scale" else 1.0 / step.value
            if outer is not None and not added:
                if factor is None:
                    raise Refused(
                        Reason.SOFTCAP_UNSUPPORTED, walk.anchor, "the softcap is a tensor", "softcap"
                    )
                outer *= factor
            else:
                scale = None if scale is None or factor is None else scale * factor
        elif step.kind in ("add", "fill", "keep", "offset"):
            added = True
    if outer is not None and scale is not None:
        scale *= outer
    return scale, outer


# --- owner ------------------------------------------------------------------------------------------------


def find_owner(nodes: Sequence[Node]) -> tuple[str, str, int]:
    """(path, class name, call index) of the deepest module that ran all of `nodes`."""
    stacks = [module_path(node) for node in nodes]
    common = stacks[0]
    for stack in stacks[1:]:
        length = next(
            (i for i, (a, b) in enumerate(zip(common, stack, strict=False)) if a != b),
            min(len(common), len(stack)),
        )
        common = common[:length]
    path, kind = common[-1] if common else ("", "")
    return path, kind, _call_index(nodes[0], path)


def _call_index(node: Node, path: str) -> int:
    """Which call of the module at `path` recorded `node` (export marks repeats as `path@1`)."""
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        text = entry[0] if isinstance(entry, tuple) else str(entry)
        if re.sub(r"@\d+", "", text) == path and (found := re.search(r"@(\d+)$", text)):
            return int(found.group(1))
    return 0


def number_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Sites with their ordinals, in graph order."""
    counts: dict[str, int] = {}
    numbered = []
    for site in sites:
        numbered.append(replace(site, ordinal=counts.get(site.path, 0)))
        counts[site.path] = counts.get(site.path, 0) + 1
    return tuple(numbered)
