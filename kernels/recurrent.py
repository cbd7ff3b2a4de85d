"""The causal operator with a state of constant size, in plain PyTorch: prefill, step and tree.

State of one layer (G = group_size, W a multiple of G, all rows of the batch independent):

    recurrent    [B, Hkv, D, Dv] float32   sum of k^T v over the first `folded` tokens
    key_window   [B, Hkv, W, D]            the key of position p, divided by its norm, lies in row p % W
    value_window [B, Hkv, W, Dv]           the value of position p likewise
    length       [B] int64                 tokens so far
    folded       [B] int64                 a multiple of G; length - folded <= W

A group moves from the window to `recurrent` only when its rows are needed: that is what makes `length -= n`
an exact rewind. A query at position t sees `recurrent` and earlier groups linearly (alpha), its own group
through the activation, and the last K tokens through the convolution, in whatever pieces the tokens arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import chunk
from .activations import ACTIVATIONS
from .padding import Ranks
from .tensors import are_finite, product_of_seen, take_rows, unit

Fold = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Rows that leave the window, key [B, Hkv, n, D] and value -> factors k and v of what `recurrent` sums."""


class State(NamedTuple):
    """The five tensors of the module's docstring; functions here change them in place."""

    recurrent: Tensor
    key_window: Tensor
    value_window: Tensor
    length: Tensor
    folded: Tensor


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recurrent: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    length: Tensor,
    folded: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    active: Tensor | None,
) -> Tensor:
    """One token after the state, which takes it in.

    Args:
        query: [B, H, 1, D]; query head h reads key/value head h // (H // Hkv).
        key: [B, Hkv, 1, D].
        value: [B, Hkv, 1, Dv].
        recurrent, key_window, value_window, length, folded: The state, changed in place.
        alpha, local_scale, conv_weight, activation, group_size, normalize: As for `chunk.forward`.
        active: Bool [B]; the other rows keep their state, and their output is zero. None: all are active.

    Returns:
        [B, H, 1, Dv] in the dtype of `value`.
    """
    state = State(recurrent, key_window, value_window, length, folded)
    if active is not None:  # whatever padding holds, NaN included
        query, key, value = (x.masked_fill(~active[:, None, None, None], 0) for x in (query, key, value))
    self_only = torch.ones(query.shape[0], 1, 1, dtype=torch.bool, device=query.device)
    depth = torch.zeros_like(length)[:, None]
    tables = (alpha, local_scale, conv_weight)
    out = tree(query, key, value, *state, depth, self_only, *tables, activation, group_size, normalize)
    append(key, value, state, group_size, normalize, None if active is None else active[:, None])
    return out if active is None else out * active[:, None, None, None]


def tree(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recurrent: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    length: Tensor,
    folded: Tensor,
    depth: Tensor,
    ancestors: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
) -> Tensor:
    """N draft nodes after the state, which is only read.

    Position decides what is the same group, so a branch may cross a group border anywhere; the convolution
    reads the ancestors, then what was committed.

    Args:
        query: [B, H, N, D].
        key: [B, Hkv, N, D].
        value: [B, Hkv, N, Dv].
        recurrent, key_window, value_window, length, folded: The state.
        depth: int64 [B, N]; a node sits at position length + depth.
        ancestors: Bool [B, N, N]; [u, a] is True when a is u or an ancestor of u.
        alpha, local_scale, conv_weight, activation, group_size, normalize: As for `chunk.forward`.

    Returns:
        [B, H, N, Dv] in the dtype of `value`.
    """
    kv_heads, window = key.shape[1], key_window.shape[2]
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    act = ACTIVATIONS[activation].value
    q, k = _normalized(query, dtype, normalize), _normalized(key, dtype, normalize)
    q = q.unflatten(1, (kv_heads, -1))  # [B, Hkv, R, N, D]
    k = torch.cat([key_window.to(dtype), k], 2)
    v = torch.cat([value_window.to(dtype), value.to(dtype)], 2)

    row = torch.arange(window, device=query.device)
    last = length[:, None] - 1
    committed = last - (last - row) % window  # position held by each row of the window
    node = length[:, None] + depth
    at = torch.cat([committed, node], 1)[:, None]  # [B, 1, W + N]
    lag = node[:, :, None] - at
    seen = torch.cat([((committed >= 0)[:, None]).expand(-1, node.shape[1], -1), ancestors], 2)
    open_ = seen & (at >= folded[:, None, None])
    same = node[:, :, None] // group_size == at // group_size

    scores = q @ k.mT.unsqueeze(2)  # [B, Hkv, R, N, W + N]
    weights, read = torch.zeros_like(scores), torch.zeros_like(seen)
    if local_scale is not None:
        own = open_ & same
        weights = (act(scores) * _heads(local_scale, kv_heads, dtype)).masked_fill(_per_query(~own), 0)
        read = read | own
    if alpha is not None:
        earlier = open_ & ~same
        linear = scores * _heads(alpha, kv_heads, dtype)
        weights = weights + linear.masked_fill(_per_query(~earlier), 0)
        read = read | earlier
    if conv_weight is not None:
        taps = conv_weight.shape[1]
        tapped = seen & (lag < taps)
        table = conv_weight.to(dtype)[:, lag.clamp(0, taps - 1)]  # [H, B, N, W + N]
        table = table * tapped
        weights = weights + table.transpose(0, 1).unflatten(1, (kv_heads, -1))
        read = read | tapped
    if are_finite(v):
        out = weights @ v.unsqueeze(2)
    else:
        out = product_of_seen(weights, v.unsqueeze(2), _per_query(read))
    if alpha is not None:
        out = out + (q * _heads(alpha, kv_heads, dtype)) @ recurrent.to(dtype).unsqueeze(2)
    return out.flatten(1, 2).to(value.dtype)


