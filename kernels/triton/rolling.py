# mypy: allow-untyped-defs
"""Tokens after a state whose window rolls: causal families as files hold them (`linearize/onnx/schema.py`).

    recurrent  [B, Hkv, D, DV] float, the sum of k^T v over the tokens older than the window
    window     [B, Hkv, R, D + DV], the last R tokens as [key | value], newest last, zeros before the first

One launch for any number of tokens. A program owns BV value columns of one key/value head and walks its row
of the batch in tiles of BLOCK columns; tiles below 0 are the window, so that no tile is half of each. A token
is known by its rank, the number of real tokens of the call before it; the window's ranks are -R .. -1.

    S    = recurrent + the sum of k^T v over the tiles of which no token is in reach of a query
    out  = alpha q S + sum over the tiles since of w v
    w    = taps[lag] + scale act(q k) in the query's group, + alpha q k in an earlier one

A query reaches R tokens back, which holds its group and the taps. Pasts are read and presents written
elsewhere: nothing is changed in place. Bytes per program: 4 D BV twice, and the tiles' rows (D + BV) e for
each tile of queries that has them in reach. Numbers are arguments and not constants, so that code compiled
ahead of time serves every group, window and number of taps. NEVER RUN ON A GPU.

A kernel here is longer than a function should be: its stages share the tiles and sums that it keeps in
registers, and a helper would take and give back all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch import Launch, padded
from .normalize import _unit

BLOCKS = (16, 32)
"""Columns of a tile: for short calls, for long ones."""

INPUTS = (
    "query", "key", "value", "mask", "past_recurrent", "past_window", "past_length", "alpha", "local_scale",
    "conv_weight",
)  # fmt: skip
"""What `prepare` takes, by the operators' names."""

ALIGNED = ("Q", "K", "V", "RECURRENT", "WINDOW", "OUT", "NEW_RECURRENT", "NEW_WINDOW")
"""Arguments that must begin at multiples of 16 bytes in code compiled ahead of time."""

_NUMBERS = ["tokens", "heads", "repeats", "rows", "group", "taps"]


@triton.jit
def _ranks(j, seen, MASK, tokens, rows, BLOCK: tl.constexpr):
    """(column, rank, whether there is a token, how many of the call) of tile j; `seen` tokens were before."""
    c = j * BLOCK + tl.arange(0, BLOCK)
    real = tl.load(MASK + c, mask=(c >= 0) & (c < tokens), other=0).to(tl.int32)
    rank = tl.where(c < 0, c, seen + tl.cumsum(real, 0) - 1)
    there = ((c < 0) & (c >= -rows)) | (real > 0)
    return c, rank, there, tl.sum(real, 0)


