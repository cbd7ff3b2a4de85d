"""The attention of one site in one call, whichever route the call came by.

There are four ways: after a state of constant size, with the summary of an encoder's output, over all keys by
the mechanism, and by exact softmax. Shapes everywhere: query `[B, H, T, D]`, key `[B, Hkv, S, D]`, value
`[B, Hkv, S, Dv]`, output `[B, H, T, Dv]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.checks import is_traced, require_true
from ..errors import InputError
from .call import Call
from .documents import attend_documents, side_by_side
from .masks import (
    DOCUMENTS_AND_CACHE,
    DOCUMENTS_APART,
    documents_in,
    documents_of_row,
    key_mask_of,
    new_tokens,
    position_mask,
)
from .padded_queries import with_padded_queries


def attend(
    call: Call,
    child: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    masked_columns: bool = True,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Run a child of the owner on one call's tensors.

    Args:
        call: the call of the owner.
        child: the attention module of the site that runs.
        query, key, value: see the module's docstring; key and value are all of them, or the new ones where
            the call has a state.
        mask: bool (True keeps) or additive, broadcastable to `[B, H, T, S]`, or what `compact_mask` gives;
            None when all may be seen.
        masked_columns: the mask has a column for every key of the cache, not only for the new ones.
        bias: relative position bias `[1, H, T, S]`, exact softmax and mechanisms that keep it.
        sinks: logits per head `[H]` or per query `[B, H, T, 1]`, exact softmax only.
        dropout: probability on the weights of exact softmax in training; None for what the plan says.
        documents: `[B, T]` as in `documents.py`, of a row that holds several; the mask may give them as well.

    Raises:
        InputError: the mask says more than the mechanism can follow, or the cache was left midway.
    """
    start = call.query_start(child.spec, query.shape[2])
    call.check_cache(child.spec, query.shape[2])
    bias = bias if child.is_exact or child.keeps_bias else None
    given = documents_of_row(mask)
    if given is not None:
        documents, mask = given, None
    if documents is not None:
        return _in_documents(call, child, query, key, value, mask, documents, bias, sinks, dropout)
    one_row = mask is not None and mask.is_floating_point() and mask.ndim == 4 and mask.shape[2] == 1
    if one_row and query.shape[2] > 1 and child.spec.causal and not child.is_exact:
        # `compact_mask` gives such masks of bools; this one is the caller's, and lets later keys be seen.
        raise InputError(
            f"{call.record.path or 'the model'}: the attention mask has one row for all queries, and the "
            "rewritten attention is causal; give a 2-D padding mask, or the whole square"
        )
    if call.state is not None:
        return _after_state(call, child, query, key, value, mask, start if masked_columns else None)
    key_mask = key_mask_of(mask, key.shape[0], key.shape[2])
    if mask is not None and key_mask is not None and call.record.follows_masks and not child.is_exact:
        documents = documents_in(mask, key_mask, child.spec, start, call.record.path, call.record.biased)
        if documents is not None:
            out = _in_documents(call, child, query, key, value, None, documents, bias, None, None)
            return _with_padded_queries(call, child, out, query, key, value, mask, key_mask)
    if call.cross is not None and key is call.cross.keys and value is call.cross.values:
        return child.recall(query, key, value, call.cross.summary(child, key_mask), start)
    if start is not None and child.spec.causal:
        key_mask = _filled(key_mask, key, start, query.shape[2])
    if child.is_exact:
        return _exact(child, query, key, value, mask, key_mask, start, bias, sinks, dropout)
    more = {"bias": bias} if child.keeps_bias else {}
    out = child(query, key, value, key_mask=key_mask, query_start=start, **more)
    return _with_padded_queries(call, child, out, query, key, value, mask, key_mask)


