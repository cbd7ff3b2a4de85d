"""What traced graphs call while they run. The first argument is always the call that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...passes import canonical
from ..attend import attend
from ..call import Call
from ..masks import visible


def attribute(call: Call, path: str) -> Any:
    """The attribute of the live owner at a dotted path, at this moment."""
    return resolve(call.owner, path)


def call_child(call: Call, path: str, value: Tensor) -> Tensor:
    """The child at `path` as it is now, called with `value`."""
    result = resolve(call.owner, path)(value)
    return result if isinstance(result, Tensor) else result[0]


def resolve(owner: Any, path: str) -> Any:
    """The attribute of a module at a dotted path."""
    found: Any = owner
    for name in path.split("."):
        found = getattr(found, name)
    return found


def item(pair: Any, position: int) -> Any:
    """One of two results; fx has no tuple unpacking."""
    return pair[position]


def update_cache(call: Call, keys: Tensor, values: Tensor, index: int) -> Any:
    """The owner's `cache.update`: all keys and values so far."""
    assert call.cache is not None
    return call.cache.update(keys, values, index)


def attend_site(
    call: Call,
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
    call.notice(slot)
    if call.child(slot).is_exact:
        call.check_cache(slot, query.shape[2])
        return canonical.attention(query, key, value, list(terms), program, tiled)
    mask = _visible(terms, kinds) if call.record.padded else None
    if call.state is None:
        return attend(call, slot, query, key, value, mask)
    # The owner was traced on the new tokens alone: its mask has their columns, its cache no part in it.
    call.state.expected = True
    call.state.update(key, value)
    return attend(call, slot, query, key, value, mask, masked_columns=False)


def _visible(terms: Sequence[Tensor], kinds: Sequence[str]) -> Tensor | None:
    """What all mask terms together let be seen: bool, broadcastable to `[B, H, T, S]`."""
    seen: Tensor | None = None
    for term, kind in zip(terms, kinds, strict=True):
        if kind not in ("add", "fill", "keep", "sdpa"):
            continue
        part = ~term.bool() if kind == "fill" else term.bool() if kind == "keep" else visible(term)
        seen = part if seen is None else seen & part
    return seen
