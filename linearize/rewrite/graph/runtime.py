"""What traced graphs call while they run. The first argument is always the call that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...common.checks import require_true
from ...passes import canonical
from ..attend import attend
from ..call import Call
from ..masks import position_mask
from ..score_terms import Kind, parts_seen


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
    kinds: Sequence[Kind],
    program: str,
    tiled: bool,
    reads_mask: bool,
    causal: bool,
    scaled: Tensor,
) -> Tensor:
    """One site: the owner's child, or the exact program for a child that is softmax.

    query `[B, H, T, D]`, key `[B, Hkv, S, D]`, value `[B, Hkv, S, Dv]`, terms broadcastable to `[B, H, T, S]`
    with kind and value of their step; reads_mask: inputs decide what these hide; causal: a step without a
    term hides what is later; scaled: the query for a child that is no softmax (`raise_.scaled_query`).
    Returns `[B, H, T, Dv]`.
    """
    call.notice(slot)
    child = call.child(slot)
    if child.is_exact:
        call.check_cache(child.spec, query.shape[2])
        return canonical.attention(query, key, value, list(terms), program, tiled)
    mask = _visible(call, terms, kinds) if reads_mask else None
    if mask is not None and causal and mask.shape[2] > 1:
        mask = mask & position_mask(mask.shape[2], mask.shape[3], 0, mask.device)
    elif mask is not None and not causal and child.spec.causal and mask.shape[2] == 1:
        # One row says the same of every query: none of them hides what is later, and this is compared.
        mask = mask.expand(-1, -1, query.shape[2], -1)
    if call.state is None:
        return attend(call, child, scaled, key, value, mask)
    # The owner was traced on the new tokens alone: its mask has their columns, its cache no part in it.
    call.state.expected = True
    call.state.update(key, value)
    return attend(call, child, scaled, key, value, mask, masked_columns=False)


def _visible(call: Call, terms: Sequence[Tensor], kinds: Sequence[Kind]) -> Tensor | None:
    """What all mask terms together let be seen: bool, broadcastable to `[B, H, T, S]`.

    Raises InputError where an input discourages keys instead of hiding them, and the plan knows of no bias.
    """
    seen: Tensor | None = None
    for part, sharp in parts_seen(terms, kinds):
        if sharp is not None and not call.record.biased:
            require_true(
                sharp,
                f"{call.record.name}: the mask holds values that discourage keys and do not "
                "hide them, which the rewritten attention cannot follow; give a mask of bools",
            )
        seen = part if seen is None else seen & part
    return seen
