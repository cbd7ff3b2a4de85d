"""The Triton forward and its row norms equal float64, in Triton's interpreter (CPU tensors, no GPU).

What is unwritten reads as NaN there (see `interpreter`), so a result close to the oracle is also a whole one.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from bounds import bound
from interpreter import interpreted
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
) -> tuple[Any, ...]:
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
    inputs: tuple[Any, ...],
    activation: str = "relu2",
    group_size: int = 64,
    normalize: bool = True,
    arch: int = 80,
    processors: int = 1,
    columns: int | None = 64,
) -> list[str]:
    """One call against the oracle -> the names of the kernels that ran.

    arch 90: tiles by descriptor, if the call allows. processors: many force splits. columns: the tile's, None
    for the one that would be chosen.
    """
    from linearize.kernels.naive import augmented_attention
    from linearize.kernels.triton.forward import Tile, prepare
    from linearize.kernels.triton.launch import Target, run

    query, key, value, alpha, local_scale, conv_weight = inputs
    tile = None if columns is None else Tile(columns, 4, 2)
    target = Target("cuda", arch, processors)
    launches, got = prepare(*inputs, activation, group_size, normalize, target, tile)
    run(launches, query.device)
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
    # Over the tokens, and over the width for the norm and for the score. Stored: both unit rows, a state or
    # weight that is multiplied, the result.
    assert relative(got, want) <= bound(value.dtype, query.shape[2] + 2 * query.shape[3], stored=4)
    names = [launch.kernel.__name__ for launch in launches]
    by_descriptor = launches[-1].constants["DESCRIBED"]
    return [*names, "descriptors"] if by_descriptor else names


@interpreted
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 200])
def test_lengths_around_the_borders_of_groups(length: int) -> None:
    check(case(length, taps=63))


@interpreted
@pytest.mark.parametrize("length", [1, 64, 130])
def test_tiles_read_by_descriptor(length: int) -> None:
    """Sequences end inside a tile, heads lie next to each other: nothing leaks from one to the next."""
    ran = check(case(length, dim=64, batch=2, heads=2, taps=63, dtype=torch.bfloat16), arch=90)
    assert "descriptors" in ran


@interpreted
def test_no_descriptor_reads_tiles_that_are_used_in_part() -> None:
    """Its rows between the used ones and the next tile's would count twice."""
    ran = check(case(150, dim=64, dtype=torch.bfloat16), group_size=48, arch=90)
    assert "descriptors" not in ran


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", [80, 90])
def test_narrow_types_stay_within_their_rounding(dtype: torch.dtype, arch: int) -> None:
    check(case(150, dim=64, dtype=dtype), arch=arch)


@interpreted
@pytest.mark.parametrize("group_size", [1, 16, 32, 48, 100, 128])
def test_group_sizes(group_size: int) -> None:
    """Several groups share a tile, or a tile is not full, or it is a large one."""
    check(case(150, taps=40), group_size=group_size)


@interpreted
@pytest.mark.parametrize("group_size", [16, 48])
@pytest.mark.parametrize("parts", [("alpha",), ("local",), ("conv",), ("alpha", "conv"), ALL])
def test_parts_left_out(parts: tuple[str, ...], group_size: int) -> None:
    check(case(100, parts=parts), group_size=group_size)


@interpreted
@pytest.mark.parametrize("taps", [1, 2, 64, 65, 66, 150])
def test_taps_that_reach_over_several_tiles(taps: int) -> None:
    check(case(200, taps=taps))


@interpreted
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dim, value_dim", [(80, 80), (96, 32), (32, 80), (128, 128)])
def test_head_dimensions(dim: int, value_dim: int, arch: int) -> None:
    check(case(70, dim=dim, value_dim=value_dim, dtype=torch.float16), arch=arch, columns=None)


@interpreted
def test_linear_activation_without_normalization() -> None:
    check(case(130), "linear", normalize=False)
    check(case(130), "relu2", normalize=False)


@interpreted
@pytest.mark.parametrize("arch", [80, 90])
def test_query_heads_share_key_and_value_heads(arch: int) -> None:
    check(case(100, batch=2, heads=4, kv_heads=2, dtype=torch.float16), arch=arch)


@interpreted
@pytest.mark.parametrize("parts", [ALL, ("local", "conv")])
@pytest.mark.parametrize("length, group_size, splits", [(530, 64, 2), (530, 48, 3), (773, 16, 3)])
def test_splits_of_the_length_change_nothing(
    length: int, group_size: int, splits: int, parts: tuple[str, ...]
) -> None:
    """Few heads for many processors: the length is split, each split starts from a sum of earlier tiles."""
    inputs = case(length, heads=2, kv_heads=1, taps=20, parts=parts)
    ran = check(inputs, group_size=group_size, processors=100)
    assert ("state_kernel" in ran) == ("alpha" in parts)
    assert ("scan_kernel" in ran) == ("alpha" in parts and splits == 3)


