# mypy: allow-untyped-defs
"""The causal core's gradients: which kernels of `gradients.py` run, in which tiles, what is summed after.

When heads and columns give too few programs for the device, the length is split as in the forward: two
kernels sum the states at the borders, for the forward and for the reverse walks, and each split walks alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton

from .forward import scan_kernel, splits_for, state_kernel
from .gradients import (
    grad_state_kernel,
    key_grad_kernel,
    query_grad_kernel,
    taps_grad_kernel,
    value_grad_kernel,
)
from .launch import Launch, Target, describable, described, padded, readable, run, target_of, tile_rows
from .normalize import unit_rows, unit_rows_backward


class Tile(NamedTuple):
    columns: int
    """BS: columns of the gradient, and of the state, that a program owns."""
    warps: int
    stages: int
    chunk: int = 0
    """Columns at a time in the products of whole rows; 0: all."""


class Tiles(NamedTuple):
    query: Tile
    key: Tile
    value: Tile
    sums: Tile
    """For the sums over splits, and over the taps' diagonals (columns at a time)."""


def backward_tiles(
    target: Target,
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    rows: int,
    repeats: int,
    taps: int,
    by_descriptor: bool,
) -> Tiles:
    """Chosen by registers, stack and shared memory of the compiled code, not by timing.

    The aim on sm_90 is two programs of four warps per multiprocessor; tests/test_triton_aot.py compiles what
    this returns. Without descriptors a whole row of q, k, v, do at once is too much, hence the chunks.
    """
    wide = max(padded(dim), padded(value_dim))
    if dtype == torch.float32:
        # No matrix instructions: operands pass through registers whole, and only narrow slices fit there.
        query = key = value = Tile(16, 4, 1, 32) if target.backend == "hip" else Tile(16, 8, 1, 16)
    elif rows > 64 and by_descriptor and target.arch < 100 and wide <= 128:
        query = key = value = Tile(64, 8, 1)
    elif rows > 64:
        query = key = value = Tile(32, 4 if target.backend == "hip" else 8, 1, 32)
    elif target.backend == "hip":
        query = key = value = Tile(64, 4, 1, 64 if wide > 128 else 0)
    elif not by_descriptor:
        chunk = 64 if wide > 64 else 32
        query = key = Tile(32 if wide > 128 else 64, 8, 1, chunk)
        value = Tile(32, 8, 1, chunk)
    elif wide <= 64:
        query = key = Tile(64, 4, 2)
        value = Tile(64, 4, 1) if taps > rows + 1 else Tile(64, 4 if repeats == 1 else 8, 2)
    elif wide <= 128:
        query = key = Tile(64, 4, 1)
        value = Tile(64, 8 if taps > rows + 1 else 4, 1)
    elif target.arch >= 100:
        query, key, value = Tile(64, 8, 1), Tile(32, 8, 1), Tile(32, 8, 1)
    else:
        query, key = Tile(64, 8, 1), Tile(64 if repeats == 1 else 32, 8, 1)
        value = Tile(32, 4, 1) if repeats == 1 else Tile(64, 8, 1)
    if dtype == torch.float32:
        sums = Tile(16, 8, 1)
    elif target.backend == "hip":
        sums = Tile(64, 4, 1)
    else:
        sums = Tile(32, 8, 2) if rows > 64 else Tile(64, 8, 2) if wide > 128 else Tile(64, 4, 2)
    return Tiles(
        query._replace(columns=min(query.columns, padded(dim))),
        key._replace(columns=min(key.columns, padded(dim))),
        value._replace(columns=min(value.columns, padded(value_dim))),
        sums._replace(columns=min(sums.columns, padded(value_dim))),
    )


class Gradients(NamedTuple):
    """What the launches of a backward fill; the last three are still to be summed."""

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor | None
    """[B, H, splits, slices]"""
    scale: Tensor | None
    """[B, H, splits, slices]"""
    taps: Tensor | None
    """[B, H, splits, TILE, blocks * TILE]: the diagonals i - j are the lags, the last block holds lag 0."""


