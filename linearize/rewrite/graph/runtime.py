"""What the graphs of grafted owners call while they run: the live cache, and the attention of a site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...passes import canonical
from ...planning.plan import child_name
from ..interface import attend, exact_call
from ..masks import visible


def item(pair: Any, position: int) -> Any:
    """One of two results; fx has no tuple unpacking."""
    return pair[position]


def update_cache(cache: Any, keys: Tensor, values: Tensor, index: int) -> Any:
    """The owner's `cache.update`: all keys and values so far."""
    return cache.update(keys, values, index)


def attend_site(
    owner: Any,
    slot: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Sequence[Tensor],
    kinds: Sequence[str],
    program: str,
    tiled: bool,
) -> Tensor:
    """One site: the owner's child, or the exact program for a child that is softmax.

    query `[B, H, T, D]`, key `[B, Hkv, S, D]`, value `[B, Hkv, S, Dv]`, terms broadcastable to `[B, H, T, S]`
    with the kind of their step; returns `[B, H, T, Dv]`.
    """
    if owner._linearize_log is not None:
        owner._linearize_log.append((slot, None))
    mask = _visible(terms, kinds) if owner._linearize_padding else None
    if exact_call(owner, slot):
        return canonical.attention(query, key, value, list(terms), program, tiled)
    state = owner._linearize_state
    if state is not None:
        # The owner was traced on the new tokens alone: its mask has their columns, its cache no part in it.
        state.expected = True
        state.update(key, value)
        return attend(owner, slot, query, key, value, mask, None)
    start = owner._linearize_start
    cross = getattr(owner, child_name(slot)).spec.cross
    if owner._linearize_seen is not None and cross:
        start = owner._linearize_seen - query.shape[2]
    return attend(owner, slot, query, key, value, mask, start)


def _visible(terms: Sequence[Tensor], kinds: Sequence[str]) -> Tensor | None:
    """What all mask terms together let be seen: bool, broadcastable to `[B, H, T, S]`."""
    seen: Tensor | None = None
    for term, kind in zip(terms, kinds, strict=True):
        if kind not in ("add", "fill", "keep", "sdpa"):
            continue
        part = ~term.bool() if kind == "fill" else term.bool() if kind == "keep" else visible(term)
        seen = part if seen is None else seen & part
    return seen