@interpreted
@pytest.mark.parametrize("arch", [80, 90])
def test_any_strides(arch: int) -> None:
    """Heads innermost but one, or a last axis that is not contiguous."""
    query, key, value, *rest = case(70, heads=2, dtype=torch.float16)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    value = value.mT.contiguous().mT
    check((query, key, value, *rest), normalize=False, arch=arch)
    check((query, key, value, *rest), arch=arch)


@interpreted
@pytest.mark.parametrize("how", ["expanded heads", "rows not aligned", "start not aligned"])
def test_what_descriptors_cannot_read_goes_by_pointer(how: str) -> None:
    query, key, value, *rest = case(70, heads=2, dtype=torch.float16)
    if how == "expanded heads":
        value = value[:, :1].expand(-1, 2, -1, -1)
    else:
        width, start = (33, 0) if how == "rows not aligned" else (40, 1)
        room = torch.zeros(1, 2, 70, width, dtype=torch.float16)
        room[..., start : start + 32] = value
        value = room[..., start : start + 32]
    assert "descriptors" not in check((query, key, value, *rest), arch=90)


@interpreted
def test_float16_state_beyond_its_largest_number() -> None:
    """5000 is a fine float16 value, and so are the outputs for small queries; a sum of 200 of them is not."""
    query, key, value, *rest = case(200, dim=32, dtype=torch.float16, parts=("alpha",))
    check((query.abs() * 1e-3, key.abs(), value.abs() + 5000, *rest), normalize=False)


@interpreted
def test_two_runs_give_the_same_bits() -> None:
    from linearize.kernels.triton import forward

    inputs = case(100, dtype=torch.bfloat16)
    assert torch.equal(forward(*inputs, "relu2", 64, True), forward(*inputs, "relu2", 64, True))


SCALES = (1.0, 0.0, 1e12, 1e-12, 1e30, 1e-30)


@interpreted
def test_rows_of_any_size_are_normalized_and_rows_of_zeros_stay() -> None:
    from linearize.kernels.triton.launch import run
    from linearize.kernels.triton.normalize import unit_rows, unit_rows_backward

    torch.manual_seed(0)
    x = torch.randn(2, 3, len(SCALES) * 6, 80) * torch.tensor(SCALES).repeat(6)[:, None]
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    launch, unit = unit_rows(x)
    run([launch], x.device)
    exact = x.double().requires_grad_()
    norm = exact.norm(dim=-1, keepdim=True)
    want = exact / torch.where(norm > 0, norm, torch.ones_like(norm))
    assert (unit - want).abs().max() < 3e-7

    grad = torch.randn(x.shape)
    launch, got = unit_rows_backward(x, grad)
    run([launch], x.device)
    (want,) = torch.autograd.grad(want, exact, grad.double())
    for row, scale in enumerate(SCALES):
        places = slice(row, None, len(SCALES))
        assert relative(got[:, :, places], want[:, :, places]) < 2e-6, scale


def test_supports_names_what_it_does_not_take() -> None:
    from linearize.kernels.triton import supports

    query, key, value, _, _, taps = case(10)
    assert supports(query, key, value, taps, "relu2", 64) is None
    refusals = {
        "dtype": supports(query.double(), key.double(), value.double(), taps, "relu2", 64),
        "dtypes": supports(query.half(), key, value, taps, "relu2", 64),
        "laplace": supports(query, key, value, taps, "laplace", 64),
        "group size 256": supports(query, key, value, taps, "relu2", 256),
        "head dimension 320": supports(*case(2, dim=320)[:3], taps, "relu2", 64),
        "float32": supports(*case(2, dim=160)[:3], taps, "relu2", 64),
        "taps": supports(query, key, value, torch.zeros(1, 2000), "relu2", 64),
        "empty": supports(query[:0], key[:0], value[:0], taps, "relu2", 64),
    }
    for word, reason in refusals.items():
        assert reason is not None and word in reason


def test_without_triton_the_package_says_what_to_install() -> None:
    code = """
import sys
sys.modules["triton"] = None
try:
    import linearize.kernels.triton
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "linearize[triton]" in done.stdout


def test_without_the_interpreter_tensors_on_the_cpu_are_refused() -> None:
    from linearize.kernels.triton import available, unavailable_reason

    reason = unavailable_reason(torch.device("cpu"))
    assert reason is not None and "cpu" in reason
    assert not available(torch.device("cpu"))


@interpreted
@pytest.mark.parametrize("norm", (1e20, 1e-38))
def test_rows_of_any_size_keep_their_directions(norm: float) -> None:
    query, key, *rest = case(70)
    rows = [x * (norm / x.norm(dim=-1, keepdim=True)) for x in (query, key)]
    check((*rows, *rest))
