# mypy: allow-untyped-defs
"""One token after a state of constant size (its layout and rules: `kernels/recurrent.py`), as two launches.

`step_kernel` computes the outputs, and folds the oldest group into `recurrent` where the window is full:

    out = q (alpha S) + sum over the window of w_p v_p + (scale act(q k) + taps[0]) v
    w_p = taps[lag] + scale act(q k_p) in the running group, + alpha q k_p in an earlier one

A program owns BV columns of one key/value head: nobody else touches its part of S, and the query heads that
share the head read S once. But the new key goes to a row of the very group that is being folded, which other
programs may still be reading, and so with the lengths: `commit_kernel` writes both, after all of them.

Lengths stay on the device and the host asks for none, so the launches can be captured in a graph. Bytes per
key/value head, D = DV, a window of W rows: 4 D^2 + 2 W D e, plus W D e for each further BV columns.

A kernel here is longer than a function should be: its stages share the tiles and sums that it keeps in
registers, and a helper would take and give back all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch import Launch, Target, load_band, padded, readable, run, target_of
from .normalize import _unit


@triton.jit
def step_kernel(
    Q, K, V, OUT, RECURRENT, KEYS, VALUES, LENGTH, FOLDED, ACTIVE, ALPHA, SCALE, TAPS,
    q_b, q_h, k_b, k_h, v_b, v_h, heads,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, REPEATS: tl.constexpr, N_TAPS: tl.constexpr,
    RELU2: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """OUT [B, H, DV]; RECURRENT [B, Hkv, D, DV]; KEYS, VALUES [B, Hkv, WINDOW, ..]; grid B Hkv DV/BV."""
    COLUMNS: tl.constexpr = (DV + BV - 1) // BV
    KT: tl.constexpr = KEYS.dtype.element_ty
    head = (tl.program_id(0) // COLUMNS).to(tl.int64)
    b, h = head // heads, head % heads
    d = tl.arange(0, BD)
    dv = tl.program_id(0) % COLUMNS * BV + tl.arange(0, BV)
    in_d, in_dv = d < D, dv < DV
    RECURRENT += head * D * DV
    KEYS += head * WINDOW * D
    VALUES += head * WINDOW * DV
    length, folded = tl.load(LENGTH + b), tl.load(FOLDED + b)
    full = length - folded == WINDOW
    if ACTIVE is not None:
        active = tl.load(ACTIVE + b)
        full = full & active

    at = RECURRENT + d[:, None] * DV + dv[None, :]
    inside = in_d[:, None] & in_dv[None, :]
    if full:
        first = (folded % WINDOW).to(tl.int32)
        state = tl.load(at, mask=inside, other=0.0)
        for row in range(0, GROUP, 16):
            r = row + tl.arange(0, 16)
            keep = (r < GROUP)[:, None]
            k = tl.load(KEYS + (first + r)[:, None] * D + d[None, :], mask=keep & in_d[None, :], other=0.0)
            v = tl.load(
                VALUES + (first + r)[:, None] * DV + dv[None, :], mask=keep & in_dv[None, :], other=0.0
            )
            if k.dtype != v.dtype:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            state = tl.dot(tl.trans(k), v, state, input_precision="ieee")
        tl.store(at, state, mask=inside)
        folded += GROUP
    elif ALPHA is not None:
        state = tl.load(at, mask=inside, other=0.0)
    else:
        state = tl.zeros((BD, BV), tl.float32)

    # Age of a row: how many tokens came after the one it holds. Committed tokens only, the new one has none.
    last = ((length + WINDOW - 1) % WINDOW).to(tl.int32)
    count = tl.minimum(length, WINDOW).to(tl.int32)
    visible = (length - folded).to(tl.int32)
    running = (length % GROUP).to(tl.int32)
    k_new = tl.load(K + b * k_b + h * k_h + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    v_new = tl.load(V + b * v_b + h * v_h + dv, mask=in_dv, other=0.0).to(tl.float32)
    if UNIT:
        k_new, _, _ = _unit(k_new)
        k_new = k_new.to(KT).to(tl.float32)  # as later steps will read it
    for repeat in range(0, REPEATS):
        qh = h * REPEATS + repeat
        q = tl.load(Q + b * q_b + qh * q_h + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
        if UNIT:
            q, _, _ = _unit(q)
        weight = tl.zeros((1,), tl.float32)
        if SCALE is not None:
            scale = tl.load(SCALE + qh)
            weight = tl.sum(q * k_new, 1)
            if RELU2:
                weight = tl.maximum(weight, 0.0)
                weight *= weight
            weight *= scale
        if TAPS is not None:
            weight += tl.load(TAPS + qh * N_TAPS)
        out = weight * v_new
        if ALPHA is not None:
            alpha = tl.load(ALPHA + qh)
            out += alpha * tl.sum(tl.trans(q) * state, 0)
        for row in range(0, WINDOW, ROWS):
            r = row + tl.arange(0, ROWS)
            age = (last - r + WINDOW) % WINDOW
            seen = (r < WINDOW) & (age < visible)
            held = (r < WINDOW) & (age < count)
            weights = tl.zeros((ROWS,), tl.float32)
            if (ALPHA is not None) or (SCALE is not None):
                keep = seen[:, None] & in_d[None, :]
                k = tl.load(KEYS + r[:, None] * D + d[None, :], mask=keep, other=0.0).to(tl.float32)
                s = tl.sum(k * q, 1)
                if SCALE is not None:
                    weights = s * scale
                    if RELU2:
                        weights *= tl.where(s > 0.0, s, 0.0)
                far = tl.zeros((ROWS,), tl.float32)
                if ALPHA is not None:
                    far = s * alpha
                weights = tl.where(age < running, weights, far)
            reach = seen
            if TAPS is not None:
                reach = seen | (held & (age + 1 < N_TAPS))
                weights += tl.where(held, load_band(TAPS + qh * N_TAPS, age + 1, N_TAPS), 0.0)
            keep = reach[:, None] & in_dv[None, :]
            v = tl.load(VALUES + r[:, None] * DV + dv[None, :], mask=keep, other=0.0).to(tl.float32)
            out += tl.sum(v * weights[:, None], 0)
        if ACTIVE is not None:
            out = tl.where(active, out, 0.0)
        place = OUT + ((b * heads + h) * REPEATS + repeat) * DV + dv
        tl.store(place, out.to(OUT.dtype.element_ty), mask=in_dv)


@triton.jit
def commit_kernel(
    K, V, KEYS, VALUES, LENGTH, FOLDED, ACTIVE, k_b, k_h, v_b, v_h, heads,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, WINDOW: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The new key and value of every head into their row of the window, then LENGTH and FOLDED; grid B."""
    b = tl.program_id(0).to(tl.int64)
    d, dv = tl.arange(0, BD), tl.arange(0, BV)
    length, folded = tl.load(LENGTH + b), tl.load(FOLDED + b)
    row = length % WINDOW
    for first in range(0, heads, HEADS):
        h = first + tl.arange(0, HEADS)
        keep = (h < heads)[:, None]
        if ACTIVE is not None:
            keep = keep & tl.load(ACTIVE + b)
        ring = (b * heads + h) * WINDOW + row
        k = tl.load(K + b * k_b + h[:, None] * k_h + d[None, :], mask=keep & (d < D)[None, :], other=0.0)
        if UNIT:
            k, _, _ = _unit(k.to(tl.float32))
        at = KEYS + ring[:, None] * D + d[None, :]
        tl.store(at, k.to(KEYS.dtype.element_ty), mask=keep & (d < D)[None, :])
        v = tl.load(V + b * v_b + h[:, None] * v_h + dv[None, :], mask=keep & (dv < DV)[None, :], other=0.0)
        at = VALUES + ring[:, None] * DV + dv[None, :]
        tl.store(at, v.to(VALUES.dtype.element_ty), mask=keep & (dv < DV)[None, :])
    tl.debug_barrier()  # every warp has read the lengths
    new_folded = tl.where(length - folded == WINDOW, folded + GROUP, folded)
    if ACTIVE is not None:
        active = tl.load(ACTIVE + b)
        tl.store(FOLDED + b, new_folded, mask=active)
        tl.store(LENGTH + b, length + 1, mask=active)
    else:
        tl.store(FOLDED + b, new_folded)
        tl.store(LENGTH + b, length + 1)


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
    *,
    target: Target | None = None,
) -> Tensor:
    """`recurrent.step`: query [B, H, 1, D], key [B, Hkv, 1, D], value [B, Hkv, 1, Dv] -> [B, H, 1, Dv].

    The five tensors of the state are changed in place, except for sequences that are not `active` (bool [B]),
    whose output is zero. float32, bfloat16 or float16; alpha, local_scale [H], conv_weight [H, K] float32 or
    None. Nothing is checked, and nothing waits for the device.
    """
    target = target_of(query.device) if target is None else target
    given = (recurrent, key_window, value_window, length, folded)
    sums, keys, values, count, done = (x.contiguous() for x in given)
    state = (sums, keys, values, count, done)
    tables = (alpha, local_scale, conv_weight)
    launches, out = prepare(
        query, key, value, *state, *tables, activation, group_size, normalize, active, target
    )
    run(launches, query.device)
    for old, new in zip(given, state, strict=True):
        if new is not old:
            old.copy_(new)
    return out


