"""Augmented linear attention in plain PyTorch: the formula of `oracle.py`, linear in length.

Three routes to the same numbers, without Python loops or branches on data:

- `_row`     one query (cached decode): one row of weights over all keys.
- aligned    queries and keys are the same unpadded tokens: pad to whole groups and reshape.
- gathered   anything else (padding, a chunk of queries after cached keys, cross-attention): whole groups are
             collected by index first, then the same group products run.

Padding is removed by *rank*: a real token's rank is the number of real tokens before it, and groups,
convolution and causality all count ranks. A padded token takes part in nothing.

Inside, `[B, Hkv, R, ...]` splits query heads into key/value heads and the R queries that share each, so that
keys and values are never repeated. Everything is computed in float32 (float64 for float64 input): sums of
thousands of outer products do not survive bfloat16, and CPUs run bfloat16 products slower than float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Index = Any
"""A position along an axis: an int, a 0-d tensor, or a tensor `[B, 1]` when rows differ."""


def augmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: Tensor | float | None,
    conv_weight: Tensor | None,
    local_scale: float = 1.0,
    group_size: int = 64,
    causal: bool = True,
    cross: bool = False,
    kv_layout: str = "interleaved",
    key_mask: Tensor | None = None,
    query_start: Index = None,
    normalize: bool = True,
) -> Tensor:
    """query [B, H, T, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv] -> [B, H, T, Dv] in value's dtype.

    Arguments are described and checked in `linearize.ops.augmented_attention`; nothing is checked here.
    """
    heads, kv_heads, length = query.shape[1], key.shape[1], query.shape[2]
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    with _full_precision(value.device):
        q = _split_heads(query.to(dtype), kv_heads, kv_layout)
        k, v = key.to(dtype), value.to(dtype)
        if normalize:
            q = unit(q)
        conv = None
        if conv_weight is not None and not cross:
            conv = _split_heads(conv_weight.to(dtype).unsqueeze(0), kv_heads, kv_layout).squeeze(0)
        if query_start is None:
            query_start = key.shape[2] - length if causal else 0
        alpha = alpha.to(dtype) if isinstance(alpha, Tensor) else alpha
        core = _Core(alpha, conv, local_scale, group_size, causal)
        if length == 1:
            out = _row(core, q, k, v, key_mask, query_start, cross, normalize)
        else:
            k = unit(k) if normalize else k
            if key_mask is None and not cross and _is_zero(query_start) and length == key.shape[2]:
                out = _aligned(core, q, k, v)
            else:
                out = _gathered(core, q, k, v, key_mask, query_start, cross)
        out = out.transpose(1, 2) if kv_layout == "tiled" else out
        return out.reshape(query.shape[0], heads, length, value.shape[3]).to(value.dtype)


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last axis. A row of zeros stays zero, with a gradient of one, not of 1 / epsilon."""
    return x / _norm(x)


def _norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 0, norm, torch.ones_like(norm))


