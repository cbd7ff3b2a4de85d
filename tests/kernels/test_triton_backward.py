"""The Triton backward equals autograd through the oracle, in Triton's interpreter (CPU tensors, no GPU)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bounds import bound
from interpreter import interpreted
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("query", "key", "value", "alpha", "local_scale", "conv_weight")
ALL = ("alpha", "local", "conv")
Inputs = tuple[Tensor | None, ...]


def slow(*values: Any) -> list[Any]:
    """Parameters that repeat what others show already."""
    return [pytest.param(*(x if type(x) is tuple else (x,)), marks=pytest.mark.slow) for x in values]


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
) -> Inputs:
    """grad, query, key, value, alpha, local_scale, conv_weight of random numbers."""
    torch.manual_seed(length)
    value_dim, kv_heads = value_dim or dim, kv_heads or heads
    return (
        torch.randn(batch, heads, length, value_dim).to(dtype),
        torch.randn(batch, heads, length, dim).to(dtype),
        torch.randn(batch, kv_heads, length, dim).to(dtype),
        torch.randn(batch, kv_heads, length, value_dim).to(dtype),
        torch.rand(heads) + 0.5 if "alpha" in parts else None,
        torch.rand(heads) - 1.5 if "local" in parts else None,
        torch.randn(heads, taps) * 0.3 if "conv" in parts else None,
    )


def gradients(
    inputs: Inputs,
    activation: str,
    group_size: int,
    normalize: bool,
    processors: int = 1,
    backend: str = "cpu",
    arch: int = 0,
) -> tuple[Tensor | None, ...]:
    from linearize.kernels.triton.backward import backward
    from linearize.kernels.triton.launch import Target

    return backward(*inputs, activation, group_size, normalize, target=Target(backend, arch, processors))


def wanted(inputs: Inputs, activation: str, group_size: int, normalize: bool) -> list[Tensor | None]:
    from linearize.kernels.naive import augmented_attention

    grad, *leaves = (None if x is None else x.double() for x in inputs)
    for leaf in leaves:
        if leaf is not None:
            leaf.requires_grad_()
    query, key, value, alpha, local_scale, conv_weight = leaves
    repeats = query.shape[1] // key.shape[1]
    out = augmented_attention(
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
    present = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(out, present, grad, materialize_grads=True))
    return [None if x is None else next(found) for x in leaves]


def sizes(inputs: Inputs, activation: str, group_size: int, normalize: bool) -> dict[str, float]:
    """Of the terms of each gradient that may cancel: what was rounded is as large as they are.

    The tables' gradients sum over all tokens, and a unit row's gradient loses its part along the row.
    """
    from linearize.kernels.naive import augmented_attention

    grad, query, key, value, _, _, conv_weight = inputs
    repeats = query.shape[1] // key.shape[1]
    found = {}
    for name, parts in (("alpha", (1.0, None)), ("local_scale", (None, 1.0))):
        out = augmented_attention(
            query,
            key.repeat_interleave(repeats, 1),
            value.repeat_interleave(repeats, 1),
            alpha=parts[0],
            local_scale=parts[1],
            conv_weight=None,
            activation=activation,
            group_size=group_size,
            normalize=normalize,
        )
        found[name] = float((grad.double() * out).norm())
    if conv_weight is not None:
        squares, length = 0.0, grad.shape[2]
        for lag in range(min(conv_weight.shape[1], length)):
            earlier = value[:, :, : length - lag].double().repeat_interleave(repeats, 1)
            squares += float((grad[:, :, lag:].double() * earlier).square().sum())
        found["conv_weight"] = squares**0.5
    if normalize:
        norms = [x.double().norm(dim=-1, keepdim=True) for x in (query, key)]
        units = (query.double() / norms[0], key.double() / norms[1])
        of_units = wanted((grad, *units, *inputs[3:]), activation, group_size, False)
        for name, x, norm in zip(NAMES, of_units[:2], norms, strict=False):
            found[name] = float((x / norm).norm())
    return found


def check(
    inputs: Inputs,
    activation: str = "relu2",
    group_size: int = 64,
    normalize: bool = True,
    processors: int = 1,
    backend: str = "cpu",
    arch: int = 0,
) -> None:
    """One call against the oracle; `processors` forces splits, `backend` and `arch` choose the tiles."""
    got = gradients(inputs, activation, group_size, normalize, processors, backend, arch)
    want = wanted(inputs, activation, group_size, normalize)
    terms = sizes(inputs, activation, group_size, normalize)
    grad, query, key, _, *_ = inputs
    # Over the tokens into a state and over them again out of it, over both widths, and over the query heads.
    additions = 2 * grad.shape[2] + grad.shape[3] + query.shape[3] + query.shape[1] // key.shape[1]
    # Stored: both unit rows, a state or weight that is multiplied, the gradient of a weight, that of a unit
    # row, the result.
    allowed = bound(query.dtype, additions, stored=6)
    for name, ours, theirs, like in zip(NAMES, got, want, inputs[1:], strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == like.dtype and ours.shape == like.shape, name
            error = float((ours.double() - theirs).norm())
            size = max(float(theirs.norm()), terms.get(name, 0.0))
            assert error <= allowed * size, f"{name}: {error} of {size}"


@interpreted
@pytest.mark.parametrize("length", [1, 65, 200, *slow(2, 63, 64, 128)])
def test_lengths_around_the_borders_of_groups(length: int) -> None:
    check(case(length, taps=63))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_types_stay_within_their_rounding(dtype: torch.dtype) -> None:
    check(case(150, dim=64, heads=2, kv_heads=1, dtype=dtype))


@interpreted
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("dim", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("backend", "arch"), [("cuda", 90), ("hip", 942), *slow(("cuda", 80), ("cuda", 100))]
)
def test_the_tiles_of_every_device(backend: str, arch: int, dim: int, group_size: int) -> None:
    inputs = case(140, dim=dim, heads=2, kv_heads=1, taps=33, dtype=torch.bfloat16)
    check(inputs, group_size=group_size, backend=backend, arch=arch)


@interpreted
@pytest.mark.parametrize(("processors", "splits"), [(1, 2), (2, 3)])
def test_splits_change_nothing(processors: int, splits: int) -> None:
    """14 tiles in 2 and in 3 walks, with states carried both ways."""
    from linearize.kernels.triton.forward import splits_for

    assert splits_for(1, 14, processors) == splits
    check(case(430, dim=16), group_size=33, processors=processors)
    check(case(430, dim=16, heads=2, kv_heads=1, taps=40), group_size=33, processors=processors)


@interpreted
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_heads_add_up_in_their_key_head(kv_heads: int) -> None:
    check(case(70, dim=16, batch=2, heads=4, kv_heads=kv_heads))


@interpreted
@pytest.mark.parametrize("group_size", [24, 48, 128, *slow(16, 32)])
def test_any_group_size(group_size: int) -> None:
    check(case(140, dim=24, taps=9), group_size=group_size)


@interpreted
@pytest.mark.parametrize("taps", [1, 65, 150, *slow(2, 64, 66)])
def test_taps_reach_back_any_number_of_tiles(taps: int) -> None:
    check(case(200, dim=16, taps=taps), group_size=48)


@interpreted
@pytest.mark.parametrize("parts", [("alpha",), ("local",), ("conv",), (), ("alpha", "conv")], ids=str)
def test_parts_may_be_left_out(parts: tuple[str, ...]) -> None:
    check(case(140, dim=16, parts=parts))
    check(case(140, dim=16, parts=parts), group_size=16)


@interpreted
@pytest.mark.parametrize("group_size", [16, 64])
def test_linear_activation(group_size: int) -> None:
    check(case(100, dim=16), "linear", group_size)


@interpreted
def test_rows_may_come_without_normalisation() -> None:
    grad, query, key, *rest = case(130, dim=16)
    check((grad, query / 4, key / 4, *rest), normalize=False)


@interpreted
@pytest.mark.parametrize(("dim", "value_dim"), [(24, 100), (128, 64), *slow((80, 80), (96, 32), (256, 16))])
def test_head_dimensions_that_fill_no_tile(dim: int, value_dim: int) -> None:
    check(case(70, dim=dim, value_dim=value_dim))


@interpreted
def test_any_strides() -> None:
    plain = case(70, dim=16, heads=2)
    want = gradients(plain, "relu2", 32, True)
    grad, query, key, value, *tables = plain
    moved = (
        grad.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([query, key], 3)[..., :16],
        key.transpose(2, 3).contiguous().transpose(2, 3),
        value[:, :1].expand(-1, 2, -1, -1),
    )
    same_value = (grad, query, key, value[:, :1].repeat(1, 2, 1, 1))
    want = gradients((*same_value, *tables), "relu2", 32, True)
    for ours, theirs in zip(gradients((*moved, *tables), "relu2", 32, True), want, strict=True):
        assert torch.equal(ours, theirs)


@interpreted
def test_zero_rows_have_finite_gradients() -> None:
    inputs = case(70, dim=16)
    inputs[1][:, :, 3] = 0
    inputs[2][:, :, 66] = 0
    for found in gradients(inputs, "relu2", 64, True):
        assert found.isfinite().all()


@interpreted
def test_two_runs_give_the_same_bits() -> None:
    inputs = case(300, dim=16, heads=4, kv_heads=2)
    first, second = (gradients(inputs, "relu2", 33, True, processors=4) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@interpreted
def test_half_precision_survives_large_sums() -> None:
    """A sum of k^T v beyond float16's range, from values that fit."""
    grad, query, key, value, *tables = case(200, dim=16, dtype=torch.float16)
    key, query = torch.ones_like(key), query.abs()
    check((grad * 1e-3, query, key, value.abs() * 3000, *tables), group_size=16)
