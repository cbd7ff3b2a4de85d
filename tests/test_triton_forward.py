"""The Triton forward equals the oracle, in Triton's interpreter (CPU tensors, no GPU)."""

from __future__ import annotations

import pytest
import torch
from interpreter import interpreted
from torch import Tensor

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ALL = ("alpha", "local", "conv")


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def case(
    length: int,
    *,
    dim: int = 32,
    value_dim: int | None = None,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    taps: int = 7,
    parts: tuple[str, ...] = ALL,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor | None, ...]:
    """query, key, value, alpha, local_scale, conv_weight of random numbers."""
    torch.manual_seed(length)
    value_dim, kv_heads = value_dim or dim, kv_heads or heads
    return (
        torch.randn(batch, heads, length, dim).to(dtype),
        torch.randn(batch, kv_heads, length, dim).to(dtype),
        torch.randn(batch, kv_heads, length, value_dim).to(dtype),
        torch.rand(heads) + 0.5 if "alpha" in parts else None,
        torch.rand(heads) + 0.5 if "local" in parts else None,
        torch.randn(heads, taps) * 0.3 if "conv" in parts else None,
    )


def check(
    inputs: tuple[Tensor | None, ...],
    activation: str = "relu2",
    group_size: int = 64,
    normalize: bool = True,
    processors: int = 1,
) -> None:
    """One call against the oracle; `processors` forces splits."""
    from linearize.kernels.oracle import augmented_attention
    from linearize.kernels.triton.forward import forward
    from linearize.kernels.triton.launch import Target

    query, key, value, alpha, local_scale, conv_weight = inputs
    assert query is not None and key is not None and value is not None
    got = forward(
        query, key, value, alpha, local_scale, conv_weight, activation, group_size, normalize,
        target=Target("cpu", 0, processors),
    )  # fmt: skip
    repeats = query.shape[1] // key.shape[1]
    want = augmented_attention(
        query,
        key.repeat_interleave(repeats, 1),
        value.repeat_interleave(repeats, 1),
        alpha=alpha,
        local_scale=local_scale,
        conv_weight=conv_weight,
        activation=activation,
        group_size=group_size,
        normalize=normalize,
    )
    assert got.dtype == value.dtype and got.is_contiguous()
    assert relative(got, want) < TOLERANCE[value.dtype]


@interpreted
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 200])
def test_lengths_around_the_borders_of_groups(length: int) -> None:
    check(case(length, taps=63))


@interpreted
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_narrow_types_stay_within_their_rounding(dtype: torch.dtype) -> None:
    check(case(150, dim=64, dtype=dtype))
