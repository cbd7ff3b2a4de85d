"""Prove a walk: which axes are heads, nothing escapes, nothing is mutated, what the mask means. Gives a
`Site`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from .axes import Atom, Axis, Layout, leaves, pair, resolve, view_source
from .capture import module_path, source_line
from .cone import SHAPE_ONLY, cone
from .graphs import written_arguments
from .mask import MaskReader, is_gate
from .match import Refused, Traced, Walk, short_name, term_layout
from .relayout import plan_relayout
from .site import KVKind, KVMap, Operand, Reason, Relayout, Site, Step

aten = torch.ops.aten


def verify(walk: Walk, masks: MaskReader) -> Site:
    """The site of a walk, or Refused with the first thing that does not hold."""
    check_containment(walk)
    heads = Heads(walk)
    query, key, value = heads.operands()
    program = _program(walk, heads)
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
            reads_shape = user.target in SHAPE_ONLY and user.args[0] is node
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
    for step in program:
        if step.term is None:
            continue
        for node in cone(step.term.node):
            if node in body:
                raise Refused(
                    Reason.SCORE_STEP,
                    step.term.node,
                    "a mask or bias of the scores is computed from the scores",
                    "terms",
                )
            if (
                torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
                and node.target is not aten.dropout.default
            ):
                raise Refused(Reason.SCORE_STEP, node, "a random tensor is added to the scores", "terms")


def _root(node: Node) -> Node:
    while (source := view_source(node)) is not None:
        node = source
    return node


def check_mutation(walk: Walk, program: Sequence[Step], operands: Iterable[Operand]) -> None:
    """No tensor of the site is written between the first node of the site and its output."""
    read = [operand.node for operand in operands] + [
        step.term.node for step in program if step.term is not None
    ]
    roots = {_root(node) for node in [*walk.body, *read]}
    order = {node: position for position, node in enumerate(walk.output.graph.nodes)}
    start = min(order[node] for node in [*walk.body, *read])
    for node, position in order.items():
        if start < position < order[walk.output]:
            for target in written_arguments(node):
                if _root(target) in roots and node not in read:
                    raise Refused(
                        Reason.MUTATION,
                        node,
                        f"{short_name(node)} writes {target} in place inside the attention",
                        "mutation",
                    )


# --- heads ------------------------------------------------------------------------------------------------


class Heads:
    """Sorts the batch-like pieces of a walk into batch and heads, and maps key/value heads."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.batch, self.heads, self.query_axis = _sort(walk)
        self.groups: tuple[Axis, ...] = (self.batch, self.heads, self.query_axis)
        self.key_of = _partners(walk.batch, walk.query_own)
        self.value_of = _partners(walk.value_batch, ())
        kind, real = _kv_map(self.heads, self.key_of), _kv_map(self.heads, self.value_of)
        self.shared = kind is not None and kind == real
        self.kv_map = kind if kind is not None and self.shared else KVMap(KVKind.EQUAL, 1)

    def operands(self) -> tuple[Operand, Operand, Operand]:
        walk = self.walk
        query = _operand(
            walk.query_chain, (*self.groups, leaves(walk.query_feature)), frozenset(), walk.query
        )
        key = self._shared_operand(
            walk.key_chain, self.key_of, walk.key_axis, leaves(walk.key_feature), walk.key
        )
        value = self._shared_operand(
            walk.value_chain, self.value_of, walk.value_key_axis, leaves(walk.value_feature), walk.value
        )
        return query, key, value

    def _shared_operand(
        self,
        chain: list[tuple[Node, Layout]],
        partner: dict[Atom, Atom | None],
        sequence: Axis,
        feature: Axis,
        node: Node,
    ) -> Operand:
        batch = tuple(partner.get(leaf) or leaf for leaf in self.batch)
        repeated: frozenset[Atom] = frozenset()
        heads = tuple(partner.get(leaf) or leaf for leaf in self.heads)
        if self.shared and self.kv_map.kind is not KVKind.EQUAL:
            dropped = [leaf for leaf in self.heads if _is_shared(partner, leaf)]
            repeated = frozenset(p for leaf in dropped if (p := partner.get(leaf)) is not None)
            heads = tuple(partner.get(leaf) or leaf for leaf in self.heads if leaf not in dropped)
        return _operand(chain, (batch, heads, leaves(sequence), feature), repeated, node)

    def restore(self) -> Relayout:
        layout = (*self.groups, leaves(self.walk.value_feature))
        relayout = plan_relayout(layout, resolve(self.walk.output_layout))
        if relayout is None:
            raise Refused(
                Reason.AXES, self.walk.output, "the output of the attention repeats or drops an axis", "axes"
            )
        return relayout

    def term(self, node: Node, term: Node, layout: Layout) -> Operand:
        """A score term brought to axes that broadcast to `[B, H, T, S]`."""
        target = (*self.groups, leaves(self.walk.key_axis))
        relayout = plan_relayout(term_layout(node, term, layout), target)
        if relayout is None:
            raise Refused(Reason.AXES, node, f"the axes of {term} do not belong to the scores", "axes")
        return Operand(term, relayout)