class _Core:
    """The formula's constants, and its products on whole groups."""

    def __init__(
        self, alpha: Tensor | float | None, conv: Tensor | None, local_scale: float, group: int, causal: bool
    ) -> None:
        self.alpha, self.conv, self.local_scale = alpha, conv, local_scale
        self.group, self.causal = group, causal
        taps = 1 if conv is None else conv.shape[-1]
        # Rows of v that the convolution reads before and after each group.
        self.before = taps - 1 if causal else taps // 2
        self.after = 0 if causal else taps // 2

    def taps_at(self, lag: Tensor) -> Tensor:
        """Convolution weights at lags t - j of any shape [...]: [Hkv, R, ...], zero outside the taps."""
        assert self.conv is not None
        tap = lag + self.after
        inside = (tap >= 0) & (tap < self.conv.shape[-1])
        return self.conv[:, :, tap.clamp(0, self.conv.shape[-1] - 1)] * inside

    def groups(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
        """Whole groups: q [B, Hkv, R, N*G, D], k [B, Hkv, N*G, D] -> [B, Hkv, R, N*G, Dv].

        v [B, Hkv, before + N*G + after, Dv] brings its neighbours for the convolution. state [B, Hkv, D, Dv]
        is the sum of k^T v over everything earlier (causal; None: nothing) or over all keys (otherwise).
        """
        size, repeats = self.group, q.shape[2]
        rows = q.unflatten(3, (-1, size)).transpose(2, 3).flatten(3, 4)  # [B, Hkv, N, R*G, D]
        k = k.unflatten(2, (-1, size))  # [B, Hkv, N, G, D]
        blocks = v[:, :, self.before : v.shape[2] - self.after].unflatten(2, (-1, size))
        place = torch.arange(size, device=q.device)

        factor: Tensor | float = self.local_scale
        if self.causal:
            factor = (place[:, None] >= place).repeat(repeats, 1).to(q.dtype) * factor
        weights = (rows @ k.mT).relu_().square() * factor
        window = blocks
        if self.conv is not None:
            column = torch.arange(-self.before, size + self.after, device=q.device)
            band = self.taps_at(place[:, None] - column).flatten(1, 2)  # [Hkv, R*G, before + G + after]
            weights = F.pad(weights, (self.before, self.after)).add_(band[:, None])
            window = v.unfold(2, size + self.before + self.after, size).mT
        out = weights @ window
        if self.alpha is not None and self.causal:
            own = k.mT @ blocks
            earlier = own.cumsum(2) - own
            out.add_((rows * self.alpha) @ (earlier if state is None else earlier.add_(state.unsqueeze(2))))
        out = out.unflatten(3, (repeats, size)).transpose(2, 3).flatten(3, 4)
        if self.alpha is not None and not self.causal:
            assert state is not None
            out = out + (q * self.alpha) @ state.unsqueeze(2)
        return out


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
    q_blocks = _take(q, query_index.clamp(0, length - 1))
    window = torch.arange(-core.before, span + core.after, device=device) + first
    present = (window >= 0) & (window < count)
    source = window.clamp(0, keys - 1) if order is None else _at(order, window, keys)
    v_window = _take(v, source) * _rows(present)
    inner = slice(core.before, core.before + span)
    k_blocks = _take(k, source[..., inner]) * _rows(present[..., inner])

    state = None
    if core.alpha is not None:
        known = rank < first if core.causal else rank < count
        if key_mask is not None:
            known = known & key_mask
        state = (k * _rows(known)).mT @ v
    out = core.groups(q_blocks, k_blocks, v_window, state)
    out = _take(out, (query_rank - first).clamp(0, span - 1))
    return out if query_real is None else out * _rows(query_real).unsqueeze(2)


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
        scores = scores / _norm(k).mT
    weights = scores.relu().square() * _columns(own) * core.local_scale
    if core.alpha is not None:
        weights = weights + scores * core.alpha * (_columns(ahead > 0) if core.causal else 1)
    if core.conv is not None:
        taps = core.taps_at(lag)  # [Hkv, R, S] or [Hkv, R, B, S]
        weights = weights + (taps if lag.dim() == 1 else taps.permute(2, 0, 1, 3))
    if key_mask is not None:
        weights = weights * _columns(key_mask)
    out = (weights @ v).unsqueeze(3)
    return out if query_real is None else out * query_real[:, :, None, None, None]


def _split_heads(x: Tensor, kv_heads: int, kv_layout: str) -> Tensor:
    """[B, H, ...] -> [B, Hkv, R, ...]: query heads by the key/value head they read."""
    if kv_layout == "tiled":
        return x.unflatten(1, (-1, kv_heads)).transpose(1, 2)
    return x.unflatten(1, (kv_heads, -1))


def _at(table: Tensor, index: Tensor, size: Any) -> Tensor:
    """table [B, S] read at index [n] or [B, n], out-of-range places clamped -> [B, n]."""
    index = index.clamp(0, size - 1)
    return table.index_select(1, index) if index.dim() == 1 else table.gather(1, index)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` ([n], or [B, n] when the rows of the batch differ) of x [B, ..., L, D]."""
    if index.dim() == 1:
        return x.index_select(-2, index)
    index = index.reshape(index.shape[0], *(1,) * (x.dim() - 3), index.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], index.shape[-2], x.shape[-1]))


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


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keep autocast from rounding the state; entered only when needed, so that plain graphs stay plain."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
