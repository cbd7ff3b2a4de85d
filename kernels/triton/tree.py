# mypy: allow-untyped-defs
"""Draft nodes after a state of constant size (its layout and rules: `kernels/recurrent.py`), in one launch.

For the nodes u of a program, weights against three kinds of rows, each one product:

    its ancestors and itself          scale act(q k) in the same group, alpha q k in an earlier one, + taps
    committed tokens in the window    likewise, by position
    the folded ones                   alpha q S

Positions decide what is the same group, so a branch may cross a border anywhere. The state is only read.
Bytes per query head, D = DV, N nodes, a window of W rows: 4 D^2 + 2 W D e + 4 N D e + N^2.

A kernel here is longer than a function should be: its stages share the tiles and sums that it keeps in
registers, and a helper would take and give back all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch import (
    Launch,
    Target,
    load_band,
    load_rows,
    padded,
    readable,
    run,
    store_rows,
    strides,
    target_of,
)
from .normalize import _unit


@triton.jit
def _weights(s, alpha, scale, same, seen, ALPHA: tl.constexpr, SCALE: tl.constexpr, RELU2: tl.constexpr):
    """Weights of seen rows: through the activation in the same group, linear in an earlier one."""
    near = tl.zeros(s.shape, tl.float32)
    far = tl.zeros(s.shape, tl.float32)
    if SCALE:
        near = s * scale
        if RELU2:
            near *= tl.maximum(s, 0.0)
            near = tl.where(s > 0.0, near, 0.0)
    if ALPHA:
        far = s * alpha
    return tl.where(seen, tl.where(same, near, far), 0.0)


@triton.jit(do_not_specialize=["nodes"])
def tree_kernel(
    Q, K, V, OUT, RECURRENT, KEYS, VALUES, LENGTH, FOLDED, DEPTH, ANCESTORS, ALPHA, SCALE, TAPS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, nodes, heads, repeats,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, WINDOW: tl.constexpr,
    NODES: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, N_TAPS: tl.constexpr, RELU2: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """OUT [B, H, nodes, DV]; DEPTH [B, nodes] int64, ANCESTORS [B, nodes, nodes] bool.

    Grid (B H DV/BV, nodes/NODES).
    """
    COLUMNS: tl.constexpr = (DV + BV - 1) // BV
    DVP: tl.constexpr = COLUMNS * BV
    DT: tl.constexpr = Q.dtype.element_ty
    head = (tl.program_id(0) // COLUMNS).to(tl.int64)
    b, h = head // heads, head % heads
    kv = h // repeats
    ring = b * (heads // repeats) + kv
    Q += b * q_b + h * q_h
    K += b * k_b + kv * k_h
    V += b * v_b + kv * v_h
    OUT += head * nodes * DV
    RECURRENT += ring * D * DV
    KEYS += ring * WINDOW * D
    VALUES += ring * WINDOW * DV
    DEPTH += b * nodes
    ANCESTORS += b * nodes * nodes
    n, d = tl.arange(0, NODES), tl.arange(0, BD)
    dv = tl.program_id(0) % COLUMNS * BV + tl.arange(0, BV)
    length, folded = tl.load(LENGTH + b), tl.load(FOLDED + b)
    alpha = 0.0
    scale = 0.0
    if ALPHA is not None:
        alpha = tl.load(ALPHA + h)
    if SCALE is not None:
        scale = tl.load(SCALE + h)

    # Positions are counted from the start of the running group, so that they are small.
    running = (length % GROUP).to(tl.int32)
    start = tl.program_id(1) * NODES
    u = start + n
    depth = tl.load(DEPTH + u, mask=u < nodes, other=0).to(tl.int32)
    group = (running + depth) // GROUP
    q = load_rows(Q, start, n, d, q_t, nodes, D, BD)
    if UNIT:
        q, _, _ = _unit(q.to(tl.float32))
        q = q.to(DT)

    out = tl.zeros((NODES, BV), tl.float32)
    if ALPHA is not None:
        in_state = (d < D)[:, None] & (dv < DV)[None, :]
        state = tl.load(RECURRENT + d[:, None] * DV + dv[None, :], mask=in_state, other=0.0)
        if DT == tl.float16:
            # A float16 operand overflows where the sum does not: multiply by the mean of k^T v instead.
            tokens = tl.maximum(folded, 1).to(tl.float32)
            out = tl.dot(q, (state / tokens).to(DT), input_precision="ieee") * (alpha * tokens)
        else:
            out = tl.dot(q, (state * alpha).to(DT), input_precision="ieee")

    for block in tl.range(0, tl.cdiv(nodes, NODES)):
        first = block * NODES
        a = first + n
        k = load_rows(K, first, n, d, k_t, nodes, D, BD)
        if UNIT:
            k, _, _ = _unit(k.to(tl.float32))
            k = k.to(DT)
        v = load_rows(V, first, n, dv, v_t, nodes, DV, DVP)
        depth_a = tl.load(DEPTH + a, mask=a < nodes, other=0).to(tl.int32)
        inside = (u < nodes)[:, None] & (a < nodes)[None, :]
        above = tl.load(ANCESTORS + u[:, None] * nodes + a[None, :], mask=inside, other=0) != 0
        same = group[:, None] == ((running + depth_a) // GROUP)[None, :]
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = _weights(s, alpha, scale, same, above, ALPHA is not None, SCALE is not None, RELU2)
        if TAPS is not None:
            lag = depth[:, None] - depth_a[None, :]
            p += tl.where(above, load_band(TAPS + h * N_TAPS, lag, N_TAPS), 0.0)
        out = tl.dot(p.to(DT), v, out, input_precision="ieee")

    # Age of a row of the window: how many committed tokens came after the one it holds.
    last = ((length + WINDOW - 1) % WINDOW).to(tl.int32)
    count = tl.minimum(length, WINDOW).to(tl.int32)
    visible = (length - folded).to(tl.int32)
    for begin in range(0, WINDOW, ROWS):
        r = begin + tl.arange(0, ROWS)
        age = (last - r + WINDOW) % WINDOW
        seen = (r < WINDOW) & (age < visible)
        held = (r < WINDOW) & (age < count)
        keep = seen[:, None] & (d < D)[None, :]
        k = tl.load(KEYS + r[:, None] * D + d[None, :], mask=keep, other=0.0).to(DT)
        same = (group == 0)[:, None] & (age < running)[None, :]
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = _weights(s, alpha, scale, same, seen[None, :], ALPHA is not None, SCALE is not None, RELU2)
        reach = seen
        if TAPS is not None:
            reach = seen | (held & (age + 1 < N_TAPS))
            lag = depth[:, None] + 1 + age[None, :]
            p += tl.where(held[None, :], load_band(TAPS + h * N_TAPS, lag, N_TAPS), 0.0)
        keep = reach[:, None] & (dv < DV)[None, :]
        v = tl.load(VALUES + r[:, None] * DV + dv[None, :], mask=keep, other=0.0).to(DT)
        out = tl.dot(p.to(DT), v, out, input_precision="ieee")
    store_rows(OUT, out, start, n, dv, DV, nodes, DV, DVP)


class Tile(NamedTuple):
    nodes: int
    columns: int
    """BV: columns of the value that a program owns."""
    rows: int
    """Rows of the window at a time."""
    warps: int


def tree_tile(target: Target, dim: int, value_dim: int, dtype: torch.dtype, nodes: int) -> Tile:
    """Chosen by registers and stack of the compiled code (tests/test_triton_aot.py), not by timing."""
    if dtype == torch.float32:
        return Tile(16, 16, 16, 4)
    columns = min(64, padded(value_dim))
    if target.backend == "hip" and padded(dim) == 256:
        return Tile(min(32, padded(nodes)), columns, 32, 4)
    return Tile(min(64, padded(nodes)), columns, 64, 4 if target.backend == "hip" or padded(dim) < 128 else 8)


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
    *,
    target: Target | None = None,
) -> Tensor:
    """`recurrent.tree`: query [B, H, N, D], key [B, Hkv, N, D], value [B, Hkv, N, Dv] -> [B, H, N, Dv].

    depth int64 [B, N], ancestors bool [B, N, N]; any N, made for up to 64. float32, bfloat16 or float16;
    alpha, local_scale [H], conv_weight [H, K] float32 or None. Nothing is checked or awaited.
    """
    target = target_of(query.device) if target is None else target
    state = (recurrent, key_window, value_window, length, folded)
    tables = (alpha, local_scale, conv_weight)
    launch, out = prepare(
        query, key, value, *state, depth, ancestors, *tables, activation, group_size, normalize, target
    )
    run([launch], query.device)
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
    depth: Tensor,
    ancestors: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    target: Target,
) -> tuple[Launch, Tensor]:
    """The launch of `tree`, and the tensor it fills."""
    batch, heads, nodes, dim = query.shape
    window, value_dim = key_window.shape[2], value.shape[3]
    query, key, value = readable(query), readable(key), readable(value)
    out = torch.empty((batch, heads, nodes, value_dim), dtype=value.dtype, device=value.device)
    block, columns, rows, warps = tree_tile(target, dim, value_dim, query.dtype, nodes)
    state = dict(RECURRENT=recurrent, KEYS=key_window, VALUES=value_window, LENGTH=length, FOLDED=folded)
    tensors = dict(Q=query, K=key, V=value, OUT=out, DEPTH=depth, ANCESTORS=ancestors, **state)
    launch = Launch(
        tree_kernel,
        (batch * heads * triton.cdiv(value_dim, columns), triton.cdiv(nodes, block)),
        {name: x.contiguous() if name not in "QKV" else x for name, x in tensors.items()}
        | dict(ALPHA=alpha, SCALE=local_scale, TAPS=conv_weight, **strides(q=query, k=key, v=value))
        | dict(nodes=nodes, heads=heads, repeats=heads // key.shape[1]),
        dict(D=dim, BD=padded(dim), DV=value_dim, BV=columns, WINDOW=window, NODES=block)
        | dict(ROWS=min(rows, padded(window)), GROUP=group_size, RELU2=activation == "relu2", UNIT=normalize)
        | dict(N_TAPS=0 if conv_weight is None else conv_weight.shape[1]),
        warps=warps,
        # Below 64 rows no wgmma: smaller trees take the older instructions.
        matrix=block == 64,
    )
    return launch, out
