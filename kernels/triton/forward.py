# mypy: allow-untyped-defs
"""Causal augmented linear attention, forward (the formula: `kernels/naive.py`).

A program owns one query head and BV columns of the value, walks the tokens in tiles of whole groups and keeps
the state S = sum of k^T v over the tiles behind it, [D, BV] float32, in registers:

    o  = q (alpha S)                 earlier tiles
    o += p v                         this tile: p = scale act(q k^T) within a group and alpha q k^T between
                                     groups, at or below the diagonal, plus the taps that stay in the tile
    o += T_n v_n                     taps that reach into the n-th tile before
    S += k^T v

so the convolution costs one product per neighbour, nothing of size [T / G, D, D] is stored, and each program
reads its q, k, v once (v twice, the second time from L2). When heads and columns give too few programs for
the device, the length is split: one kernel sums k^T v per split, one adds them up, and the same walk starts
each split from its sum.

Everything is computed transposed (S^T, o^T, p^T): S^T then goes from the accumulator of one product to the
left operand of the next without leaving the registers, and only p, [64, 64], passes through shared memory.

Shared memory per stage: q, k [TILE, D], v and its neighbour [TILE, BV]; beside them p and T_1, [TILE, TILE].

A kernel here is longer than a function should be: its stages share the tiles and sums that it keeps in
registers, and a helper would take and give back all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch import (
    Launch,
    Target,
    describable,
    described,
    load_band,
    load_rows,
    load_tile,
    padded,
    readable,
    run,
    store_rows,
    strides,
    target_of,
    tile_rows,
)
from .normalize import unit_rows


@triton.jit(do_not_specialize=["length", "splits", "span"])
def forward_kernel(
    Q, K, V, OUT, ALPHA, SCALE, TAPS, STATE,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    length, heads, repeats, splits, span,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    TILE: tl.constexpr, USED: tl.constexpr, GROUP: tl.constexpr, N_TAPS: tl.constexpr, RELU2: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Grid (B H DV/BV, splits). ALPHA, SCALE [H], TAPS [H, N_TAPS]: float32, or None. OUT contiguous.

    Q, K, V: descriptors of tiles when DESCRIBED, else pointers. STATE [B Hkv, splits - 1, D, DV] float32: the
    sum of k^T v before each split but the first, or None.
    """
    COLUMNS: tl.constexpr = (DV + BV - 1) // BV
    DVP: tl.constexpr = COLUMNS * BV
    SEVERAL: tl.constexpr = GROUP < USED
    DT: tl.constexpr = OUT.dtype.element_ty
    head = tl.program_id(0) // COLUMNS
    split = tl.program_id(1)
    b, h = head // heads, head % heads
    kv = h // repeats
    if not DESCRIBED:
        Q += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
        K += b.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
        V += b.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    OUT += head.to(tl.int64) * length * DV
    i, d = tl.arange(0, TILE), tl.arange(0, BD)
    first = tl.program_id(0) % COLUMNS * BV
    dv = first + tl.arange(0, BV)

    lag = i[None, :] - i[:, None]  # rows are keys, columns queries
    same = (i // GROUP)[None, :] == (i // GROUP)[:, None]
    if SCALE is not None:
        scale = tl.load(SCALE + h)
    if TAPS is not None:
        TAPS += h * N_TAPS
        inside = load_band(TAPS, lag, N_TAPS).to(DT)
        if N_TAPS > 1:
            before = load_band(TAPS, lag + TILE, N_TAPS).to(DT)
    if ALPHA is not None:
        alpha = tl.load(ALPHA + h)
        state = tl.zeros((BV, BD), tl.float32)
        if STATE is not None:
            at = (b * (heads // repeats) + kv).to(tl.int64) * (splits - 1) + split - 1
            keep = (dv < DV)[:, None] & (d < D)[None, :] & (split > 0)
            state = tl.load(STATE + at * D * DV + d[None, :] * DV + dv[:, None], mask=keep, other=0.0)

    last = tl.minimum((split + 1) * span, tl.cdiv(length, USED))
    for tile in tl.range(split * span, last):
        start = tile * USED
        end = tl.minimum(start + USED, length)
        v = load_tile(V, b, kv, start, i, dv, first, v_t, end, DV, DVP, BV, DESCRIBED)
        o = tl.zeros((BV, TILE), tl.float32)
        p = tl.zeros((TILE, TILE), tl.float32)
        if (ALPHA is not None) or (SCALE is not None):
            q = load_tile(Q, b, h, start, i, d, 0, q_t, end, D, BD, BD, DESCRIBED)
            k = load_tile(K, b, kv, start, i, d, 0, k_t, end, D, BD, BD, DESCRIBED)
        if ALPHA is not None:
            if DT == tl.float16:
                # A float16 operand overflows where the sum does not: multiply by the mean of k^T v instead.
                seen = tl.maximum(start, 1).to(tl.float32)
                o = tl.dot((state / seen).to(DT), tl.trans(q), input_precision="ieee") * (alpha * seen)
            else:
                o = tl.dot((state * alpha).to(DT), tl.trans(q), input_precision="ieee")
        if (SCALE is not None) or (ALPHA is not None and SEVERAL):
            s = tl.dot(k, tl.trans(q), input_precision="ieee")
            if SCALE is not None:
                if RELU2:
                    p = tl.maximum(s, 0.0)
                    p = p * p * scale
                else:
                    p = s * scale
            if SEVERAL:
                if ALPHA is not None:
                    p = tl.where(same, p, s * alpha)
                else:
                    p = tl.where(same, p, 0.0)
            p = tl.where(lag >= 0, p, 0.0)
        if TAPS is not None:
            p += inside.to(tl.float32)
        if (SCALE is not None) or (TAPS is not None) or SEVERAL:
            o = tl.dot(tl.trans(v), p.to(DT), o, input_precision="ieee")
        if TAPS is not None:
            if N_TAPS > 1:
                near = load_tile(V, b, kv, start - TILE, i, dv, first, v_t, length, DV, DVP, BV, DESCRIBED)
                o = tl.dot(tl.trans(near), before, o, input_precision="ieee")
            for n in tl.range(2, (N_TAPS + TILE - 2) // TILE + 1, num_stages=1):
                far = load_tile(V, b, kv, start - n * TILE, i, dv, first, v_t, length, DV, DVP, BV, DESCRIBED)
                band = load_band(TAPS, lag + n * TILE, N_TAPS).to(DT)
                o = tl.dot(tl.trans(far), band, o, input_precision="ieee")
        store_rows(OUT, tl.trans(o), start, i, dv, DV, end, DV, DVP)
        if ALPHA is not None:
            state = tl.dot(tl.trans(v), k, state, input_precision="ieee")


@triton.jit(do_not_specialize=["length", "splits", "span"])
def state_kernel(
    K, V, STATE, k_b, k_h, k_t, v_b, v_h, v_t, length, heads, splits, span,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    TILE: tl.constexpr, USED: tl.constexpr,
):  # fmt: skip
    """STATE [B Hkv, splits - 1, D, DV] = k^T v of all splits but the last; grid (B Hkv DV/BV, splits-1)."""
    COLUMNS: tl.constexpr = (DV + BV - 1) // BV
    DVP: tl.constexpr = COLUMNS * BV
    head = (tl.program_id(0) // COLUMNS).to(tl.int64)
    split = tl.program_id(1)
    b, h = head // heads, head % heads
    K += b * k_b + h * k_h
    V += b * v_b + h * v_h
    i, d = tl.arange(0, TILE), tl.arange(0, BD)
    dv = tl.program_id(0) % COLUMNS * BV + tl.arange(0, BV)
    state = tl.zeros((BD, BV), tl.float32)
    for tile in tl.range(split * span, (split + 1) * span):
        start = tile * USED
        end = tl.minimum(start + USED, length)
        k = load_rows(K, start, i, d, k_t, end, D, BD)
        v = load_rows(V, start, i, dv, v_t, end, DV, DVP)
        state = tl.dot(tl.trans(k), v, state, input_precision="ieee")
    at = (head * (splits - 1) + split) * D * DV
    keep = (d < D)[:, None] & (dv < DV)[None, :]
    tl.store(STATE + at + d[:, None] * DV + dv[None, :], state, mask=keep)


@triton.jit(do_not_specialize=["count"])
def scan_kernel(STATE, count, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """STATE [N, count, SIZE]: running sums over `count`, in place; grid (N, SIZE / BLOCK)."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = STATE + tl.program_id(0).to(tl.int64) * count * SIZE + at
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.range(0, count):
        total += tl.load(here, mask=at < SIZE, other=0.0)
        tl.store(here, total, mask=at < SIZE)
        here += SIZE


class Tile(NamedTuple):
    columns: int
    """BV: columns of the value that a program owns."""
    warps: int
    stages: int


def forward_tile(
    target: Target, dim: int, value_dim: int, dtype: torch.dtype, rows: int, by_descriptor: bool
) -> Tile:
    """Chosen by registers, stack and shared memory of the compiled code, not by timing.

    The aim on sm_90 is two programs per multiprocessor: at most 113 KB of shared memory and 255 registers for
    four warps each. tests/test_triton_aot.py compiles what this returns.
    """
    engine = target.backend == "cuda" and 90 <= target.arch < 120  # wgmma and its successor: 64 rows or more
    if dtype == torch.float32:
        # No matrix instructions: operands pass through registers whole, and only narrow slices fit there.
        found = Tile(16, 4, 1) if target.backend == "hip" else Tile(16, 8, 1)
    elif rows > 64:
        found = Tile(32, 4, 1) if target.backend == "hip" else Tile(64, 8, 1) if engine else Tile(32, 8, 1)
    elif target.backend == "hip":
        found = Tile(64, 4, 2 if dim <= 128 else 1)
    elif not engine:
        found = Tile(64, 8, 2) if dim <= 64 else Tile(64, 8, 3) if dim <= 128 else Tile(32, 8, 1)
    elif target.arch >= 100:
        found = Tile(64, 4, 2) if dim <= 64 else Tile(128, 8, 2) if dim <= 128 else Tile(64, 8, 1)
    elif by_descriptor:
        found = Tile(64, 4, 3) if dim <= 64 else Tile(64, 4, 2) if dim <= 128 else Tile(64, 8, 1)
    else:
        found = Tile(64, 8, 2) if dim <= 128 else Tile(32, 8, 2)
    return found._replace(columns=min(found.columns, max(padded(value_dim), 64 if engine else 16)))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    *,
    target: Target | None = None,
) -> Tensor:
    """The causal operator on aligned, unpadded tokens. `supports` (see the package) says what it takes;
    nothing is checked here.

    Args:
        query: [B, H, T, D], float32, bfloat16 or float16, any strides.
        key: [B, Hkv, T, D] in the same dtype.
        value: [B, Hkv, T, Dv] in the same dtype.
        alpha, local_scale: float32 [H]; None leaves the part out.
        conv_weight: float32 [H, K]; None leaves the convolution out.
        activation, group_size, normalize: As for `chunk.forward`.
        target: Stands in for the device when tiles and splits are chosen.

    Returns:
        [B, H, T, Dv], contiguous, in the dtype of `value`.
    """
    target = target_of(query.device) if target is None else target
    launches, out = prepare(
        query, key, value, alpha, local_scale, conv_weight, activation, group_size, normalize, target
    )
    run(launches, query.device)
    return out


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    target: Target,
    tile: Tile | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launches of `forward`, and the tensor they fill. `tile` replaces the choice of `forward_tile`."""
    batch, heads, length, dim = query.shape
    kv_heads, value_dim = key.shape[1], value.shape[3]
    rows, used = tile_rows(group_size)
    out = torch.empty((batch, heads, length, value_dim), dtype=value.dtype, device=value.device)
    launches: list[Launch] = []
    query, key, value = readable(query), readable(key), readable(value)
    if normalize:
        of_query, query = unit_rows(query)
        of_key, key = unit_rows(key)
        launches += [of_query, of_key]
    # A descriptor reads whole tiles: it cannot leave out rows between the used ones and the next tile's.
    whole = used == rows and query.dtype != torch.float32
    by_descriptor = whole and describable(target, query, key, value)
    if tile is None:
        tile = forward_tile(target, dim, value_dim, query.dtype, rows, by_descriptor)

    slices, tiles = triton.cdiv(value_dim, tile.columns), triton.cdiv(length, used)
    span = triton.cdiv(tiles, splits_for(batch * heads * slices, tiles, target.processors))
    splits = triton.cdiv(tiles, span)
    shape = dict(D=dim, BD=padded(dim), DV=value_dim, BV=tile.columns, TILE=rows, USED=used)
    state = None
    if splits > 1 and alpha is not None:
        before, state = _border_states(key, value, splits, span, shape, tile)
        launches += before
    tensors: dict[str, Any] = dict(Q=query, K=key, V=value, OUT=out, STATE=state)
    if by_descriptor:
        wide = padded(dim)
        descriptors = dict(Q=described(query, rows, wide), K=described(key, rows, wide))
        tensors.update(descriptors, V=described(value, rows, tile.columns))
    weights = dict(ALPHA=alpha, SCALE=local_scale, TAPS=conv_weight)
    numbers = dict(length=length, heads=heads, repeats=heads // kv_heads, splits=splits, span=span)
    taps = 0 if conv_weight is None else conv_weight.shape[1]
    options = dict(GROUP=group_size, N_TAPS=taps, RELU2=activation == "relu2", DESCRIBED=by_descriptor)
    launches.append(
        Launch(
            forward_kernel,
            (batch * heads * slices, splits),
            {**tensors, **weights, **strides(q=query, k=key, v=value), **numbers},
            {**shape, **options},
            tile.warps,
            tile.stages,
            matrix=query.dtype != torch.float32,
        )
    )
    return launches, out


def _border_states(
    key: Tensor, value: Tensor, splits: int, span: int, shape: dict[str, int], tile: Tile
) -> tuple[list[Launch], Tensor]:
    """The launches that sum k^T v up to the end of every split but the last, and the sums that they fill,
    [B * Hkv, splits - 1, D * Dv]."""
    batch, kv_heads, length, dim = key.shape
    count, value_dim = batch * kv_heads, value.shape[3]
    state = torch.empty((count, splits - 1, dim * value_dim), dtype=torch.float32, device=value.device)
    numbers = dict(length=length, heads=kv_heads, splits=splits, span=span)
    launches = [
        Launch(
            state_kernel,
            (count * triton.cdiv(value_dim, tile.columns), splits - 1),
            {**dict(K=key, V=value, STATE=state), **strides(k=key, v=value), **numbers},
            shape,
            tile.warps,
            tile.stages,
            matrix=key.dtype != torch.float32 and dim >= 64,
        )
    ]
    return launches + scans(state), state


_SCAN = 1024


def scans(*states: Tensor) -> list[Launch]:
    """Turn the sums of single splits, [N, splits - 1, size], into sums of all splits up to each, in place."""
    return [
        Launch(
            scan_kernel,
            (state.shape[0], triton.cdiv(state.shape[2], _SCAN)),
            dict(STATE=state, count=state.shape[1]),
            dict(SIZE=state.shape[2], BLOCK=_SCAN),
            matrix=False,
        )
        for state in states
        if state.shape[1] > 1
    ]


def splits_for(programs: int, tiles: int, processors: int) -> int:
    """Two programs per processor where the length allows it: fewer than four tiles are not worth a split."""
    return max(1, min(2 * processors // programs, tiles // 4))
