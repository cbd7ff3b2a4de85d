# mypy: allow-untyped-defs
"""Rows divided by their L2 norm, before the attention kernels, and the gradient of that.

Before, not inside: normalised inside, the operands take a way through registers that costs the attention
kernels their second program per multiprocessor at D = 128. Moves 2 D elements per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from .launch import Launch, load_rows, padded, readable, store_rows

_ROWS = 32


@triton.jit
def _unit(x):
    """(x / |x|, largest |x|, |x| over that) by row. Dividing by the largest first keeps squares in range."""
    largest = tl.max(tl.abs(x), 1)
    largest = tl.where(largest == 0.0, 1.0, largest)
    x = tl.div_rn(x, largest[:, None])
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    norm = tl.where(norm == 0.0, 1.0, norm)
    return x / norm[:, None], largest, norm


@triton.jit(do_not_specialize=["length"])
def unit_kernel(
    X, OUT, stride_b, stride_h, stride_t, length, heads, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr
):
    """OUT = X / |X|, X [B, H, T, D] strided, OUT contiguous; grid (B H, T / ROWS)."""
    head = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BD)
    start = tl.program_id(1) * ROWS
    X += head // heads * stride_b + head % heads * stride_h
    x = load_rows(X, start, rows, columns, stride_t, length, D, BD).to(tl.float32)
    x, _, _ = _unit(x)
    store_rows(OUT + head * length * D, x, start, rows, columns, D, length, D, BD)


@triton.jit(do_not_specialize=["length"])
def unit_backward_kernel(
    X, GRAD, OUT, stride_b, stride_h, stride_t, length, heads, D: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr
):  # fmt: skip
    """OUT = (GRAD - x^ (x^ . GRAD)) / |X|, x^ = X / |X|; GRAD and OUT contiguous. A row of 0: GRAD."""
    head = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BD)
    start = tl.program_id(1) * ROWS
    X += head // heads * stride_b + head % heads * stride_h
    x = load_rows(X, start, rows, columns, stride_t, length, D, BD).to(tl.float32)
    x, largest, norm = _unit(x)
    grad = load_rows(GRAD + head * length * D, start, rows, columns, D, length, D, BD).to(tl.float32)
    grad -= x * tl.sum(x * grad, 1)[:, None]
    grad = tl.div_rn(grad / norm[:, None], largest[:, None])
    store_rows(OUT + head * length * D, grad, start, rows, columns, D, length, D, BD)


def unit_rows(x: Tensor) -> tuple[Launch, Tensor]:
    """x [B, H, T, D], any strides -> the launch, and its contiguous result x / |x| in x's dtype."""
    x = readable(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _launch(unit_kernel, x, dict(X=x, OUT=out)), out


def unit_rows_backward(x: Tensor, grad: Tensor) -> tuple[Launch, Tensor]:
    """Gradient of `unit_rows` at x for grad [B, H, T, D], contiguous, of any dtype -> in x's dtype."""
    x = readable(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _launch(unit_backward_kernel, x, dict(X=x, GRAD=grad, OUT=out)), out


def _launch(kernel, x: Tensor, tensors: dict[str, Tensor]) -> Launch:
    batch, heads, length, dim = x.shape
    numbers = dict(
        stride_b=x.stride(0), stride_h=x.stride(1), stride_t=x.stride(2), length=length, heads=heads
    )
    return Launch(
        kernel,
        (batch * heads, triton.cdiv(length, _ROWS)),
        {**tensors, **numbers},
        dict(D=dim, BD=padded(dim), ROWS=_ROWS),
        matrix=False,
    )