def _with_padded_queries(
    call: Call,
    child: Any,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """The output, with what padded tokens of one sequence get in a module that is not of transformers."""
    own = call.record.graphs is not None and query.shape[2] == key.shape[2] and not child.spec.cross
    if not own or key_mask is None or is_traced(key_mask) or bool(key_mask.all()):
        return out
    return with_padded_queries(out, child.spec, query, key, value, mask, key_mask)


def _in_documents(
    call: Call,
    child: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    documents: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout: float | None,
) -> Tensor:
    """Each document of a row by itself; a state keeps nothing of them, and takes no token after them."""
    where = call.record.name
    if query.shape[2] != key.shape[2] or documents.shape[1] != key.shape[2]:
        raise InputError(f"{where}: {DOCUMENTS_AND_CACHE}")
    if bias is not None:
        raise InputError(f"{where}: a position bias cannot be followed in a row with several documents")
    if sinks is not None and sinks.ndim > 1:
        raise InputError(
            f"{where}: sinks that differ by query cannot be followed in a row with several documents"
        )
    if child.spec.window is not None and (child.is_exact or child.keeps_window):
        require_true(side_by_side(documents), f"{where}: {DOCUMENTS_APART}")
    if call.state is not None:
        call.state.skip()
    real = key_mask_of(mask, key.shape[0], key.shape[2])
    if real is not None:
        documents = torch.where(real, documents, -documents)
    more = {"sinks": sinks, "dropout": dropout} if child.is_exact else {}

    def attention(query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        return child(query, key, value, key_mask=real, **more)

    return attend_documents(attention, query, key, value, documents)


def _after_state(
    call: Call,
    child: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    start: int | Tensor | None,
) -> Tensor:
    """After what the state has seen; key and value are the new tokens'."""
    state, real = call.state, None
    assert state is not None
    if mask is not None:
        check_columns(mask, key.shape[2], start, call.record.name)
    if state.tree is None:  # the nodes of a draft tree are all real, and its mask is not causal
        count = key.shape[2]
        keys = None if mask is None else key_mask_of(mask, key.shape[0], mask.shape[-1])
        if mask is not None and keys is not None and mask.ndim == 4 and mask.shape[2] == count:
            documents = documents_in(mask, keys, child.spec, start, call.record.path, call.record.biased)
            if documents is not None:
                return _in_documents(call, child, query, key, value, None, documents, None, None, None)
        if keys is not None:
            child.check_key_mask(keys)
        if start is not None and call.is_first:
            state.hear(keys, count, child.spec.window)
        real = new_tokens(keys, count, start)
    return state.extend(child, query, key, value, real)


def check_columns(mask: Tensor, count: int, start: int | Tensor | None, where: str) -> None:
    """Raise InputError where a mask has no columns for the `count` new tokens, the first in column `start`.

    So it is in models that size their masks by a layer of the cache that counts no tokens.
    """
    if torch.compiler.is_compiling() or not isinstance(start, int) or mask.shape[-1] >= start + count:
        return
    raise InputError(
        f"{where}: the attention mask has {mask.shape[-1]} column(s) for a cache of {start} tokens and "
        f"{count} new one(s), so that padding cannot be told from tokens; give sequences without padding, "
        "one batch for each length, or use_cache=False"
    )


def _exact(
    child: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_mask: Tensor | None,
    start: int | Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout: float | None,
) -> Tensor:
    """Softmax under the whole mask, where it has a row for each query, with bias and sinks."""
    full = mask if mask is not None and mask.shape[-2] == query.shape[2] else None
    if full is None and child.spec.causal and bias is not None:
        full = position_mask(query.shape[2], key.shape[2], start, key.device)
    if bias is not None:
        full = _biased(bias[..., : key.shape[2]], full)
    return child(
        query, key, value, key_mask=key_mask, query_start=start, mask=full, sinks=sinks, dropout=dropout
    )


def _filled(key_mask: Tensor | None, key: Tensor, start: int | Tensor, queries: int) -> Tensor:
    """Real keys `[B, S]` without the slots of a static cache after the last query, which are empty."""
    columns = torch.arange(key.shape[2], device=key.device)
    filled = (columns < start + queries)[None].expand(key.shape[0], -1)
    return filled if key_mask is None else key_mask & filled


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Additive mask of a score bias where `mask` (bool or additive) lets it be seen."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask
