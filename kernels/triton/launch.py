# mypy: allow-untyped-defs
"""What the Triton kernels share: the device they are tuned for, a launch as data, and their common loads.

A kernel's host function does not launch: it returns `Launch` records (kernel, grid, arguments, constants,
warps, stages) for given tensors, and `run` executes them. The same records, made from meta tensors, are what
`tests/triton_aot.py` compiles ahead of time for GPUs that are not there, so that the tile sizes tested are
the ones used.

One source serves triton 3.6 to 3.9, so these stay out: block pointers, `boundary_check`, positional arguments
after `mask`, `tl.squeeze`/`unsqueeze`, `warp_specialize`, plain Python globals. Arithmetic is in float32 and
narrow types appear as operands of `tl.dot` only (the interpreter cannot do bfloat16 arithmetic).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


class Target(NamedTuple):
    """What tiles and splits are chosen by."""

    backend: str
    """"cuda", "hip", or "cpu" (the interpreter)."""
    arch: int
    """80, 90, 100 for CUDA; 0x942 for gfx942 (names are hexadecimal: gfx90a)."""
    processors: int
    """Streaming multiprocessors or compute units."""


@dataclass(frozen=True)
class Launch:
    """One kernel call as data: `arguments` holds tensors, descriptors, numbers and None."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    matrix: bool = True
    """Whether it must use matrix instructions: checked on the compiled code."""


def target_of(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target("cpu", 0, 1)
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = found.gcnArchName.split(":")[0]
        return Target("hip", int(name.removeprefix("gfx"), 16), found.multi_processor_count)
    return Target("cuda", found.major * 10 + found.minor, found.multi_processor_count)


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Launch in order on `device`, whichever is current."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for item in launches:
            # Fused multiply-add is asked for by name: triton announces that its default will change.
            item.kernel[item.grid](
                **item.arguments,
                **item.constants,
                num_warps=item.warps,
                num_stages=item.stages,
                enable_fp_fusion=True,
            )


def interpreted() -> bool:
    """Whether triton was imported with its interpreter on, and so runs on CPU tensors."""
    return not isinstance(load_rows, triton.JITFunction)


def tile_rows(group_size: int) -> tuple[int, int]:
    """(rows of a tile, rows of it that are used): as many whole groups as fit.

    A tile has 64 rows because that is the least that wgmma takes and 128 do not fit the registers; groups
    above 64 need 128. Groups that do not divide the tile leave its last rows unused.
    """
    tile = 64 if group_size <= 64 else 128
    return tile, tile // group_size * group_size


def padded(dim: int) -> int:
    """The power of two a head dimension is padded to; `tl.dot` wants 16 at least."""
    return max(16, triton.next_power_of_2(dim))


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of the first three axes of tensors [B, H, T, D], as kernels name them: `q_b`, `q_h`, `q_t`."""
    return {f"{name}_{axis}": x.stride(n) for name, x in tensors.items() for n, axis in enumerate("bht")}


def readable(x: Tensor) -> Tensor:
    """x [B, H, T, D], copied if its last stride is not 1 or the rows of a tile lie 2^31 elements apart."""
    fits = (x.stride(-1) == 1 or x.shape[-1] == 1) and abs(x.stride(-2)) * 128 < 2**31
    return x if fits else x.contiguous()


def describable(target: Target, *tensors: Tensor) -> bool:
    """Whether the device has a copy engine that reads tiles by descriptor, and could read these [B, H, T, D].

    Descriptors save the registers of addresses and masks, and the instructions that copy. Ampere has none of
    this: there triton emulates them at the price of all registers. Consumer Blackwell (12.x) has them but too
    little shared memory for the tiles chosen with them.
    """
    engine = target.backend == "cuda" and 90 <= target.arch < 120
    return engine and all(_describable(x) for x in tensors)


def _describable(x: Tensor) -> bool:
    bytes_apart = [s * x.element_size() for n, s in zip(x.shape[:-1], x.stride(), strict=False) if n > 1]
    aligned = all(step > 0 and step % 16 == 0 for step in bytes_apart)
    return aligned and x.stride(-1) == 1 and (x.device.type == "meta" or x.data_ptr() % 16 == 0)


def described(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [B, H, T, D] as a descriptor that loads [1, 1, rows, columns], zeros outside."""
    # The stride of an axis of one means nothing in torch and must be aligned here.
    strides = [s if n > 1 else 16 for n, s in zip(x.shape[:-1], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, columns])


@triton.jit
def load_rows(pointer, start, rows, columns, stride, length, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[rows, columns] of rows `start + rows` of a matrix [length, WIDTH]; zeros outside. `columns` < PADDED.

    `start` is one number and may be negative; only its product with the stride is formed in 64 bits.
    """
    keep = (start + rows >= 0) & (start + rows < length)
    at = pointer + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if WIDTH == PADDED:
        return tl.load(at, mask=keep[:, None], other=0.0)
    else:
        return tl.load(at, mask=keep[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def load_tile(
    X, b, h, start, rows, columns, first, stride, length, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Rows `start + rows` and `columns` = first + [0, BLOCK) of head (b, h): [rows, BLOCK], zeros outside.

    X is a descriptor of the whole [B, H, T, WIDTH] tensor (see `described`) when DESCRIBED, and otherwise a
    pointer to the head's own matrix, as for `load_rows`.
    """
    if DESCRIBED:
        return X.load([b, h, start, first]).reshape(X.block_shape[2], BLOCK)
    else:
        return load_rows(X, start, rows, columns, stride, length, WIDTH, PADDED)


@triton.jit
def store_rows(
    pointer, value, start, rows, columns, stride, length, WIDTH: tl.constexpr, PADDED: tl.constexpr
):
    """The mirror of `load_rows`: what lies outside is not written."""
    keep = (start + rows >= 0) & (start + rows < length)
    at = pointer + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if WIDTH == PADDED:
        tl.store(at, value.to(pointer.dtype.element_ty), mask=keep[:, None])
    else:
        tl.store(at, value.to(pointer.dtype.element_ty), mask=keep[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def load_band(taps, lag, TAPS: tl.constexpr):
    """Convolution weights [TAPS] at any lags: zero outside 0 <= lag < TAPS. A Toeplitz band, float32."""
    return tl.load(taps + lag, mask=(lag >= 0) & (lag < TAPS), other=0.0)
