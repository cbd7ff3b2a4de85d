"""Tokens after a state of `salient.py`: any number of them, or a tree of drafts."""

from __future__ import annotations

import torch
from torch import Tensor

from .padding import Ranks
from .salient import BLOCK, Sizes, State, advance, positions, queries_per_vote, seen
from .softmax import Scores, attend, product, weights_of_seen
from .tensors import at_lag, widen


def extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    sizes: Sizes,
    rule: Scores,
    conv_weight: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Any number of tokens after the state, which takes them in.

    Args:
        query: [B, Hkv, R, T, D]: the R query heads of each key/value head.
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, Dv].
        state: Changed in place.
        sizes: As when the state was made.
        rule: How the scores are made.
        conv_weight: [Hkv, R, K], weights of the last K values, the present one's first, which are added; K is
            at most window + 1. None: none are.
        real: Bool [B, T], True for tokens that count; the others change nothing and their output is zero.
            None: all count.

    Returns:
        [B, Hkv, R, T, Dv], in float32 or wider.
    """
    ranks = None if real is None else Ranks(real)
    if ranks is not None:
        query, key, value = (ranks.to_front(x) for x in (query, key, value))
    outputs, start = [], 0
    while start < key.shape[2]:
        # A piece ends with a block where all sequences of the batch are equally long: then it has one part.
        space = BLOCK - state.length % BLOCK
        size = int(space[0]) if ranks is None and bool((space == space[0]).all()) else BLOCK
        q, k, v = (x[..., start : start + size, :] for x in (query, key, value))
        count = None if ranks is None else ranks.count - start
        outputs.append(_extend(q, k, v, count, state, sizes, rule, conv_weight))
        start += size
    out = torch.cat(outputs, 3)
    return out if ranks is None else ranks.to_columns(out)


def tree(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    sizes: Sizes,
    rule: Scores,
    conv_weight: Tensor | None,
    depth: Tensor,
    ancestors: Tensor,
) -> Tensor:
    """N draft nodes after the state, which is only read.

    Args:
        query: [B, Hkv, R, N, D].
        key: [B, Hkv, N, D].
        value: [B, Hkv, N, Dv].
        state: Only read.
        sizes: As when the state was made.
        rule, conv_weight: As for `extend`.
        depth: int64 [B, N]; a node sits at position length + depth; at most `DELAY` and at most the window.
        ancestors: Bool [B, N, N]; [u, a] is True when a is u or an ancestor of u.

    Returns:
        [B, Hkv, R, N, Dv], in float32 or wider.
    """
    # How many selections each node is ahead of the state.
    wanted = (state.length[:, None] + depth) // BLOCK - state.block[:, None]
    query, key, value = widen(query), widen(key), widen(value)
    own = rule.of(query, key)
    position = state.length[:, None] + depth
    ring = widen(state.values[:, :, sizes.kept :])
    convolved = _convolution(conv_weight, position, positions(state, sizes), None, ring)
    convolved = convolved + _convolution(conv_weight, position, position, ancestors, value)
    out = None
    for ahead in range(int(wanted.max()) + 1):
        if ahead:
            state, _ = advance(state, sizes)
        if not bool((wanted == ahead).any()):
            continue
        past = rule.of(query, widen(state.keys))
        hidden = ~seen(state, sizes)[:, :, None, None].expand(-1, -1, 1, key.shape[2], -1)
        # A draft is near whatever its depth: no tree is deeper than the window.
        hidden = torch.cat([hidden, ~ancestors[:, None, None].expand(-1, key.shape[1], 1, -1, -1)], 4)
        keys = state.keys

        def in_double(keys: Tensor = keys) -> Tensor:
            return rule.of(query.double(), torch.cat([keys.double(), key.double()], 2))

        weights = weights_of_seen(torch.cat([past, own], 4), hidden, in_double)
        found = product(weights, torch.cat([widen(state.values), value], 2), ~hidden)
        out = found if out is None else torch.where((wanted == ahead)[:, None, None, :, None], found, out)
    assert out is not None
    return out + convolved


def _extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    count: Tensor | None,
    state: State,
    sizes: Sizes,
    rule: Scores,
    conv_weight: Tensor | None,
) -> Tensor:
    """At most `BLOCK` tokens, of which the first `count` [B] are real (None: all)."""
    left = torch.full_like(state.length, key.shape[2])
    if count is not None:
        left = torch.minimum(left, count.clamp_min(0))
    ring, written = state.keys.shape[2] - sizes.kept, torch.zeros_like(left)
    query, out = widen(query), None
    while True:
        # What a token overwrites must have left the window of the block that the state is for.
        room = state.block * BLOCK - sizes.window + ring - state.length
        taken = torch.minimum(left, room)
        index = torch.arange(key.shape[2], device=key.device) - written[:, None]
        here = (index >= 0) & (index < taken[:, None])
        position = state.length[:, None] + index
        _write(state, sizes, key, value, position, here)
        state.length.add_(taken)
        found = _attend(query, state, sizes, rule, position, here)
        last = widen(state.values[:, :, sizes.kept :])
        found = found + _convolution(conv_weight, position, positions(state, sizes), here[:, :, None], last)
        out = found if out is None else torch.where(here[:, None, None, :, None], found, out)
        left, written = left - taken, written + taken
        due = left > 0
        if not bool(due.any()):
            return out
        after, _ = advance(state, sizes, due)
        for old, new in zip(state, after, strict=True):
            old.copy_(new)
        if queries_per_vote(state, sizes) > 1:
            _clear_votes(state, due)


def _write(state: State, sizes: Sizes, key: Tensor, value: Tensor, position: Tensor, here: Tensor) -> None:
    """Key [B, Hkv, T, D] and value into the ring at `position` [B, T], those that are `here` [B, T]."""
    rows = sizes.kept + position % (state.keys.shape[2] - sizes.kept)
    rows = rows[:, None].expand(-1, key.shape[1], -1)
    for whole, new in ((state.keys, key), (state.values, value)):
        index = rows[..., None].expand(-1, -1, -1, whole.shape[3])
        old = whole.gather(2, index)
        whole.scatter_(2, index, torch.where(here[:, None, :, None], new.to(whole.dtype), old))
    keep = ~here[:, None]
    state.scores.scatter_(2, rows, state.scores.gather(2, rows) * keep)
    rows = rows[:, :, None].expand(-1, -1, state.votes.shape[2], -1)
    state.votes.scatter_(3, rows, state.votes.gather(3, rows) * keep[:, :, None])


def _attend(
    query: Tensor, state: State, sizes: Sizes, rule: Scores, position: Tensor, here: Tensor
) -> Tensor:
    """Attention of queries [B, Hkv, R, T, D] at `position` [B, T], and their votes, where `here` [B, T]."""
    wanted = (position // BLOCK - state.block[:, None]).where(here, 0)  # selections ahead of the state
    out, votes, now, source = None, None, state, None
    for ahead in range(int(wanted.max()) + 1):
        if ahead:  # only where tokens can be taken back
            now, rows = advance(now, sizes)
            source = rows if source is None else source.gather(2, rows)
        found, weights = _look(query, now, sizes, rule, position, here & (wanted == ahead))
        if source is not None:  # in the order of the rows of `state`
            index = source[:, :, None].expand(weights.shape)
            weights = torch.zeros_like(weights).scatter_add_(3, index, weights)
        out = found if out is None else out + found
        votes = weights if votes is None else votes + weights
    assert out is not None and votes is not None
    _vote(state, votes, sizes, position, here)
    return out


def _look(
    query: Tensor, state: State, sizes: Sizes, rule: Scores, position: Tensor, here: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [B, Hkv, R, T, Dv] of the queries that are `here` [B, T], zeros elsewhere, and the weights that
    they give to each row, [B, Hkv, T, K + R]."""
    later = positions(state, sizes)[:, None] > position[:, :, None]  # [B, T, R]
    later = torch.cat([later.new_zeros(*later.shape[:2], sizes.kept), later], 2)
    hidden = ~seen(state, sizes)[:, :, None] | later[:, None] | ~here[:, None, :, None]
    out, weights = attend(query, widen(state.keys), widen(state.values), hidden, rule)
    return out, weights.nan_to_num(nan=0.0).sum(2)  # what is not a number gives no votes


