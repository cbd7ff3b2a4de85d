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

from .forward import scans, splits_for, state_kernel
from .gradients import (
    grad_state_kernel,
    key_grad_kernel,
    query_grad_kernel,
    taps_grad_kernel,
    value_grad_kernel,
)
from .launch import (
    Launch,
    Target,
    describable,
    described,
    padded,
    readable,
    run,
    strides,
    target_of,
    tile_rows,
)
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
    """The gradients of `forward`. Two runs give the same bits.

    Args:
        grad: [B, H, T, Dv], of its result.
        query, key, value, ...: Its arguments.

    Returns:
        Gradients of query, key and value (contiguous, in their dtypes), and of alpha, local_scale and
        conv_weight (float32; None where the argument is None).
    """
    target = target_of(query.device) if target is None else target
    launches, found = prepare(
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


def prepare(
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
    launches: list[Launch] = []
    given_query, given_key = query, key
    grad, value = readable(grad.to(value.dtype)), readable(value)
    query, key = readable(query), readable(key)
    if normalize:
        of_query, query = unit_rows(query)
        of_key, key = unit_rows(key)
        launches += [of_query, of_key]
    call = _Call(
        grad, query, key, value, alpha, local_scale, conv_weight, activation, group_size, target, tiles
    )
    if call.splits > 1 and alpha is not None:
        launches += call.border_states()
    scored = alpha is not None or local_scale is not None
    if scored:
        launches += [call.query_gradient(), call.key_gradient()]
    else:
        call.found.query.zero_()
        call.found.key.zero_()
    launches.append(call.value_gradient())
    if conv_weight is not None:
        launches.append(call.taps_gradient())
    found = call.found
    if normalize and scored:
        of_query, dquery = unit_rows_backward(given_query, found.query)
        of_key, dkey = unit_rows_backward(given_key, found.key)
        launches += [of_query, of_key]
        found = found._replace(query=dquery, key=dkey)
    return launches, found


class _Call:
    """One backward: its tensors (rows of query and key already divided by their norms), its sizes, how it is
    split, and the launches made from them.

    state, grad_state [B * Hkv, splits - 1, D * Dv]: sums at the borders of the splits, once `border_states`
    was called. found: what the launches fill.
    """

    def __init__(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: Tensor | None,
        local_scale: Tensor | None,
        conv_weight: Tensor | None,
        activation: str,
        group_size: int,
        target: Target,
        tiles: Tiles | None,
    ) -> None:
        self.grad, self.query, self.key, self.value = grad, query, key, value
        self.alpha, self.local_scale, self.conv_weight, self.target = alpha, local_scale, conv_weight, target
        self.batch, self.heads, self.length, self.dim = query.shape
        self.kv_heads, self.value_dim = key.shape[1], value.shape[3]
        self.repeats = self.heads // self.kv_heads
        self.tile, self.used = tile_rows(group_size)
        self.taps = 0 if conv_weight is None else conv_weight.shape[1]
        self.matrix = query.dtype != torch.float32
        # A descriptor reads whole tiles: it cannot leave out rows between the used ones and the next tile's.
        described_ = self.used == self.tile and self.matrix and describable(target, query, key, value, grad)
        if tiles is None:
            sizes = (self.dim, self.value_dim, query.dtype, self.tile, self.repeats, self.taps)
            tiles = backward_tiles(target, *sizes, described_)
        self.tiles = tiles
        self.by_descriptor = described_ and not any(x.chunk for x in tiles)

        slices = triton.cdiv(self.dim, tiles.key.columns)
        parts = triton.cdiv(self.length, self.used)
        programs = self.batch * self.kv_heads * slices
        span = triton.cdiv(parts, splits_for(programs, parts, target.processors))
        self.splits = triton.cdiv(parts, span)
        self.walk = dict(length=self.length, splits=self.splits, span=span)
        self.shape = dict(D=self.dim, BD=padded(self.dim), DV=self.value_dim, TILE=self.tile, USED=self.used)
        self.options = dict(GROUP=group_size, RELU2=activation == "relu2", DESCRIBED=self.by_descriptor)
        self.weights = dict(ALPHA=alpha, SCALE=local_scale)
        self.state: Tensor | None = None
        self.grad_state: Tensor | None = None
        dquery, dkey, dvalue = (self.buffer(*x.shape, dtype=x.dtype) for x in (query, key, value))
        self.found = Gradients(dquery, dkey, dvalue, None, None, None)

    def buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.query.device)

    def read(self, x: Tensor, columns: int) -> Any:
        """x as a kernel loads it, `columns` at a time."""
        return described(x, self.tile, columns) if self.by_descriptor else x

    def whole_rows(self) -> dict[str, Any]:
        """Query, key, value and gradient as the kernels of dq and dk read them, whole rows at a time."""
        dim, value_dim = padded(self.dim), padded(self.value_dim)
        tensors = dict(Q=self.read(self.query, dim), K=self.read(self.key, dim))
        tensors |= dict(V=self.read(self.value, value_dim), GRAD=self.read(self.grad, value_dim))
        rows = strides(q=self.query, k=self.key, v=self.value, g=self.grad)
        return {**tensors, **self.weights, **rows, **self.walk}

    def border_states(self) -> list[Launch]:
        """Sums of k^T v before, and of the gradients of the state after, every split."""
        count, size = self.batch * self.kv_heads, self.dim * self.value_dim
        self.state = self.buffer(count, self.splits - 1, size)
        self.grad_state = self.buffer(count, self.splits - 1, size)
        columns, warps, stages, _ = self.tiles.sums
        grid = (count * triton.cdiv(self.value_dim, columns), self.splits - 1)
        # Below 64 rows no wgmma: narrower states take the older instructions.
        matrix = self.matrix and self.dim > 32
        forward = dict(K=self.key, V=self.value, STATE=self.state, heads=self.kv_heads)
        reverse = dict(Q=self.query, GRAD=self.grad, ALPHA=self.alpha, STATE=self.grad_state)
        return [
            Launch(
                state_kernel,
                grid,
                {**forward, **self.walk, **strides(k=self.key, v=self.value)},
                {**self.shape, "BV": columns},
                warps,
                stages,
                matrix,
            ),
            Launch(
                grad_state_kernel,
                grid,
                {**reverse, "heads": self.kv_heads, **self.walk, **strides(q=self.query, g=self.grad)},
                {**self.shape, **dict(BS=columns, REPEATS=self.repeats, STAGES=stages)},
                warps,
                stages,
                matrix,
            ),
            *scans(self.state, self.grad_state),
        ]

    def query_gradient(self) -> Launch:
        """dq, and the gradients of alpha and local_scale, still to be summed."""
        columns, warps, stages, chunk = self.tiles.query
        slices = triton.cdiv(self.dim, columns)
        sums = (self.batch, self.heads, self.splits, slices)
        d_alpha = None if self.alpha is None else self.buffer(*sums)
        d_scale = None if self.local_scale is None else self.buffer(*sums)
        self.found = self.found._replace(alpha=d_alpha, scale=d_scale)
        return Launch(
            query_grad_kernel,
            (self.batch * self.heads * slices, self.splits),
            self.whole_rows()
            | dict(Q_SLICE=self.read(self.query, columns), K_SLICE=self.read(self.key, columns))
            | dict(OUT=self.found.query, STATE=self.state, D_ALPHA=d_alpha, D_SCALE=d_scale)
            | dict(heads=self.heads, repeats=self.repeats),
            {**self.shape, "BV": padded(self.value_dim), **self.options}
            | dict(BS=columns, STAGES=stages, CHUNK=chunk),
            warps,
            stages,
            self.matrix,
        )

    def key_gradient(self) -> Launch:
        columns, warps, stages, chunk = self.tiles.key
        return Launch(
            key_grad_kernel,
            (self.batch * self.kv_heads * triton.cdiv(self.dim, columns), self.splits),
            self.whole_rows()
            | dict(Q_SLICE=self.read(self.query, columns), OUT=self.found.key, STATE=self.grad_state)
            | dict(heads=self.kv_heads),
            {**self.shape, "BV": padded(self.value_dim), **self.options}
            | dict(BS=columns, REPEATS=self.repeats, STAGES=stages, CHUNK=chunk),
            warps,
            stages,
            self.matrix,
        )

    def value_gradient(self) -> Launch:
        columns, warps, stages, chunk = self.tiles.value
        dim = padded(self.dim)
        return Launch(
            value_grad_kernel,
            (self.batch * self.kv_heads * triton.cdiv(self.value_dim, columns), self.splits),
            {**self.weights, **strides(q=self.query, k=self.key, g=self.grad), **self.walk}
            | dict(Q=self.read(self.query, dim), K=self.read(self.key, dim))
            | dict(GRAD=self.read(self.grad, columns), OUT=self.found.value, TAPS=self.conv_weight)
            | dict(STATE=self.grad_state, heads=self.kv_heads),
            {**self.shape, **self.options, **dict(BS=columns, REPEATS=self.repeats, N_TAPS=self.taps)}
            | dict(STAGES=stages, CHUNK=chunk),
            warps,
            stages,
            self.matrix,
        )

    def taps_gradient(self) -> Launch:
        """The gradient of the convolution by place in a tile, still to be summed along diagonals."""
        blocks = triton.cdiv(self.taps - 1, self.tile) + 1
        parts = triton.cdiv(self.length, self.tile)
        programs = self.batch * self.heads * triton.cdiv(blocks, 2)
        span = triton.cdiv(parts, splits_for(programs, parts, self.target.processors))
        splits = triton.cdiv(parts, span)
        d_taps = self.buffer(self.batch, self.heads, splits, self.tile, blocks * self.tile)
        self.found = self.found._replace(taps=d_taps)
        columns, warps, stages, _ = self.tiles.sums
        return Launch(
            taps_grad_kernel,
            (self.batch * self.heads, splits, triton.cdiv(blocks, 2)),
            dict(V=self.value, GRAD=self.grad, OUT=d_taps, length=self.length, heads=self.heads)
            | dict(repeats=self.repeats, splits=splits, span=span, **strides(v=self.value, g=self.grad)),
            dict(DV=self.value_dim, CHUNK=columns, TILE=self.tile, BLOCKS=blocks, STAGES=stages),
            warps,
            stages,
            self.matrix,
        )


def _by_lag(blocks: Tensor, taps: int) -> Tensor:
    """Sums of [B, H, splits, TILE, n * TILE] along its diagonals: [H, taps]."""
    total = blocks.sum((0, 2))
    heads, tile, width = total.shape
    # Row i, column i + u holds lag width - tile - u: one more than a row's stride walks down a diagonal.
    diagonals = total.as_strided((heads, tile, width - tile + 1), (tile * width, width + 1, 1))
    return diagonals.sum(1).flip(1)[:, :taps]
