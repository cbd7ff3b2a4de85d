# mypy: allow-untyped-defs
"""The kernels of the backward: gradients of the causal core, tile by tile, with the state in registers.

With s = q k^T inside a tile, S the state before the tile (sum of k^T v), R the one after it (sum of alpha
q^T do over later tiles), A the tile's weights (scale act(s) within a group, alpha s to an earlier group),
P = do v^T, and T_n the band of taps that reach n tiles back:

    dq = alpha do S^T + dA k                     dA = dA/ds P        forward walk, BS columns of D
    dk = v R^T + dA^T q                                              reverse walk, BS columns of D
    dv = k R + (A + T_0)^T do + T_n^T do_n                           reverse walk, BS columns of DV
    dalpha = sum (do S^T) . q + sum s P, earlier groups              in the first walk
    dscale = sum act(s) P, own group                                 in the first walk
    dtaps[l] = sum of the diagonals i - j = l of do v^T              a kernel of its own

Grouped-query heads: dk and dv take one program for a key/value head, which goes through its query heads
inside each tile, so that their sum stays in registers and has one order: no atomics anywhere.

Bytes per token and head, D = DV, element size e, one slice, H = Hkv: dq 5De, dk 5De, dv 4De (the do of a
neighbour tile comes from L2), taps 2De. Shared memory: the tiles q, k, v, do, [TILE, D] each, per stage.

A kernel here is longer than a function should be: its stages share the tiles and sums that it keeps in
registers, and a helper would take and give back all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import load_band, load_rows, load_tile, store_rows


@triton.jit
def _products(
    X, Y, x_t, y_t, start, rows, end, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr
):
    """x y^T of two [rows, WIDTH] tiles, CHUNK columns at a time: for tiles whose whole rows do not fit."""
    STEP: tl.constexpr = CHUNK if CHUNK < PADDED else PADDED
    total = tl.zeros((rows.shape[0], rows.shape[0]), tl.float32)
    for first in tl.range(0, PADDED, STEP, num_stages=1):
        columns = first + tl.arange(0, STEP)
        x = load_rows(X, start, rows, columns, x_t, end, WIDTH, PADDED)
        y = load_rows(Y, start, rows, columns, y_t, end, WIDTH, PADDED)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["length", "splits", "span"])
def query_grad_kernel(
    Q, Q_SLICE, K, K_SLICE, V, GRAD, OUT, ALPHA, SCALE, STATE, D_ALPHA, D_SCALE,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    length, heads, repeats, splits, span,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
    TILE: tl.constexpr, USED: tl.constexpr, GROUP: tl.constexpr, RELU2: tl.constexpr, STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """OUT = dq [B, H, T, D]; grid (B H D/BS, splits). STATE as in the forward.

    Each program leaves its share of dalpha in D_ALPHA [B, H, splits, D/BS], of dscale in D_SCALE likewise.
    """
    SLICES: tl.constexpr = (D + BS - 1) // BS
    DS: tl.constexpr = SLICES * BS
    SEVERAL: tl.constexpr = GROUP < USED
    LOCAL: tl.constexpr = (SCALE is not None) or (ALPHA is not None and SEVERAL)
    DT: tl.constexpr = OUT.dtype.element_ty
    head = tl.program_id(0) // SLICES
    piece = tl.program_id(0) % SLICES
    split = tl.program_id(1)
    b, h = head // heads, head % heads
    kv = h // repeats
    if not DESCRIBED:
        Q += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
        Q_SLICE += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
        K += b.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
        K_SLICE += b.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
        V += b.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
        GRAD += b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    OUT += head.to(tl.int64) * length * D
    i, d, dv = tl.arange(0, TILE), tl.arange(0, BD), tl.arange(0, BV)
    ds = piece * BS + tl.arange(0, BS)
    lag = i[:, None] - i[None, :]
    same = (i // GROUP)[:, None] == (i // GROUP)[None, :]
    sum_alpha = tl.zeros((TILE,), tl.float32)
    sum_scale = tl.zeros((TILE,), tl.float32)
    if ALPHA is not None:
        alpha = tl.load(ALPHA + h)
        state = tl.zeros((BS, BV), tl.float32)
        if STATE is not None:
            at = (b * (heads // repeats) + kv).to(tl.int64) * (splits - 1) + split - 1
            keep = (ds < D)[:, None] & (dv < DV)[None, :] & (split > 0)
            state = tl.load(STATE + at * D * DV + ds[:, None] * DV + dv[None, :], mask=keep, other=0.0)
    if SCALE is not None:
        scale = tl.load(SCALE + h)

    last = tl.minimum((split + 1) * span, tl.cdiv(length, USED))
    for tile in tl.range(split * span, last, num_stages=STAGES):
        start = tile * USED
        end = tl.minimum(start + USED, length)
        # Tiles are read where they are used: read together, they do not fit the registers of sm_80.
        do = load_tile(GRAD, b, h, start, i, dv, 0, g_t, end, DV, BV, BV, DESCRIBED)
        dq = tl.zeros((TILE, BS), tl.float32)
        if ALPHA is not None:
            if DT == tl.float16:
                # A float16 operand overflows where the sum does not: multiply by the mean of k^T v instead.
                seen = tl.maximum(start, 1).to(tl.float32)
                dq = tl.dot(do, tl.trans((state / seen).to(DT)), input_precision="ieee") * seen
            else:
                dq = tl.dot(do, tl.trans(state.to(DT)), input_precision="ieee")
            q_slice = load_tile(Q_SLICE, b, h, start, i, ds, piece * BS, q_t, end, D, DS, BS, DESCRIBED)
            sum_alpha += tl.sum(dq * q_slice.to(tl.float32), 1)
            dq *= alpha
        k_slice = load_tile(K_SLICE, b, kv, start, i, ds, piece * BS, k_t, end, D, DS, BS, DESCRIBED)
        if LOCAL:
            if CHUNK:
                dp = _products(GRAD, V, g_t, v_t, start, i, end, DV, BV, CHUNK)
                s = _products(Q, K, q_t, k_t, start, i, end, D, BD, CHUNK)
            else:
                v = load_tile(V, b, kv, start, i, dv, 0, v_t, end, DV, BV, BV, DESCRIBED)
                dp = tl.dot(do, tl.trans(v), input_precision="ieee")
                q = load_tile(Q, b, h, start, i, d, 0, q_t, end, D, BD, BD, DESCRIBED)
                if SLICES == 1:
                    s = tl.dot(q, tl.trans(k_slice), input_precision="ieee")
                else:
                    k = load_tile(K, b, kv, start, i, d, 0, k_t, end, D, BD, BD, DESCRIBED)
                    s = tl.dot(q, tl.trans(k), input_precision="ieee")
            dp = tl.where(lag >= 0, dp, 0.0)
            if SEVERAL:
                far = tl.where(same, 0.0, dp)
                dp = tl.where(same, dp, 0.0)
            if SCALE is not None:
                if RELU2:
                    r = tl.maximum(s, 0.0)
                    sum_scale += tl.sum(r * r * dp, 1)
                    dp *= r * (2.0 * scale)
                else:
                    sum_scale += tl.sum(s * dp, 1)
                    dp *= scale
            if SEVERAL:
                if ALPHA is not None:
                    if piece == 0:
                        sum_alpha += tl.sum(s * far, 1)
                    if SCALE is not None:
                        dp += far * alpha
                    else:
                        dp = far * alpha
            dq = tl.dot(dp.to(DT), k_slice, dq, input_precision="ieee")
        if ALPHA is not None:
            if CHUNK or not LOCAL:
                v = load_tile(V, b, kv, start, i, dv, 0, v_t, end, DV, BV, BV, DESCRIBED)
            state = tl.dot(tl.trans(k_slice), v, state, input_precision="ieee")
        store_rows(OUT, dq, start, i, ds, D, end, D, DS)
    at = (head * splits + split) * SLICES + piece
    if ALPHA is not None:
        tl.store(D_ALPHA + at, tl.sum(sum_alpha, 0))
    if SCALE is not None:
        tl.store(D_SCALE + at, tl.where(piece == 0, tl.sum(sum_scale, 0), 0.0))


@triton.jit(do_not_specialize=["length", "splits", "span"])
def key_grad_kernel(
    Q, Q_SLICE, K, V, GRAD, OUT, ALPHA, SCALE, STATE,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t,
    length, heads, splits, span,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr,
    TILE: tl.constexpr, USED: tl.constexpr, GROUP: tl.constexpr, REPEATS: tl.constexpr, RELU2: tl.constexpr,
    STAGES: tl.constexpr, DESCRIBED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """OUT = dk [B, Hkv, T, D]; grid (B Hkv D/BS, splits). Rows of a tile of scores are keys, columns queries.

    STATE [B Hkv, splits - 1, D, DV]: sums of alpha q^T do over the last 1, 2, .. splits, or None.
    """
    SLICES: tl.constexpr = (D + BS - 1) // BS
    DS: tl.constexpr = SLICES * BS
    SEVERAL: tl.constexpr = GROUP < USED
    DT: tl.constexpr = OUT.dtype.element_ty
    head = tl.program_id(0) // SLICES
    split = tl.program_id(1)
    b, h = head // heads, head % heads
    if not DESCRIBED:
        Q += b.to(tl.int64) * q_b
        Q_SLICE += b.to(tl.int64) * q_b
        K += b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
        V += b.to(tl.int64) * v_b + h.to(tl.int64) * v_h
        GRAD += b.to(tl.int64) * g_b
    OUT += head.to(tl.int64) * length * D
    i, d, dv = tl.arange(0, TILE), tl.arange(0, BD), tl.arange(0, BV)
    first_column = tl.program_id(0) % SLICES * BS
    ds = first_column + tl.arange(0, BS)
    lag = i[None, :] - i[:, None]
    same = (i // GROUP)[:, None] == (i // GROUP)[None, :]
    if ALPHA is not None:
        state = tl.zeros((BS, BV), tl.float32)
        if STATE is not None:
            at = head.to(tl.int64) * (splits - 1) + splits - 2 - split
            keep = (ds < D)[:, None] & (dv < DV)[None, :] & (split < splits - 1)
            state = tl.load(STATE + at * D * DV + ds[:, None] * DV + dv[None, :], mask=keep, other=0.0)

    first = split * span
    last = tl.minimum(first + span, tl.cdiv(length, USED))
    for back in tl.range(0, last - first, num_stages=STAGES):
        start = (last - 1 - back) * USED
        end = tl.minimum(start + USED, length)
        v = load_tile(V, b, h, start, i, dv, 0, v_t, end, DV, BV, BV, DESCRIBED)
        if not CHUNK:
            k = load_tile(K, b, h, start, i, d, 0, k_t, end, D, BD, BD, DESCRIBED)
        dk = tl.zeros((TILE, BS), tl.float32)
        if ALPHA is not None:
            if DT == tl.float16:
                seen = tl.maximum(length - end, 1).to(tl.float32)
                dk = tl.dot(v, tl.trans((state / seen).to(DT)), input_precision="ieee") * seen
            else:
                dk = tl.dot(v, tl.trans(state.to(DT)), input_precision="ieee")
        for repeat in tl.range(0, REPEATS, num_stages=STAGES):
            qh = h * REPEATS + repeat
            GRAD_H, Q_H, Q_SLICE_H = GRAD, Q, Q_SLICE
            if not DESCRIBED:
                GRAD_H += qh.to(tl.int64) * g_h
                Q_H += qh.to(tl.int64) * q_h
                Q_SLICE_H += qh.to(tl.int64) * q_h
            do = load_tile(GRAD_H, b, qh, start, i, dv, 0, g_t, end, DV, BV, BV, DESCRIBED)
            q_slice = load_tile(Q_SLICE_H, b, qh, start, i, ds, first_column, q_t, end, D, DS, BS, DESCRIBED)
            if (SCALE is not None) or (ALPHA is not None and SEVERAL):
                if CHUNK:
                    dp = _products(V, GRAD_H, v_t, g_t, start, i, end, DV, BV, CHUNK)
                else:
                    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
                dp = tl.where(lag >= 0, dp, 0.0)
                if SEVERAL:
                    far = tl.where(same, 0.0, dp)
                    dp = tl.where(same, dp, 0.0)
                if SCALE is not None:
                    dp *= tl.load(SCALE + qh)
                    if RELU2:
                        if CHUNK:
                            s = _products(K, Q_H, k_t, q_t, start, i, end, D, BD, CHUNK)
                        elif SLICES == 1:
                            s = tl.dot(k, tl.trans(q_slice), input_precision="ieee")
                        else:
                            q = load_tile(Q_H, b, qh, start, i, d, 0, q_t, end, D, BD, BD, DESCRIBED)
                            s = tl.dot(k, tl.trans(q), input_precision="ieee")
                        dp *= 2.0 * tl.maximum(s, 0.0)
                if SEVERAL:
                    if ALPHA is not None:
                        if SCALE is not None:
                            dp += far * tl.load(ALPHA + qh)
                        else:
                            dp = far * tl.load(ALPHA + qh)
                dk = tl.dot(dp.to(DT), q_slice, dk, input_precision="ieee")
            if ALPHA is not None:
                alpha = tl.load(ALPHA + qh)
                state += alpha * tl.dot(tl.trans(q_slice), do, input_precision="ieee")
        store_rows(OUT, dk, start, i, ds, D, end, D, DS)


@triton.jit(do_not_specialize=["length", "splits", "span"])
def value_grad_kernel(
    Q, K, GRAD, OUT, ALPHA, SCALE, TAPS, STATE,
    q_b, q_h, q_t, k_b, k_h, k_t, g_b, g_h, g_t,
    length, heads, splits, span,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BS: tl.constexpr,
    TILE: tl.constexpr, USED: tl.constexpr, GROUP: tl.constexpr, REPEATS: tl.constexpr, N_TAPS: tl.constexpr,
    RELU2: tl.constexpr, STAGES: tl.constexpr, DESCRIBED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """OUT = dv [B, Hkv, T, DV]; grid (B Hkv DV/BS, splits). The forward walk mirrored; STATE as in dk."""
    SLICES: tl.constexpr = (DV + BS - 1) // BS
    DS: tl.constexpr = SLICES * BS
    SEVERAL: tl.constexpr = GROUP < USED
    DT: tl.constexpr = OUT.dtype.element_ty
    head = tl.program_id(0) // SLICES
    split = tl.program_id(1)
    b, h = head // heads, head % heads
    if not DESCRIBED:
        Q += b.to(tl.int64) * q_b
        K += b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
        GRAD += b.to(tl.int64) * g_b
    OUT += head.to(tl.int64) * length * DV
    i, d = tl.arange(0, TILE), tl.arange(0, BD)
    first_column = tl.program_id(0) % SLICES * BS
    dv = first_column + tl.arange(0, BS)
    lag = i[None, :] - i[:, None]
    same = (i // GROUP)[:, None] == (i // GROUP)[None, :]
    if ALPHA is not None:
        state = tl.zeros((BD, BS), tl.float32)
        if STATE is not None:
            at = head.to(tl.int64) * (splits - 1) + splits - 2 - split
            keep = (d < D)[:, None] & (dv < DV)[None, :] & (split < splits - 1)
            state = tl.load(STATE + at * D * DV + d[:, None] * DV + dv[None, :], mask=keep, other=0.0)

    first = split * span
    last = tl.minimum(first + span, tl.cdiv(length, USED))
    for back in tl.range(0, last - first, num_stages=STAGES):
        start = (last - 1 - back) * USED
        end = tl.minimum(start + USED, length)
        out = tl.zeros((TILE, BS), tl.float32)
        k = load_tile(K, b, h, start, i, d, 0, k_t, end, D, BD, BD, DESCRIBED)
        if ALPHA is not None:
            if DT == tl.float16:
                seen = tl.maximum(length - end, 1).to(tl.float32)
                out = tl.dot(k, (state / seen).to(DT), input_precision="ieee") * seen
            else:
                out = tl.dot(k, state.to(DT), input_precision="ieee")
        for repeat in tl.range(0, REPEATS, num_stages=STAGES):
            qh = h * REPEATS + repeat
            GRAD_H, Q_H = GRAD, Q
            if not DESCRIBED:
                GRAD_H += qh.to(tl.int64) * g_h
                Q_H += qh.to(tl.int64) * q_h
            q = load_tile(Q_H, b, qh, start, i, d, 0, q_t, end, D, BD, BD, DESCRIBED)
            do = load_tile(GRAD_H, b, qh, start, i, dv, first_column, g_t, end, DV, DS, BS, DESCRIBED)
            p = tl.zeros((TILE, TILE), tl.float32)
            if (SCALE is not None) or (ALPHA is not None and SEVERAL):
                if CHUNK:
                    s = _products(K, Q_H, k_t, q_t, start, i, end, D, BD, CHUNK)
                else:
                    s = tl.dot(k, tl.trans(q), input_precision="ieee")
                if SCALE is not None:
                    if RELU2:
                        p = tl.maximum(s, 0.0)
                        p = p * p * tl.load(SCALE + qh)
                    else:
                        p = s * tl.load(SCALE + qh)
                if SEVERAL:
                    if ALPHA is not None:
                        p = tl.where(same, p, s * tl.load(ALPHA + qh))
                    else:
                        p = tl.where(same, p, 0.0)
                p = tl.where(lag >= 0, p, 0.0)
            if TAPS is not None:
                p += load_band(TAPS + qh * N_TAPS, lag, N_TAPS)
            out = tl.dot(p.to(DT), do, out, input_precision="ieee")
            if TAPS is not None:
                for n in tl.static_range(0, (N_TAPS + TILE - 2) // TILE):
                    far = USED + n * TILE
                    band = load_band(TAPS + qh * N_TAPS, lag + far, N_TAPS)
                    do_far = load_tile(
                        GRAD_H, b, qh, start + far, i, dv, first_column, g_t, length, DV, DS, BS, DESCRIBED
                    )
                    out = tl.dot(band.to(DT), do_far, out, input_precision="ieee")
            if ALPHA is not None:
                alpha = tl.load(ALPHA + qh)
                state += alpha * tl.dot(tl.trans(q), do, input_precision="ieee")
        store_rows(OUT, out, start, i, dv, DV, end, DV, DS)


@triton.jit(do_not_specialize=["length", "splits", "span"])
def grad_state_kernel(
    Q, GRAD, ALPHA, STATE, q_b, q_h, q_t, g_b, g_h, g_t, length, heads, splits, span,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BS: tl.constexpr,
    TILE: tl.constexpr, USED: tl.constexpr, REPEATS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """STATE [B Hkv, splits - 1, D, DV] = alpha q^T do over each split but the first, the last one foremost.

    Grid (B Hkv DV/BS, splits - 1). Running sums of it are what the reverse walks start from.
    """
    SLICES: tl.constexpr = (DV + BS - 1) // BS
    DS: tl.constexpr = SLICES * BS
    head = (tl.program_id(0) // SLICES).to(tl.int64)
    b, h = head // heads, head % heads
    split = splits - 1 - tl.program_id(1)
    Q += b * q_b + h * REPEATS * q_h
    GRAD += b * g_b + h * REPEATS * g_h
    i, d = tl.arange(0, TILE), tl.arange(0, BD)
    dv = tl.program_id(0) % SLICES * BS + tl.arange(0, BS)
    state = tl.zeros((BD, BS), tl.float32)
    last = tl.minimum((split + 1) * span, tl.cdiv(length, USED))
    for repeat in tl.range(0, REPEATS):
        part = tl.zeros((BD, BS), tl.float32)
        for tile in tl.range(split * span, last, num_stages=STAGES):
            start = tile * USED
            end = tl.minimum(start + USED, length)
            q = load_rows(Q + repeat * q_h, start, i, d, q_t, end, D, BD)
            do = load_rows(GRAD + repeat * g_h, start, i, dv, g_t, end, DV, DS)
            part = tl.dot(tl.trans(q), do, part, input_precision="ieee")
        state += part * tl.load(ALPHA + h * REPEATS + repeat)
    at = (head * (splits - 1) + tl.program_id(1)) * D * DV
    keep = (d < D)[:, None] & (dv < DV)[None, :]
    tl.store(STATE + at + d[:, None] * DV + dv[None, :], state, mask=keep)


@triton.jit(do_not_specialize=["length", "splits", "span"])
def taps_grad_kernel(
    V, GRAD, OUT, v_b, v_h, v_t, g_b, g_h, g_t, length, heads, repeats, splits, span,
    DV: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT [B H, splits, BLOCKS, TILE, TILE]: block n sums do v^T, v from BLOCKS - 1 - n tiles earlier.

    Grid (B H, splits, BLOCKS/2): a program reads do once for two blocks. Groups play no part here.
    """
    CHUNKS: tl.constexpr = (DV + CHUNK - 1) // CHUNK
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    b, h = head // heads, head % heads
    V += b * v_b + h // repeats * v_h
    GRAD += b * g_b + h * g_h
    i, dv = tl.arange(0, TILE), tl.arange(0, CHUNK)
    near = tl.program_id(2) * 2
    first = tl.zeros((TILE, TILE), tl.float32)
    second = tl.zeros((TILE, TILE), tl.float32)
    last = tl.minimum((split + 1) * span, tl.cdiv(length, TILE))
    for n in tl.range(split * span * CHUNKS, last * CHUNKS, num_stages=STAGES):
        start = n // CHUNKS * TILE
        columns = n % CHUNKS * CHUNK + dv
        do = load_rows(GRAD, start, i, columns, g_t, length, DV, CHUNKS * CHUNK)
        v = load_rows(V, start - near * TILE, i, columns, v_t, length, DV, CHUNKS * CHUNK)
        first = tl.dot(do, tl.trans(v), first, input_precision="ieee")
        if BLOCKS > 1:
            v = load_rows(V, start - (near + 1) * TILE, i, columns, v_t, length, DV, CHUNKS * CHUNK)
            second = tl.dot(do, tl.trans(v), second, input_precision="ieee")
    # As [TILE, BLOCKS TILE], so that every lag is one diagonal.
    at = (head * splits + split) * TILE * BLOCKS * TILE + i[:, None] * (BLOCKS * TILE) + i[None, :]
    tl.store(OUT + at + (BLOCKS - 1 - near) * TILE, first)
    if BLOCKS > 1:
        if near + 1 < BLOCKS:
            tl.store(OUT + at + (BLOCKS - 2 - near) * TILE, second)
