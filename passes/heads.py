"""Which pieces of a walk are batch and which are heads, how key/value heads are shared, and the operands."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.fx import Node

from .anchors import Refused
from .axes import Atom, Axis, Layout, leaves, pair, resolve
from .relayout import find_relayout
from .site import KVKind, KVMap, Operand, Reason, Relayout
from .walk import Walk, term_layout

Partner = dict[Atom, Atom | None]
"""Canonical piece -> the piece of one operand that holds the same data, None where the operand has none."""


class Heads:
    """Canonical `[B, H, T, D]` axes of a walk.

    Canonical pieces are those of the leading operand of the score product. kv_map says how query heads share
    key/value heads; where keys and values share differently, repeated heads are taken as they are.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        leading, following = _sides(walk.batch)
        self.query_of, self.key_of = (leading, following) if walk.query_leads else (following, leading)
        self.value_of = _sides(walk.value_batch)[1]
        self.batch, self.heads, self.sequence = self._sort()
        keys, values = _kv_map(self.heads, self.key_of), _kv_map(self.heads, self.value_of)
        self.kv_map = keys if keys is not None and keys == values else KVMap(KVKind.EQUAL, 1)

    def _sort(self) -> tuple[Axis, Axis, Axis]:
        walk = self.walk
        own = [leaf for axis in walk.query_own for leaf in leaves(axis)]
        sequence = _sequence(own, leaves(walk.key_axis))
        grouped = [leaf for leaf in own if leaf not in sequence]
        self.query_of.update((leaf, leaf) for leaf in grouped)
        self.key_of.update((leaf, None) for leaf in grouped)

        layout = resolve(walk.query_chain[-1][1])
        places = {leaf: place for place, leaf in enumerate(leaf for axis in layout for leaf in axis)}
        shared = [leaf for first, second in walk.batch for leaf in (leaves(first) or leaves(second))]
        rest = sorted({*shared, *grouped}, key=lambda leaf: self._place(leaf, places, shared))

        heads = {leaf for leaf in rest if leaf in grouped or self._split_from_features(leaf)}
        for _ in range(2):  # shared heads alone do not say where the key/value heads are
            if all(_is_shared(self.key_of, leaf) for leaf in heads):
                heads |= set(_likely_heads([leaf for leaf in rest if leaf not in heads], layout))
        if heads:
            heads |= {leaf for leaf in rest if self._repeats_a_head(leaf, layout)}
        batch = tuple(leaf for leaf in rest if leaf not in heads)
        return batch, tuple(leaf for leaf in rest if leaf in heads), sequence

    def _place(self, leaf: Atom, places: dict[Atom, int], shared: list[Atom]) -> tuple[int, int]:
        """Order of the query's axes; pieces the query does not have come first, in the scores' order."""
        partner = self.query_of.get(leaf)
        place = places.get(partner, -1) if partner is not None else -1
        return place, shared.index(leaf) if leaf in shared else len(shared)

    def _split_from_features(self, leaf: Atom) -> bool:
        """Heads are cut from the feature axis of a projection, in at least one operand."""
        walk = self.walk
        sides = (
            (self.query_of, walk.query_feature),
            (self.key_of, walk.key_feature),
            (self.value_of, walk.value_feature),
        )
        for partner, feature in sides:
            piece = partner.get(leaf)
            if piece is not None and not piece.repeated and piece.root in {f.root for f in leaves(feature)}:
                return True
        return False

    def _repeats_a_head(self, leaf: Atom, layout: Layout) -> bool:
        leading = layout[0] if layout else ()
        alone = len(leading) == 1 and self.query_of.get(leaf) in leading
        return leaf.size.is_Integer is True and _is_shared(self.key_of, leaf) and not alone

    def query(self) -> Operand:
        """`[B, H, T, D]`"""
        groups = (self.batch, self.heads, self.sequence)
        target = [tuple(self.query_of.get(leaf) or leaf for leaf in group) for group in groups]
        return _operand(self.walk.query_chain, (*target, leaves(self.walk.query_feature)), self.walk.query)

    def key(self) -> Operand:
        """`[B, Hkv, S, D]`"""
        walk = self.walk
        return self._shared(walk.key_chain, self.key_of, walk.key_axis, walk.key_feature, walk.key)

    def value(self) -> Operand:
        """`[B, Hkv, S, Dv]`"""
        walk = self.walk
        return self._shared(
            walk.value_chain, self.value_of, walk.value_key_axis, walk.value_feature, walk.value
        )

    def _shared(
        self,
        chain: list[tuple[Node, Layout]],
        partner: Partner,
        sequence: Axis,
        feature: Axis,
        node: Node,
    ) -> Operand:
        batch = tuple(partner.get(leaf) or leaf for leaf in self.batch)
        kept = list(self.heads)
        dropped: set[Atom | None] = set()
        if self.kv_map.kind is not KVKind.EQUAL:
            kept = [leaf for leaf in self.heads if not _is_shared(partner, leaf)]
            dropped = {partner.get(leaf) for leaf in self.heads if leaf not in kept}
        heads = tuple(partner.get(leaf) or leaf for leaf in kept)
        return _operand(chain, (batch, heads, leaves(sequence), leaves(feature)), node, dropped)

    def restore(self) -> Relayout:
        """From `[B, H, T, Dv]` to the layout of the output."""
        layout = (self.batch, self.heads, self.sequence, leaves(self.walk.value_feature))
        relayout = find_relayout(layout, resolve(self.walk.output_layout))
        if relayout is None:
            raise Refused(
                Reason.AXES, self.walk.output, "the output of the attention repeats or drops an axis", "axes"
            )
        return relayout

    def term(self, term: Node, layout: Layout) -> Operand:
        """A score term brought to axes that broadcast to `[B, H, T, S]`; `layout` is that of the scores."""
        target = (self.batch, self.heads, self.sequence, leaves(self.walk.key_axis))
        relayout = find_relayout(term_layout(self.walk.anchor, term, layout), target)
        if relayout is None:
            raise Refused(
                Reason.AXES, self.walk.anchor, f"the axes of {term} do not belong to the scores", "axes"
            )
        return Operand(term, relayout)