def append(
    key: Tensor, value: Tensor, state: State, group_size: int, normalize: bool, real: Tensor | None
) -> None:
    """Take tokens into the state whose outputs are known.

    Args:
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, Dv].
        state: Changed in place.
        group_size, normalize: As for `chunk.forward`.
        real: Bool [B, T], False for tokens to leave out; None: none.
    """
    ranks = None if real is None else Ranks(real)
    if ranks is not None:
        key, value = ranks.to_front(key), ranks.to_front(value)
    count = torch.full_like(state.length, key.shape[2]) if ranks is None else ranks.count
    commit(_normalized(key, state.recurrent.dtype, normalize), value, count, state, group_size)


def along(path: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Key and value of the tokens on the path, int [B, P] with -1 for none, and which of its entries are
    tokens; without a path all of them, and None."""
    if path is None:
        return key, value, None
    index = path.clamp_min(0)
    return take_rows(key, index), take_rows(value, index), path >= 0


def extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    real: Tensor | None,
) -> Tensor:
    """Any number of tokens after the state, as `chunk.forward` would compute them after all earlier ones.

    Args:
        query: [B, H, T, D].
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, Dv].
        state: Changed in place.
        alpha, local_scale, conv_weight, activation, group_size, normalize: As for `chunk.forward`.
        real: Bool [B, T], True for tokens that count; the others change nothing and their output is zero.
            None: all count.

    Returns:
        [B, H, T, Dv] in the dtype of `value`.
    """
    ranks = None if real is None else Ranks(real)
    if ranks is not None:
        query, key, value = (ranks.to_front(x) for x in (query, key, value))
    count = torch.full_like(state.length, key.shape[2]) if ranks is None else ranks.count
    dtype = state.recurrent.dtype
    q, k = _normalized(query, dtype, normalize), _normalized(key, dtype, normalize)

    # One sequence per row of the batch that starts at a group border: window tokens, then the new ones.
    window, reach = state.key_window.shape[2], 0 if conv_weight is None else conv_weight.shape[1] - 1
    index = torch.arange(window + query.shape[2], device=query.device)
    position = state.folded[:, None] + index
    keys = _at(position, k, state.key_window.to(dtype), state.length, count)
    queries = _at(position, q, None, state.length, count)
    before = state.folded[:, None] + torch.arange(-reach, window + query.shape[2], device=query.device)
    values = _at(before, value.to(dtype), state.value_window.to(dtype), state.length, count)
    out = chunk.forward(
        queries,
        keys,
        values,
        alpha,
        local_scale,
        conv_weight,
        activation,
        group_size,
        False,
        state=state.recurrent,
        before=reach,
        plain=chunk.is_plain(queries, keys, values, normalize),
    )
    first = (state.length - state.folded)[:, None] + torch.arange(query.shape[2], device=query.device)
    out = out.gather(2, first[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3])).to(value.dtype)
    commit(k, value, count, state, group_size)
    return out if ranks is None else ranks.to_columns(out)


def commit(
    key: Tensor,
    value: Tensor,
    count: Tensor,
    state: State,
    group_size: int,
    fold: Fold | None = None,
    first: int = 0,
) -> None:
    """Write the first `count` [B] tokens (keys as they are stored) after the state, in place.

    What the window cannot hold any more leaves it for `recurrent`, in whole groups. fold: what is summed of
    a token that leaves, by default its key and value themselves. first: position of the first token that is
    summed at all.
    """
    new, rows = key.shape[2], state.key_window.shape[2]
    end = state.length + count
    leaving = end - rows
    if group_size > 1:
        leaving = (leaving + group_size - 1).div(group_size, rounding_mode="floor") * group_size
    folded = torch.maximum(state.folded, leaving)
    # Single tokens leave at nearly every call. On a GPU asking whether any does would cost a synchronisation.
    if group_size == 1 or not key.is_cpu or bool((folded > state.folded).any()):
        _fold(key, value, folded, state, new + group_size - 1, fold, first)

    # As many tokens as lie in different rows: the last ones, of which those before `length` are there.
    position = end[:, None] + torch.arange(-min(new, rows), 0, device=key.device)
    source = position - state.length[:, None]
    place = position % rows
    for ring, x in ((state.key_window, key), (state.value_window, value)):
        fresh = take_rows(x, source.clamp_min(0)).to(ring.dtype)
        written = torch.where((source >= 0)[:, None, :, None], fresh, take_rows(ring, place))
        ring.scatter_(2, place[:, None, :, None].expand_as(written), written)
    state.length.copy_(end)
    state.folded.copy_(folded)


def _fold(
    key: Tensor, value: Tensor, folded: Tensor, state: State, most: int, fold: Fold | None, first: int
) -> None:
    """Add the tokens from `state.folded` up to `folded`, `most` of them at most and none before `first`, to
    `recurrent`."""
    rows, dtype = state.key_window.shape[2], state.recurrent.dtype
    oldest = state.folded[:, None] + torch.arange(min(most, rows), device=key.device)
    held = (take_rows(ring, oldest % rows) for ring in (state.key_window, state.value_window))
    leaving = [(*held, oldest, oldest < torch.minimum(folded, state.length)[:, None])]
    if most > rows:  # the first of the new tokens never see the window
        new = state.length[:, None] + torch.arange(most - rows, device=key.device)
        leaving.append((key[:, :, : most - rows], value[:, :, : most - rows], new, new < folded[:, None]))
    for k, v, position, leaves in leaving:
        k, v = (k.to(dtype), v.to(dtype)) if fold is None else fold(k, v)
        if first:
            leaves = leaves & (position >= first)
        state.recurrent.add_(k.masked_fill(~leaves[:, None, :, None], 0).mT @ v)


def _at(position: Tensor, new: Tensor, ring: Tensor | None, length: Tensor, count: Tensor) -> Tensor:
    """The rows at `position` [B, n]: from the ring before `length`, then from `new`; zeros elsewhere.

    Positions that the ring no longer holds give other rows of it; only outputs that are dropped read those.
    """
    index = (position - length[:, None]).clamp(0, new.shape[2] - 1)
    out = take_rows(new, index)
    first = length[:, None] if ring is None else torch.zeros_like(length)[:, None]
    if ring is not None:
        old = (position < length[:, None])[:, None, :, None]
        out = torch.where(old, take_rows(ring, position % ring.shape[2]), out)
    outside = (position < first) | (position >= (length + count)[:, None])
    return out.masked_fill(outside[:, None, :, None], 0)


def _normalized(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    x = x.to(dtype)
    return unit(x) if normalize else x


def _heads(table: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[H] -> [Hkv, R, 1, 1]"""
    return table.to(dtype).reshape(kv_heads, -1, 1, 1)


def _per_query(keep: Tensor) -> Tensor:
    """[B, N, W + N] -> [B, 1, 1, N, W + N]"""
    return keep[:, None, None]