def _sort(walk: Walk) -> tuple[Axis, Axis, Axis]:
    """Batch, head and query pieces, from everything the scores have besides the keys.

    Pieces of the query's own axes other than the sequence are heads that share a key. So are pieces split
    off the source axis of the features. Otherwise `_likely_heads` decides.
    """
    own = [leaf for axis in walk.query_own for leaf in leaves(axis)]
    if not own:
        raise Refused(Reason.AXES, walk.output, "the queries have no axis of their own", "axes")
    flexible = [leaf for leaf in own if not leaf.size.is_Integer]
    key_sizes = {leaf.size for leaf in leaves(walk.key_axis)}
    alike = [leaf for leaf in own if leaf.size in key_sizes]
    sequence = own[0] if len(own) == 1 else flexible[0] if len(flexible) == 1 else (alike or own)[-1]

    layout = resolve(walk.query_chain[-1][1])
    shared = [leaf for first, second in walk.batch for leaf in (leaves(first) or leaves(second))]
    held = [
        leaf for axis in layout for leaf in axis if leaf in shared or (leaf in own and leaf is not sequence)
    ]
    rest = [leaf for leaf in shared if leaf not in held] + held
    feature_roots = {leaf.root for leaf in leaves(walk.query_feature)}
    heads = {leaf for leaf in rest if leaf in own or leaf.root in feature_roots}
    partner = _partners(walk.batch, walk.query_own)
    if all(_is_shared(partner, leaf) for leaf in heads):
        heads |= set(_likely_heads([leaf for leaf in rest if leaf not in heads], layout))
    if heads and all(_is_shared(partner, leaf) for leaf in heads):
        heads |= set(_likely_heads([leaf for leaf in rest if leaf not in heads], layout))
    roots = {leaf.root for leaf in heads}
    heads |= {leaf for leaf in rest if leaf.root in roots}
    return (
        tuple(leaf for leaf in rest if leaf not in heads),
        tuple(leaf for leaf in rest if leaf in heads),
        (sequence,),
    )


def _likely_heads(rest: list[Atom], layout: Layout) -> list[Atom]:
    """Which of the batch-like pieces is the head axis: the only one of fixed size, else the last one; a
    single
    piece only when it is not the leading axis."""
    if len(rest) >= 2:
        fixed = [leaf for leaf in rest if leaf.size.is_Integer]
        return fixed if len(fixed) == 1 else rest[-1:]
    return [leaf for leaf in rest if layout and leaf not in layout[0]]


def _partners(pairs: Sequence[tuple[Axis, Axis]], own: Sequence[Axis]) -> dict[Atom, Atom | None]:
    """Leading atom -> the other operand's atom, None where that operand does not have the piece."""
    found: dict[Atom, Atom | None] = {leaf: None for axis in own for leaf in leaves(axis)}
    for first, second in pairs:
        matched = pair(first, second) if leaves(first) and leaves(second) else None
        if matched is not None:
            found.update(matched)
        elif not leaves(first):
            found.update((leaf, leaf) for leaf in leaves(second))
        else:
            found.update((leaf, None) for leaf in leaves(first))
    return found


def _is_shared(partner: dict[Atom, Atom | None], leaf: Atom) -> bool:
    other = partner.get(leaf)
    return other is None or other.repeated


def _kv_map(heads: Axis, partner: dict[Atom, Atom | None]) -> KVMap | None:
    """How keys (or values) cover the heads; None where the pieces alternate."""
    shared = [_is_shared(partner, leaf) for leaf in heads]
    groups = math.prod(
        int(leaf.size)
        for leaf, repeats in zip(heads, shared, strict=True)
        if repeats and leaf.size.is_Integer
    )
    if not any(shared):
        return KVMap(KVKind.EQUAL, 1)
    if shared == sorted(shared):
        return KVMap(KVKind.INTERLEAVED, groups)
    if shared == sorted(shared, reverse=True):
        return KVMap(KVKind.TILED, groups)
    return None


def _operand(
    chain: list[tuple[Node, Layout]], target: tuple[Axis, ...], dropped: frozenset[Atom], node: Node
) -> Operand:
    """The latest tensor of the chain without `dropped` pieces, preferring one whose axes need no
    splitting.
    """
    best: Operand | None = None
    for current, layout in reversed(chain):
        held = resolve(layout)
        if any(leaf in dropped for axis in held for leaf in axis):
            continue
        relayout = plan_relayout(held, target, full_axes=(0,))
        if relayout is None:
            continue
        if all(len(axis) <= 1 for axis in held):
            return Operand(current, relayout)
        best = best or Operand(current, relayout)
    if best is None:
        raise Refused(
            Reason.AXES, node, f"{node} cannot be brought to [batch, head, sequence, feature]", "axes"
        )
    return best


# --- the program ------------------------------------------------------------------------------------------


def _program(walk: Walk, heads: Heads) -> tuple[Step, ...]:
    steps = []
    for traced in walk.trace:
        effect = traced.effect
        term = None if effect.term is None else _term(walk, heads, traced, effect.term)
        per_key = term is not None and effect.kind in ("scale", "div") and term.relayout.merged[3] != 1
        if term is not None and per_key and not is_gate(term):
            raise Refused(
                Reason.SCALE,
                term.node,
                "the scores are multiplied by something that differs from key to key",
                "scale",
            )
        steps.append(Step(effect.kind, effect.value, term))
    return tuple(steps)


def _term(walk: Walk, heads: Heads, traced: Traced, term: Node) -> Operand:
    if traced.effect.kind == "sink":
        layout = (*traced.layout[:-1], ())
        return heads.term(walk.anchor, term, layout)
    return heads.term(walk.anchor, term, traced.layout)


def read_scale(program: Sequence[Step], walk: Walk) -> tuple[float | None, float | None]:
    """(product of the constant scales, None if a tensor takes part; c of the softcap, None if there is
    none).
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