def prepare(
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
    target: Target,
) -> tuple[list[Launch], Tensor]:
    """The launches of `step` for a contiguous state, and the tensor they fill."""
    batch, heads, _, dim = query.shape
    kv_heads, window, value_dim = key.shape[1], key_window.shape[2], value.shape[3]
    query, key, value = readable(query), readable(key), readable(value)
    out = torch.empty((batch, heads, 1, value_dim), dtype=value.dtype, device=value.device)
    columns = min(32, padded(value_dim))
    if batch * kv_heads * triton.cdiv(value_dim, columns) < target.processors:
        columns = 16
    rings = dict(KEYS=key_window, VALUES=value_window, LENGTH=length, FOLDED=folded)
    new = dict(K=key, V=value, ACTIVE=active, heads=kv_heads)
    strides = dict(k_b=key.stride(0), k_h=key.stride(1), v_b=value.stride(0), v_h=value.stride(1))
    shape = dict(D=dim, BD=padded(dim), DV=value_dim, WINDOW=window, GROUP=group_size, UNIT=normalize)
    return [
        Launch(
            step_kernel,
            (batch * kv_heads * triton.cdiv(value_dim, columns),),
            dict(Q=query, OUT=out, RECURRENT=recurrent, ALPHA=alpha, SCALE=local_scale, TAPS=conv_weight)
            | dict(q_b=query.stride(0), q_h=query.stride(1), **new, **rings, **strides),
            dict(BV=columns, ROWS=min(32, padded(window)), REPEATS=heads // kv_heads, **shape)
            | dict(N_TAPS=0 if conv_weight is None else conv_weight.shape[1], RELU2=activation == "relu2"),
            matrix=False,
        ),
        Launch(
            commit_kernel,
            (batch,),
            dict(**new, **rings, **strides),
            dict(BV=padded(value_dim), HEADS=min(8, triton.next_power_of_2(kv_heads)), **shape),
            matrix=False,
        ),
    ], out