def backward(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`: arguments as there, grad [B, H, T, Dv] like its result.

    -> gradients of query, key, value (contiguous, in their dtypes), alpha, local_scale, conv_weight (float32;
    None where the argument is None). Two runs give the same bits. `target` stands in for the device when
    tiles and splits are chosen.
    """
    target = target_of(query.device) if target is None else target
    launches, found = plan(
        grad, query, key, value, alpha, local_scale, conv_weight, activation, group_size, normalize, target
    )
    run(launches, query.device)
    return (
        found.query,
        found.key,
        found.value,
        None if found.alpha is None else found.alpha.sum((0, 2, 3)),
        None if found.scale is None else found.scale.sum((0, 2, 3)),
        None if found.taps is None or conv_weight is None else _by_lag(found.taps, conv_weight.shape[1]),
    )


def plan(
    grad: Tensor,
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
    tiles: Tiles | None = None,
) -> tuple[list[Launch], Gradients]:
    """The launches of `backward`, and the tensors they fill. `tiles` replaces `backward_tiles`'s choice."""
    batch, heads, length, dim = query.shape
    kv_heads, value_dim, device = key.shape[1], value.shape[3], query.device
    repeats = heads // kv_heads
    tile, used = tile_rows(group_size)
    launches: list[Launch] = []
    matrix = query.dtype != torch.float32
    given_query, given_key = query, key
    grad, value = readable(grad.to(value.dtype)), readable(value)
    query, key = readable(query), readable(key)
    if normalize:
        before, query = unit_rows(query)
        launches.append(before)
        before, key = unit_rows(key)
        launches.append(before)

    def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def strides(**tensors: Tensor) -> dict[str, int]:
        return {f"{name}_{axis}": x.stride(n) for name, x in tensors.items() for n, axis in enumerate("bht")}

    taps = 0 if conv_weight is None else conv_weight.shape[1]
    # A descriptor reads whole tiles: it cannot leave out rows between the used ones and the next tile's.
    by_descriptor = used == tile and query.dtype != torch.float32
    by_descriptor = by_descriptor and describable(target, query, key, value, grad)
    if tiles is None:
        tiles = backward_tiles(target, dim, value_dim, query.dtype, tile, repeats, taps, by_descriptor)
    by_descriptor = by_descriptor and not any(x.chunk for x in tiles)

    def read(x: Tensor, columns: int) -> Any:
        return described(x, tile, columns) if by_descriptor else x

    slices = triton.cdiv(dim, tiles.key.columns)
    parts = triton.cdiv(length, used)
    span = triton.cdiv(parts, splits_for(batch * kv_heads * slices, parts, target.processors))
    splits = triton.cdiv(parts, span)
    walk = dict(length=length, splits=splits, span=span)
    shape = dict(D=dim, BD=padded(dim), DV=value_dim, TILE=tile, USED=used)
    options = dict(GROUP=group_size, RELU2=activation == "relu2", DESCRIBED=by_descriptor)
    wide = dict(BV=padded(value_dim), **options)
    weights = dict(ALPHA=alpha, SCALE=local_scale)
    dquery, dkey, dvalue = (buffer(*x.shape, dtype=x.dtype) for x in (query, key, value))

    state = grad_state = None
    if splits > 1 and alpha is not None:
        count, size = batch * kv_heads, dim * value_dim
        state, grad_state = buffer(count, splits - 1, size), buffer(count, splits - 1, size)
        columns, warps, stages, _ = tiles.sums
        grid = (count * triton.cdiv(value_dim, columns), splits - 1)
        launches += [
            Launch(
                state_kernel,
                grid,
                {**dict(K=key, V=value, STATE=state, heads=kv_heads), **walk, **strides(k=key, v=value)},
                {**shape, "BV": columns},
                warps,
                stages,
                # Below 64 rows no wgmma: narrower states take the older instructions.
                matrix and dim > 32,
            ),
            Launch(
                grad_state_kernel,
                grid,
                {**dict(Q=query, GRAD=grad, ALPHA=alpha, STATE=grad_state, heads=kv_heads), **walk}
                | strides(q=query, g=grad),
                {**shape, **dict(BS=columns, REPEATS=repeats, STAGES=stages)},
                warps,
                stages,
                matrix and dim > 32,
            ),
        ]
        if splits > 2:
            for x in (state, grad_state):
                grid = (count, triton.cdiv(size, _SCAN))
                arguments = dict(STATE=x, count=splits - 1)
                launches.append(
                    Launch(scan_kernel, grid, arguments, dict(SIZE=size, BLOCK=_SCAN), matrix=False)
                )

    d_alpha = d_scale = d_taps = None
    if alpha is None and local_scale is None:
        dquery.zero_()
        dkey.zero_()
    else:
        wide_dim, wide_value = padded(dim), padded(value_dim)
        tensors = dict(Q=read(query, wide_dim), K=read(key, wide_dim), V=read(value, wide_value))
        tensors["GRAD"] = read(grad, wide_value)
        row_strides = strides(q=query, k=key, v=value, g=grad)
        columns, warps, stages, chunk = tiles.query
        slices = triton.cdiv(dim, columns)
        d_alpha = None if alpha is None else buffer(batch, heads, splits, slices)
        d_scale = None if local_scale is None else buffer(batch, heads, splits, slices)
        launches.append(
            Launch(
                query_grad_kernel,
                (batch * heads * slices, splits),
                {**tensors, **weights, **row_strides, **walk}
                | dict(Q_SLICE=read(query, columns), K_SLICE=read(key, columns), OUT=dquery, STATE=state)
                | dict(D_ALPHA=d_alpha, D_SCALE=d_scale)
                | dict(heads=heads, repeats=repeats),
                {**shape, **wide, **dict(BS=columns, STAGES=stages, CHUNK=chunk)},
                warps,
                stages,
                matrix,
            )
        )
        columns, warps, stages, chunk = tiles.key
        launches.append(
            Launch(
                key_grad_kernel,
                (batch * kv_heads * triton.cdiv(dim, columns), splits),
                {**tensors, **weights, **row_strides, **walk}
                | dict(Q_SLICE=read(query, columns), OUT=dkey, STATE=grad_state, heads=kv_heads),
                {**shape, **wide, **dict(BS=columns, REPEATS=repeats, STAGES=stages, CHUNK=chunk)},
                warps,
                stages,
                matrix,
            )
        )
    columns, warps, stages, chunk = tiles.value
    launches.append(
        Launch(
            value_grad_kernel,
            (batch * kv_heads * triton.cdiv(value_dim, columns), splits),
            {**weights, **strides(q=query, k=key, g=grad), **walk}
            | dict(Q=read(query, padded(dim)), K=read(key, padded(dim)), GRAD=read(grad, columns))
            | dict(OUT=dvalue, TAPS=conv_weight, STATE=grad_state)
            | dict(heads=kv_heads),
            {**shape, **options, **dict(BS=columns, REPEATS=repeats, N_TAPS=taps)}
            | dict(STAGES=stages, CHUNK=chunk),
            warps,
            stages,
            matrix,
        )
    )
    if taps:
        blocks = triton.cdiv(taps - 1, tile) + 1
        parts = triton.cdiv(length, tile)
        programs = batch * heads * triton.cdiv(blocks, 2)
        span = triton.cdiv(parts, splits_for(programs, parts, target.processors))
        splits = triton.cdiv(parts, span)
        d_taps = buffer(batch, heads, splits, tile, blocks * tile)
        columns, warps, stages, _ = tiles.sums
        launches.append(
            Launch(
                taps_grad_kernel,
                (batch * heads, splits, triton.cdiv(blocks, 2)),
                dict(V=value, GRAD=grad, OUT=d_taps, length=length, heads=heads, repeats=repeats)
                | dict(splits=splits, span=span, **strides(v=value, g=grad)),
                dict(DV=value_dim, CHUNK=columns, TILE=tile, BLOCKS=blocks, STAGES=stages),
                warps,
                stages,
                matrix,
            )
        )
    if normalize and (alpha is not None or local_scale is not None):
        after, dquery = unit_rows_backward(given_query, dquery)
        launches.append(after)
        after, dkey = unit_rows_backward(given_key, dkey)
        launches.append(after)
    return launches, Gradients(dquery, dkey, dvalue, d_alpha, d_scale, d_taps)


_SCAN = 1024


def _by_lag(blocks: Tensor, taps: int) -> Tensor:
    """Sums of [B, H, splits, TILE, n * TILE] along its diagonals: [H, taps]."""
    total = blocks.sum((0, 2))
    heads, tile, width = total.shape
    # Row i, column i + u holds lag width - tile - u: one more than a row's stride walks down a diagonal.
    diagonals = total.as_strided((heads, tile, width - tile + 1), (tile * width, width + 1, 1))
    return diagonals.sum(1).flip(1)[:, :taps]