@triton.jit
def _tile(
    j, seen, K, V, WINDOW, MASK, d, dv, tokens, rows,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """(keys, values, rank, there, count) of tile j, float32, zeros where no token is."""
    c, rank, there, count = _ranks(j, seen, MASK, tokens, rows, BLOCK)
    in_k = there[:, None] & (d < D)[None, :]
    in_v = there[:, None] & (dv < DV)[None, :]
    if j < 0:
        at = WINDOW + (rows + c)[:, None] * (D + DV)
        k = tl.load(at + d[None, :], mask=in_k, other=0.0).to(tl.float32)
        v = tl.load(at + D + dv[None, :], mask=in_v, other=0.0).to(tl.float32)
    else:
        k = tl.load(K + c[:, None] * D + d[None, :], mask=in_k, other=0.0).to(tl.float32)
        v = tl.load(V + c[:, None] * DV + dv[None, :], mask=in_v, other=0.0).to(tl.float32)
        if UNIT:
            k, _largest, _norm = _unit(k)
    return k, v, rank, there, count


@triton.jit(do_not_specialize=_NUMBERS)
def rolling_kernel(
    Q, K, V, MASK, RECURRENT, WINDOW, LENGTH, ALPHA, SCALE, TAPS, OUT, NEW_RECURRENT, NEW_WINDOW,
    tokens, heads, repeats, rows, group, taps,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr,
    RELU2: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything contiguous, shapes as in the module's head; grid B Hkv DV/BV."""
    COLUMNS: tl.constexpr = (DV + BV - 1) // BV
    part = tl.program_id(0) % COLUMNS
    head = (tl.program_id(0) // COLUMNS).to(tl.int64)
    b = head // heads
    d = tl.arange(0, BD)
    dv = part * BV + tl.arange(0, BV)
    K += head * tokens * D
    V += head * tokens * DV
    MASK += b * tokens
    WINDOW += head * rows * (D + DV)
    NEW_WINDOW += head * rows * (D + DV)
    of_state = head * D * DV + d[:, None] * DV + dv[None, :]
    in_state = (d < D)[:, None] & (dv < DV)[None, :]
    state = tl.load(RECURRENT + of_state, mask=in_state, other=0.0)
    # Positions from a multiple of the group on that lies before the window's first row.
    offset = (tl.load(LENGTH + b) % group).to(tl.int32) + (rows // group + 1) * group

    tiles = (tokens + BLOCK - 1) // BLOCK
    seen = 0
    low = -((rows + BLOCK - 1) // BLOCK)  # the first tile that S does not hold
    seen_low = 0
    for i in range(0, tiles):
        before = seen_low
        for j in range(low, i):
            _c, _rank, _there, count = _ranks(j, before, MASK, tokens, rows, BLOCK)
            end = tl.where(j < 0, (j + 1) * BLOCK, before + count)
            if end <= seen - rows:
                k, v, _rank, _there, _count = _tile(
                    j, before, K, V, WINDOW, MASK, d, dv, tokens, rows, D, DV, BLOCK, UNIT
                )
                state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
                low = j + 1
                seen_low = before + count
            before += count

        c, rank, real, count = _ranks(i, seen, MASK, tokens, rows, BLOCK)
        place = (offset + rank) // group
        for repeat in range(0, repeats):
            qh = (head % heads).to(tl.int32) * repeats + repeat
            alpha, scale = tl.load(ALPHA + qh), tl.load(SCALE + qh)
            at = Q + (head * repeats + repeat) * tokens * D + c[:, None] * D + d[None, :]
            q = tl.load(at, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            if UNIT:
                q, _largest, _norm = _unit(q)
            out = tl.dot(q * alpha, state, input_precision=PRECISION)
            before = seen_low
            for j in range(low, i + 1):
                k, v, key_rank, there, passed = _tile(
                    j, before, K, V, WINDOW, MASK, d, dv, tokens, rows, D, DV, BLOCK, UNIT
                )
                before += passed
                lag = rank[:, None] - key_rank[None, :]
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                own = s * scale
                if RELU2:
                    own *= tl.where(s > 0.0, s, 0.0)
                near = place[:, None] == ((offset + key_rank) // group)[None, :]
                w = tl.where(near, own, s * alpha)
                w += tl.load(TAPS + qh * taps + lag, mask=(lag >= 0) & (lag < taps), other=0.0)
                w = tl.where((lag >= 0) & real[:, None] & there[None, :], w, 0.0)
                out = tl.dot(w, v, out, input_precision=PRECISION)
            at = OUT + (head * repeats + repeat) * tokens * DV + c[:, None] * DV + dv[None, :]
            keep = (c < tokens)[:, None] & (dv < DV)[None, :]
            tl.store(at, out.to(OUT.dtype.element_ty), mask=keep)
        seen += count

    # What is left: older than the new window into the sum, the rest into the new window.
    edge = seen - rows
    before = seen_low
    SHARE: tl.constexpr = (BD + COLUMNS - 1) // COLUMNS
    mine = (d // SHARE == part) & (d < D)
    for j in range(low, tiles):
        k, v, rank, there, passed = _tile(
            j, before, K, V, WINDOW, MASK, d, dv, tokens, rows, D, DV, BLOCK, UNIT
        )
        before += passed
        left = there & (rank < edge)
        state = tl.dot(tl.trans(tl.where(left[:, None], k, 0.0)), v, state, input_precision=PRECISION)
        stays = there & (rank >= edge)
        at = NEW_WINDOW + (rank - edge)[:, None] * (D + DV)
        tl.store(at + d[None, :], k.to(NEW_WINDOW.dtype.element_ty), mask=stays[:, None] & mine[None, :])
        keep = stays[:, None] & (dv < DV)[None, :]
        tl.store(at + D + dv[None, :], v.to(NEW_WINDOW.dtype.element_ty), mask=keep)
    tl.store(NEW_RECURRENT + of_state, state, mask=in_state)


def block_of(tokens: int) -> int:
    """Columns of a tile for a call of so many."""
    return BLOCKS[0] if tokens <= BLOCKS[0] else BLOCKS[1]


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    past_recurrent: Tensor,
    past_window: Tensor,
    past_length: Tensor,
    alpha: Tensor,
    local_scale: Tensor,
    conv_weight: Tensor,
    activation: str,
    group_size: int,
    normalize: bool,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The launch of a node and its outputs (output, present_recurrent, present_window), as in `schema.py`.

    Contiguous tensors; query, key, value and past_window share float32, float16 or bfloat16. activation:
    "relu2" or "linear".
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    block = block_of(tokens)
    columns = min(16 if block == BLOCKS[0] else 32, padded(value_dim))
    out = torch.empty((batch, heads, tokens, value_dim), dtype=query.dtype, device=query.device)
    made = (out, torch.empty_like(past_recurrent), torch.empty_like(past_window))
    tensors = dict(Q=query, K=key, V=value, MASK=mask, RECURRENT=past_recurrent, WINDOW=past_window)
    tensors |= dict(LENGTH=past_length, ALPHA=alpha, SCALE=local_scale, TAPS=conv_weight)
    tensors |= dict(OUT=made[0], NEW_RECURRENT=made[1], NEW_WINDOW=made[2])
    numbers = dict(tokens=tokens, heads=kv_heads, repeats=heads // kv_heads, rows=past_window.shape[2])
    numbers |= dict(group=group_size, taps=conv_weight.shape[1])
    sizes = dict(D=dim, BD=padded(dim), DV=value_dim, BV=columns, BLOCK=block)
    how: dict[str, Any] = dict(RELU2=activation == "relu2", UNIT=normalize)
    how |= dict(PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32")
    warps = 4 if block == BLOCKS[0] else 8
    grid = (batch * kv_heads * triton.cdiv(value_dim, columns),)
    return Launch(rolling_kernel, grid, {**tensors, **numbers}, {**sizes, **how}, warps), made