def _sequence(own: list[Atom], keys: Axis) -> Axis:
    """The query axis among the pieces that only the query has.

    That is the one of variable size, else one as long as the keys. Pieces of one source axis stay together
    (the rows and columns of an image). A single query has no axis at all.
    """
    if not own:
        return ()
    variable = [leaf for leaf in own if not leaf.size.is_Integer]
    alike = [leaf for leaf in own if leaf.size in {key.size for key in keys}]
    chosen = variable[0] if len(variable) == 1 else (alike or own)[-1]
    return tuple(leaf for leaf in own if leaf.root is chosen.root)


def _likely_heads(rest: list[Atom], layout: Layout) -> list[Atom]:
    """Which batch-like pieces are the heads when nothing tells: the only one of fixed size, or the last.

    A single piece is the heads only when it is not the leading axis.
    """
    if len(rest) >= 2:
        fixed = [leaf for leaf in rest if leaf.size.is_Integer]
        return fixed if len(fixed) == 1 else rest[-1:]
    return [leaf for leaf in rest if layout and leaf not in layout[0]]


def _sides(pairs: Sequence[tuple[Axis, Axis]]) -> tuple[Partner, Partner]:
    """Canonical piece -> piece of the leading and of the following operand."""
    leading: Partner = {}
    following: Partner = {}
    for first, second in pairs:
        ours, theirs = leaves(first), leaves(second)
        matched = pair(ours, theirs) if ours and theirs else None
        if matched is not None:
            leading.update((a, a) for a, _ in matched)
            following.update(matched)
        else:
            held, other = (leading, following) if ours else (following, leading)
            held.update((leaf, leaf) for leaf in ours or theirs)
            other.update((leaf, None) for leaf in ours or theirs)
    return leading, following


def _is_shared(partner: Partner, leaf: Atom) -> bool:
    piece = partner.get(leaf)
    return piece is None or piece.repeated


def _kv_map(heads: Axis, partner: Partner) -> KVMap | None:
    """How keys (or values) cover the heads; None where shared and own pieces alternate."""
    shared = [_is_shared(partner, leaf) for leaf in heads]
    if not any(shared):
        return KVMap(KVKind.EQUAL, 1)
    repeats = [leaf.size for leaf, repeated in zip(heads, shared, strict=True) if repeated]
    if not all(size.is_Integer for size in repeats):
        return None
    groups = math.prod(int(size) for size in repeats)
    if shared == sorted(shared):
        return KVMap(KVKind.INTERLEAVED, groups)
    return KVMap(KVKind.TILED, groups) if shared == sorted(shared, reverse=True) else None


def _operand(
    chain: list[tuple[Node, Layout]],
    target: tuple[Axis, ...],
    node: Node,
    dropped: set[Atom | None] | frozenset[Atom | None] = frozenset(),
) -> Operand:
    """The latest tensor of the chain without `dropped` pieces, if possible one whose axes stay whole."""
    best: Operand | None = None
    for current, layout in reversed(chain):
        held = resolve(layout)
        if any(leaf in dropped for axis in held for leaf in axis):
            continue
        relayout = find_relayout(held, target, full_axes=(0, 1))
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