def _vote(state: State, weights: Tensor, sizes: Sizes, position: Tensor, here: Tensor) -> None:
    """Keep the weights [B, Hkv, T, K + R] of the queries at `position` [B, T] until they are counted."""
    if queries_per_vote(state, sizes) > 1:  # all queries are of the block that the state is for
        index = (state.block % state.votes.shape[2])[:, None, None, None]
        index = index.expand(-1, weights.shape[1], 1, weights.shape[3])
        state.votes.scatter_add_(2, index, weights.sum(2, keepdim=True).to(state.votes.dtype))
    else:
        index = (position % state.votes.shape[2])[:, None, :, None].expand(weights.shape)
        old = state.votes.gather(2, index)
        state.votes.scatter_(
            2, index, torch.where(here[:, None, :, None], weights.to(state.votes.dtype), old)
        )


def _clear_votes(state: State, due: Tensor) -> None:
    """Make room for the votes of the block that the state is now for, in the rows that are `due` [B]."""
    index = (state.block % state.votes.shape[2])[:, None, None, None]
    index = index.expand(-1, state.votes.shape[1], 1, state.votes.shape[3])
    old = state.votes.gather(2, index)
    state.votes.scatter_(2, index, old.masked_fill(due[:, None, None, None], 0))


def _convolution(
    conv_weight: Tensor | None, position: Tensor, past: Tensor, seen: Tensor | None, value: Tensor
) -> Tensor | float:
    """Sum of the values [B, Hkv, N, Dv] at `past` [B, N], weighed by their distance to `position` [B, T]:
    [B, Hkv, R, T, Dv], or 0.0 without. seen: bool, broadcastable to [B, T, N]; what is before 0 never is."""
    if conv_weight is None:
        return 0.0
    lag = position[:, :, None] - past[:, None]
    there = (past >= 0)[:, None] if seen is None else (past >= 0)[:, None] & seen
    table = at_lag(conv_weight.to(value.dtype), lag) * there  # [Hkv, R, B, T, N]
    tapped = there & (lag >= 0) & (lag < conv_weight.shape[2])
    return product(table.permute(2, 0, 1, 3, 4), value, tapped[:, None, None])
