"""Whole sequences under the attention of `salient.py`: what is kept is selected first, then all is attended.

Selecting goes from block to block with a state, and reads queries and keys. Attending is independent for each
block, and gradients go through it alone: which tokens are kept has none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import salient
from .padding import Ranks
from .salient import BLOCK, Sizes
from .salient_recurrent import extend
from .softmax import Scores, attend, weights_of_seen
from .tensors import are_ordinary, take_rows, widen

Extend = Callable[..., Tensor]
_AT_ONCE = 16
"""Blocks whose keys and values are gathered at a time."""
VOTERS = 64
"""Queries that vote for the tokens which all queries of a bidirectional site see."""


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sizes,
    rule: Scores,
    key_mask: Tensor | None = None,
    extend: Extend = extend,
) -> Tensor:
    """Causal attention of every token.

    Args:
        query: [B, Hkv, R, T, D]: the R query heads of each key/value head.
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, Dv].
        sizes: How many tokens are seen exactly.
        rule: How the scores are made.
        key_mask: Bool [B, T], True for real tokens: only these are counted and seen. None: all are.
        extend: The form of `salient_recurrent.extend` that selects.

    Returns:
        [B, Hkv, R, T, Dv], in float32 or wider; zeros for padded queries.
    """
    ranks = None if key_mask is None else Ranks(key_mask)
    if ranks is not None:
        query, key, value = (ranks.to_front(x) for x in (query, key, value))
    query, key, value = widen(query), widen(key), widen(value)
    length = key.shape[2]
    blocks = -(-length // BLOCK)
    kept = None
    if (blocks - 1) * BLOCK > sizes.window:
        with torch.no_grad():
            kept = select(query, key, sizes, rule, extend)
    # Rows past the last token, and before the first: no query that counts sees them.
    query = F.pad(query, (0, 0, 0, blocks * BLOCK - length)).unflatten(3, (blocks, BLOCK))
    near = [F.pad(x, (0, 0, sizes.window, blocks * BLOCK - length)) for x in (key, value)]
    outputs = []
    for first in range(0, blocks, _AT_ONCE):
        last = min(first + _AT_ONCE, blocks)
        span = slice(first * BLOCK, last * BLOCK + sizes.window)
        keys, values = (x[:, :, span].unfold(2, sizes.window + BLOCK, BLOCK).mT for x in near)
        chosen = None if kept is None else kept[:, :, first:last]
        rows = query[:, :, :, first:last]
        outputs.append(_attend(rows, keys, values, key, value, chosen, first, sizes, rule))
    out = torch.cat(outputs, 3).flatten(3, 4)[:, :, :, :length]
    return out if ranks is None else ranks.to_columns(out)


def select(query: Tensor, key: Tensor, sizes: Sizes, rule: Scores, extend: Extend = extend) -> Tensor:
    """Positions of the tokens that each block keeps, int64 [B, Hkv, blocks, K], -1 for none.

    Args:
        query: [B, Hkv, R, T, D].
        key: [B, Hkv, T, D].
        sizes, rule, extend: As for `forward`.
    """
    batch, kv_heads, _, length, dim = query.shape
    state = salient.new(batch, kv_heads, dim, 1, sizes, dtype=key.dtype, device=key.device)
    # In the place of the values stand the positions, so that they say what is kept.
    position = torch.arange(length, device=key.device, dtype=key.dtype)
    position = position[:, None].expand(batch, kv_heads, -1, 1)
    found = []
    for start in range(0, length, BLOCK):
        block = slice(start, start + BLOCK)
        extend(query[:, :, :, block], key[:, :, block], position[:, :, block], state, sizes, rule)
        there = state.scores[:, :, : sizes.kept] > -torch.inf
        found.append(state.values[:, :, : sizes.kept, 0].long().where(there, -1))
    return torch.stack(found, 2)


def _attend(
    query: Tensor,
    near_keys: Tensor,
    near_values: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor | None,
    first: int,
    sizes: Sizes,
    rule: Scores,
) -> Tensor:
    """Blocks from `first` on: query [B, Hkv, R, n, BLOCK, D], near keys [B, Hkv, n, window + BLOCK, D], kept
    [B, Hkv, n, K] of key and value [B, Hkv, T, ...] -> [B, Hkv, R, n, BLOCK, Dv]."""
    count, span = near_keys.shape[2:4]
    block = torch.arange(first, first + count, device=query.device)[:, None, None] * BLOCK
    own = block + torch.arange(BLOCK, device=query.device)[:, None]
    position = block - sizes.window + torch.arange(span, device=query.device)
    hidden = (position < 0) | (position > own)  # [n, BLOCK, span]
    hidden = hidden.expand(*key.shape[:2], -1, -1, -1)
    keys, values = near_keys, near_values
    if kept is not None:
        keys = torch.cat([_rows(key, kept), near_keys], 3)
        values = torch.cat([_rows(value, kept), near_values], 3)
        hidden = torch.cat([(kept < 0)[..., None, :].expand(-1, -1, -1, BLOCK, -1), hidden], 4)
    return _softmax(query, keys, values, hidden, rule)


def bidirectional(
    query: Tensor, key: Tensor, value: Tensor, sizes: Sizes, rule: Scores, key_mask: Tensor | None = None
) -> Tensor:
    """Attention of every token to those at most `window` away on either side, and to the kept ones.

    One selection serves the whole sequence: the first `sinks` tokens, and of the others the `salient` ones to
    which `VOTERS` queries, evenly spread, give most weight. Arguments and output as for `forward`.
    """
    ranks = None if key_mask is None else Ranks(key_mask)
    if ranks is not None:
        query, key, value = (ranks.to_front(x) for x in (query, key, value))
    query, key, value = widen(query), widen(key), widen(value)
    batch, length = key.shape[0], key.shape[2]
    count = key.new_full((batch,), length, dtype=torch.int64) if ranks is None else ranks.count
    window, blocks = min(sizes.window, length), -(-length // BLOCK)
    kept = None
    if sizes.kept and length > sizes.window + 1:
        with torch.no_grad():
            kept = _landmarks(query, key, count, sizes, rule)
    few = length <= 2 * (2 * window + sizes.kept)
    if few and rule.softcap is None and are_ordinary(query, key, value):
        out = _dense(query, key, value, kept, count, window, rule.scale)
        return out if ranks is None else ranks.to_columns(out)
    after = blocks * BLOCK - length + window
    near = [F.pad(x, (0, 0, window, after)) for x in (key, value)]
    query = F.pad(query, (0, 0, 0, blocks * BLOCK - length)).unflatten(3, (blocks, BLOCK))
    outputs = []
    for first in range(0, blocks, _AT_ONCE):
        last = min(first + _AT_ONCE, blocks)
        block = torch.arange(first, last, device=key.device)[:, None, None] * BLOCK
        own = block + torch.arange(BLOCK, device=key.device)[:, None]
        position = block - window + torch.arange(BLOCK + 2 * window, device=key.device)
        hidden = (position < 0) | ((position - own).abs() > window)  # [n, BLOCK, span]
        hidden = hidden | (position >= count[:, None, None, None])  # [B, n, BLOCK, span]
        hidden = hidden[:, None].expand(-1, key.shape[1], -1, -1, -1)
        span = slice(first * BLOCK, last * BLOCK + 2 * window)
        keys, values = (x[:, :, span].unfold(2, BLOCK + 2 * window, BLOCK).mT for x in near)
        if kept is not None:
            far = (kept[:, :, None, None] - own).abs() > window  # near ones are seen as such
            far = far & (kept >= 0)[:, :, None, None]
            hidden = torch.cat([~far, hidden], 4)
            keys, values = (
                torch.cat([_rows(x, kept)[:, :, None].expand(-1, -1, last - first, -1, -1), n], 3)
                for x, n in ((key, keys), (value, values))
            )
        outputs.append(_softmax(query[:, :, :, first:last], keys, values, hidden, rule))
    out = torch.cat(outputs, 3).flatten(3, 4)[:, :, :, :length]
    return out if ranks is None else ranks.to_columns(out)


def _dense(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor | None, count: Tensor, window: int, scale: float
) -> Tensor:
    """The same by one masked softmax over all tokens: faster while these are few. kept [B, Hkv, k]."""
    repeats, length = query.shape[2], key.shape[2]
    rows, key, value = (
        query.flatten(1, 2),
        key.repeat_interleave(repeats, 1),
        value.repeat_interleave(repeats, 1),
    )
    place = torch.arange(length, device=key.device)
    real = (place < count[:, None])[:, None, None]
    if length <= window + 1 and bool(real.all()):
        out = F.scaled_dot_product_attention(rows, key, value, scale=scale)
        return out.unflatten(1, query.shape[1:3])
    near = (place[:, None] - place).abs() <= window
    chosen = torch.zeros(*query.shape[:2], 1, length + 1, dtype=torch.bool, device=key.device)
    if kept is not None:
        chosen.scatter_(3, kept.where(kept >= 0, length)[:, :, None], True)
    # A row past the last token sees itself, so that its gradients are finite; it is no one's.
    own = torch.eye(length, dtype=torch.bool, device=key.device) & ~real
    outputs = []
    for at in range(query.shape[0]):  # the masks of all rows at once would take more than all else
        row = slice(at, at + 1)
        seen = ((near | chosen[row, ..., :length]) & real[row]) | own[row]
        mask = seen.repeat_interleave(repeats, 1)
        outputs.append(
            F.scaled_dot_product_attention(rows[row], key[row], value[row], attn_mask=mask, scale=scale)
        )
    return torch.cat(outputs).unflatten(1, query.shape[1:3])


def _landmarks(query: Tensor, key: Tensor, count: Tensor, sizes: Sizes, rule: Scores) -> Tensor:
    """Positions that every query of a bidirectional site sees, int64 [B, Hkv, k], -1 for none."""
    length = key.shape[2]
    voters = (torch.arange(VOTERS, device=key.device) * count[:, None]) // VOTERS  # [B, VOTERS]
    rows = take_rows(query, voters)
    absent = torch.arange(length, device=key.device) >= count[:, None]
    scores = rule.of(rows, key)
    votes = weights_of_seen(scores, absent[:, None, None, None], lambda: rule.of(rows.double(), key.double()))
    mass = votes.nan_to_num(nan=0.0).sum((2, 3))  # [B, Hkv, T]
    mass[:, :, : sizes.sinks] = torch.inf
    mass = mass.masked_fill(absent[:, None], -torch.inf)
    best, index = mass.sort(dim=2, descending=True, stable=True)
    number = min(sizes.kept, length)
    return index[:, :, :number].where(best[:, :, :number] > -torch.inf, -1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, Hkv, ..., k] of x [B, Hkv, T, D]: [B, Hkv, ..., k, D]; any row where it is -1."""
    flat = index.clamp_min(0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, flat).unflatten(2, index.shape[2:])


def _softmax(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, rule: Scores) -> Tensor:
    """query [B, Hkv, R, n, BLOCK, D], keys [B, Hkv, n, L, D], values likewise, hidden [B, Hkv, n, BLOCK, L]
    -> [B, Hkv, R, n, BLOCK, Dv]; a query that sees nothing gets zeros."""
    return attend(query.transpose(2, 3), keys, values, hidden, rule)[0].transpose(2, 3)
