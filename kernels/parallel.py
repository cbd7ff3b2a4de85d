"""Augmented linear attention composed of PyTorch operators: the formula of `naive.py`, linear in length.

Every form of it, causal or not, padded or not, late queries or not; and differentiable as often as wanted.
Three routes to the same numbers, without branches on data:

- `_row`     one query (cached decode): one row of weights over all keys.
- aligned    queries and keys are the same unpadded tokens: pad to whole groups and reshape.
- gathered   anything else (padding, a chunk of queries after cached keys, cross-attention): whole groups are
             collected by index first, then the same group products run.

Causal groups are left to `chunk.py`, which carries one state from group to group; only for second derivatives
(`composed`) are the states of all groups formed at once.

Padding is removed by *rank*: a real token's rank is the number of real tokens before it, and groups,
convolution and causality all count ranks. A padded token takes part in nothing.

Inside, `[B, Hkv, R, ...]` splits query heads into key/value heads and the R queries that share each, so that
keys and values are never repeated. Everything is computed in float32 (float64 for float64 input): sums of
thousands of outer products do not survive bfloat16, and CPUs run bfloat16 products slower than float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .chunk import Chunk
from .tensors import are_finite, at_lag, norm_or_one, product_of_seen, take_rows, unit

Index = Any
"""A position along an axis: an int, a 0-d tensor, or a tensor `[B, 1]` when rows differ."""


def augmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    local_bias: Tensor | None = None,
    activation: str = "relu2",
    group_size: int = 64,
    causal: bool = True,
    cross: bool = False,
    key_mask: Tensor | None = None,
    query_start: Index = None,
    normalize: bool = True,
    composed: bool = False,
) -> Tensor:
    """Every form of the operator. Nothing is checked here; `linearize.ops.augmented_attention` does that.

    Args:
        query: [B, H, T, D]; query head h reads key/value head h // (H // Hkv).
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        alpha, local_scale: [H]; None leaves the part out.
        conv_weight: [H, K]; None leaves the convolution out.
        local_bias: [H, G], or [H, 2G - 1] when not causal; None: no bias.
        activation, group_size, causal, cross, key_mask, normalize: As for the checked operator.
        query_start: As there; an int, a 0-d tensor or None.
        composed: Form the states of all groups at once, so that gradients can be differentiated again.

    Returns:
        [B, H, T, Dv] in the dtype of `value`.
    """
    heads, kv_heads, length = query.shape[1], key.shape[1], query.shape[2]
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    q = query.to(dtype).unflatten(1, (kv_heads, -1))
    k, v = key.to(dtype), value.to(dtype)
    if normalize:
        q = unit(q)
    if query_start is None:
        query_start = key.shape[2] - length if causal else 0
    tables = tuple(
        None if x is None else x.to(dtype).unflatten(0, (kv_heads, -1))
        for x in (alpha, local_scale, None if cross else conv_weight, local_bias)
    )
    core = _Core(tables, activation, group_size, causal, composed)
    if length == 1:
        out = _row(core, q, k, v, key_mask, query_start, cross, normalize)
    else:
        k = unit(k) if normalize else k
        if key_mask is None and not cross and _is_zero(query_start) and length == key.shape[2]:
            out = _aligned(core, q, k, v)
        else:
            out = _gathered(core, q, k, v, key_mask, query_start, cross)
    return out.reshape(query.shape[0], heads, length, value.shape[3]).to(value.dtype)


class _Core:
    """The formula's constants [Hkv, R, ...], and its products on whole groups."""

    def __init__(
        self,
        tables: tuple[Tensor | None, ...],
        activation: str,
        group: int,
        causal: bool,
        composed: bool,
    ) -> None:
        self.alpha, self.local_scale, self.conv, self.bias = tables
        self.activation, self.group, self.causal, self.composed = activation, group, causal, composed
        taps = 1 if self.conv is None else self.conv.shape[-1]
        # Rows of v that the convolution reads before and after each group.
        self.before = taps - 1 if causal else taps // 2
        self.after = 0 if causal else taps // 2

    def taps_at(self, lag: Tensor) -> Tensor:
        """Convolution weights at lags t - j of any shape [...]: [Hkv, R, ...], zero outside the taps."""
        assert self.conv is not None
        return at_lag(self.conv, lag + self.after)

    def local(self, scores: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """Weights inside a group, from its scores and the two terms in a shape that fits them."""
        weights = None
        if scale is not None:
            weights = ACTIVATIONS[self.activation].value(scores) * scale
        if bias is not None:
            weights = bias if weights is None else weights + bias
        return weights

    def bias_at(self, lag: Tensor) -> Tensor | None:
        """Relative position bias at lags t - j inside one group: [Hkv, R, ...]."""
        if self.bias is None:
            return None
        return at_lag(self.bias, lag if self.causal else lag + self.group - 1)

    def groups(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
        """Whole groups: q [B, Hkv, R, N*G, D], k [B, Hkv, N*G, D] -> [B, Hkv, R, N*G, Dv].

        v [B, Hkv, before + N*G + after, Dv] brings its neighbours for the convolution. state [B, Hkv, D, Dv]
        is the sum of k^T v over everything earlier (causal; None: nothing) or over all keys (otherwise).
        """
        if self.causal and not self.composed:
            return self._chunked(q, k, v, state)
        size, repeats = self.group, q.shape[2]
        rows = q.unflatten(3, (-1, size)).transpose(2, 3).flatten(3, 4)  # [B, Hkv, N, R*G, D]
        k = k.unflatten(2, (-1, size))  # [B, Hkv, N, G, D]
        blocks = v[:, :, self.before : v.shape[2] - self.after].unflatten(2, (-1, size))
        place = torch.arange(size, device=q.device)

        def per_row(x: Tensor) -> Tensor:
            """[Hkv, R, n] or [Hkv, R, G, n] -> [Hkv, 1, R*G, n]"""
            x = x.unsqueeze(2).expand(-1, -1, size, -1) if x.dim() == 3 else x
            return x.flatten(1, 2).unsqueeze(1)

        alpha = None if self.alpha is None else per_row(self.alpha.unsqueeze(2))
        scale = None if self.local_scale is None else per_row(self.local_scale.unsqueeze(2))
        bias = self.bias_at(place[:, None] - place)
        weights = self.local(rows @ k.mT, scale, None if bias is None else per_row(bias))
        if weights is not None and self.causal:
            weights = weights * (place[:, None] >= place).repeat(repeats, 1).to(q.dtype)
        window = blocks
        if self.conv is not None:
            column = torch.arange(-self.before, size + self.after, device=q.device)
            if weights is not None:
                weights = F.pad(weights, (self.before, self.after))
            band = per_row(self.taps_at(place[:, None] - column))
            weights = band if weights is None else weights + band
            window = v.unfold(2, size + self.before + self.after, size).mT
        if weights is None:
            out = torch.zeros_like(rows[..., :1])
        elif are_finite(window):
            out = weights @ window
        else:
            out = product_of_seen(weights, window, self._seen(weights).repeat(repeats, 1))
        if alpha is not None:
            if self.causal:
                own = k.mT @ blocks
                earlier = own.cumsum(2) - own
                seen = earlier if state is None else earlier + state.unsqueeze(2)
            else:
                assert state is not None
                seen = state.unsqueeze(2)
            out = out + (rows * alpha) @ seen
        out = out.expand(*out.shape[:-1], v.shape[-1])
        return out.unflatten(3, (repeats, size)).transpose(2, 3).flatten(3, 4)

    def _seen(self, weights: Tensor) -> Tensor:
        """Which of its group's values, and of those before and after it, a query sees: [G, columns]."""
        around = self.conv is not None
        column = torch.arange(-self.before * around, self.group + self.after * around, device=weights.device)
        lag = torch.arange(self.group, device=weights.device)[:, None] - column
        seen = (column >= 0) & (column < self.group) & ((lag >= 0) | (not self.causal))
        if self.local_scale is None and self.bias is None:
            seen = torch.zeros_like(seen)
        return seen | ((lag >= -self.after) & (lag <= self.before)) if around else seen

    def _chunked(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
        tables = (self.alpha, self.local_scale, self.conv)
        flat = [None if x is None else x.flatten(0, 1) for x in tables]
        bias = None if self.bias is None else self.bias.flatten(0, 1)
        out = Chunk.apply(
            q.flatten(1, 2), k, v, *flat, self.activation, self.group, False, bias, state, self.before
        )
        return out.unflatten(1, q.shape[1:3])


def _aligned(core: _Core, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[3]
    extra = _round_up(length, core.group) - length
    state = None if core.causal or core.alpha is None else k.mT @ v
    q, k = F.pad(q, (0, 0, 0, extra)), F.pad(k, (0, 0, 0, extra))
    v = F.pad(v, (0, 0, core.before, extra + core.after))
    return core.groups(q, k, v, state)[:, :, :, :length]


def _gathered(
    core: _Core, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, start: Index, cross: bool
) -> Tensor:
    """Collect the groups that hold the queries, by rank, then run the group products on them.

    Ranks live on the key axis; query i of row b has rank `start + i` without a mask, and otherwise as many as
    there are real keys before its column. In cross-attention queries have their own axis: rank = position.
    """
    length, keys, device = q.shape[3], k.shape[2], q.device
    query_rank = torch.arange(length, device=device) + start
    query_real = order = None
    count: Index = keys
    rank = torch.arange(keys, device=device)
    if key_mask is not None:
        count = key_mask.sum(1, keepdim=True)
        order = torch.argsort(~key_mask, dim=1, stable=True)  # rank -> column, real tokens first
        rank = key_mask.cumsum(1) - 1  # column -> rank, right for real tokens only
        if not cross:
            columns = query_rank
            query_real = key_mask.index_select(1, columns)
            query_rank = rank.index_select(1, columns)
            if not _is_zero(start):
                start = query_rank[:, :1] + 1 - query_real[:, :1].long()  # real tokens before the first query
    first = start // core.group * core.group
    # The first query can sit anywhere in its group, unless it is known to be the first token of all.
    span = _round_up(length if _is_zero(start) else length + core.group - 1, core.group)
    block = torch.arange(span, device=device) + first

    query_index = block - start
    if query_real is not None and order is not None:
        query_index = _at(order, block, keys) - columns[0]
    q_blocks = take_rows(q, query_index.clamp(0, length - 1))
    window = torch.arange(-core.before, span + core.after, device=device) + first
    present = (window >= 0) & (window < count)
    source = window.clamp(0, keys - 1) if order is None else _at(order, window, keys)
    v_window = take_rows(v, source).masked_fill(~_rows(present), 0)  # whatever padding holds, NaN included
    inner = slice(core.before, core.before + span)
    k_blocks = take_rows(k, source[..., inner]).masked_fill(~_rows(present[..., inner]), 0)

    state = None
    if core.alpha is not None:
        known = rank < first if core.causal else rank < count
        if key_mask is not None:
            known = known & key_mask
        unknown = ~_rows(known)
        state = k.masked_fill(unknown, 0).mT @ v.masked_fill(unknown, 0)
    out = core.groups(q_blocks, k_blocks, v_window, state)
    out = take_rows(out, (query_rank - first).clamp(0, span - 1))
    return out if query_real is None else out.masked_fill(~_rows(query_real).unsqueeze(2), 0)


def _row(
    core: _Core,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    start: Index,
    cross: bool,
    normalize: bool,
) -> Tensor:
    """One query: weights [B, Hkv, R, S] over all keys, then one product with v. k is not yet normalised."""
    rank = torch.arange(k.shape[2], device=q.device)
    position: Index = start
    query_real = None
    if key_mask is not None:
        column = torch.zeros(1, dtype=torch.long, device=q.device) + start
        rank = key_mask.cumsum(1) - 1
        if not cross:
            position = rank.index_select(1, column)
            query_real = key_mask.index_select(1, column)
    lag = position - rank  # [S] or [B, S]
    ahead = position // core.group - rank // core.group  # groups between the key and the query
    own = (ahead == 0) & (lag >= 0) if core.causal else ahead == 0

    scores = q.squeeze(3) @ k.mT
    if normalize:
        scores = scores / norm_or_one(k).mT
    bias = core.bias_at(lag)
    scale = None if core.local_scale is None else core.local_scale.unsqueeze(2)
    local = core.local(scores, scale, None if bias is None else _by_row(bias))
    weights, seen = torch.zeros_like(scores), torch.zeros_like(own)
    if local is not None:
        weights, seen = local.masked_fill(~_columns(own), 0), own
    if core.alpha is not None:
        earlier = ahead > 0 if core.causal else torch.ones_like(own)
        linear = scores * core.alpha.unsqueeze(2)
        weights, seen = weights + linear.masked_fill(~_columns(earlier), 0), seen | earlier
    if core.conv is not None:
        weights = weights + _by_row(core.taps_at(lag))
        seen = seen | ((lag >= -core.after) & (lag <= core.before))
    if key_mask is not None:
        seen = seen & key_mask
        weights = weights.masked_fill(~_columns(key_mask), 0)
    out = weights @ v if are_finite(v) else product_of_seen(weights, v, _columns(seen).expand_as(weights))
    out = out.unsqueeze(3)
    return out if query_real is None else out * query_real[:, :, None, None, None]


def _by_row(x: Tensor) -> Tensor:
    """[Hkv, R, S], or [Hkv, R, B, S] when the rows of the batch differ, for weights [B, Hkv, R, S]."""
    return x if x.dim() == 3 else x.permute(2, 0, 1, 3)


def _at(table: Tensor, index: Tensor, size: Any) -> Tensor:
    """table [B, S] read at index [n] or [B, n], out-of-range places clamped -> [B, n]."""
    index = index.clamp(0, size - 1)
    return table.index_select(1, index) if index.dim() == 1 else table.gather(1, index)


def _rows(keep: Tensor) -> Tensor:
    """keep [n] or [B, n] as a factor for [B, Hkv, n, D]."""
    return keep[:, None] if keep.dim() == 1 else keep[:, None, :, None]


def _columns(keep: Tensor) -> Tensor:
    """keep [n] or [B, n] as a factor for [B, Hkv, R, n]."""
    return keep if keep.dim() == 1 else keep[:, None, None, :]


def _round_up(length: Any, multiple: int) -> Any:
    return (length + multiple - 1) // multiple * multiple


def _is_zero(x: Index) -> bool:
    return not isinstance(x, Tensor) and x == 0
