"""Every Triton kernel compiles for GPUs that are not here, in the tiles it would be launched with, and well.

Well means: matrix instructions of the target's own kind, no spilled registers, no stack. Compilers fail at
this silently and by an order of magnitude: ptxas turns some kernels for sm_80 into 32 registers and 10 KB of
stack, and a kernel that asks for more shared memory than there is comes out empty.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from linearize.kernels.triton.launch import Launch
from torch import Tensor
from triton_aot import TARGETS, build, identity

TESTS = Path(__file__).resolve().parent.parent
# The ptxas of triton 3.6 needs a little more for sm_80.
STACK = 64 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 128


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def plan_of(module: str) -> Any:
    return import_module(f"linearize.kernels.triton.{module}").prepare


def launches(
    target: str,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    group_size: int = 64,
    taps: int = 32,
    value_dim: int | None = None,
    activation: str = "relu2",
    heads: tuple[int, int] = (8, 4),
) -> Iterator[Launch]:
    """What the entry points would launch: long inputs whole (many heads) and split (few), a step, a tree."""
    device, value_dim = TARGETS[target], value_dim or dim
    query_heads, kv_heads = heads
    tables = (meta(query_heads), meta(query_heads), meta(query_heads, taps))
    how = (activation, group_size, True)
    for batch in (512, 1):
        length = 4096
        query = meta(batch, query_heads, length, dim, dtype=dtype)
        key = meta(batch, kv_heads, length, dim, dtype=dtype)
        value = meta(batch, kv_heads, length, value_dim, dtype=dtype)
        grad = meta(batch, query_heads, length, value_dim, dtype=dtype)
        yield from plan_of("forward")(query, key, value, *tables, *how, device)[0]
        yield from plan_of("backward")(grad, query, key, value, *tables, *how, device)[0]

    batch, nodes = 64, 32
    window = group_size * -(-(nodes + max(group_size, taps)) // group_size)
    state = (
        meta(batch, kv_heads, dim, value_dim),
        meta(batch, kv_heads, window, dim, dtype=dtype),
        meta(batch, kv_heads, window, value_dim, dtype=dtype),
        meta(batch, dtype=torch.int64),
        meta(batch, dtype=torch.int64),
    )

    def tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
        return (
            meta(batch, query_heads, count, dim, dtype=dtype),
            meta(batch, kv_heads, count, dim, dtype=dtype),
            meta(batch, kv_heads, count, value_dim, dtype=dtype),
        )

    yield from plan_of("decode")(*tokens(1), *state, *tables, *how, meta(batch, dtype=torch.bool), device)[0]
    family = (meta(batch, nodes, dtype=torch.int64), meta(batch, nodes, nodes, dtype=torch.bool))
    yield plan_of("tree")(*tokens(nodes), *state, *family, *tables, *how, device)[0]


def check(target: str, dim: int, stack: int = STACK, **options: Any) -> None:
    seen = set()
    faults = []
    for launch in launches(target, dim, **options):
        if identity(launch) not in seen:
            seen.add(identity(launch))
            built = build(launch, target)
            print(built)
            faults += built.faults(launch, stack)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "target", [pytest.param(t, marks=pytest.mark.slow if t != "sm_90" else ()) for t in TARGETS]
)
def test_kernels_compile_without_stack_or_spills(target: str) -> None:
    check(target, 64)


@pytest.mark.slow
def test_a_head_dimension_of_128_compiles_so_too() -> None:
    check("sm_90", 128)


@pytest.mark.slow
def test_numbers_equal_to_one_are_compiled_in() -> None:
    """Triton makes an argument that is 1 a constant, which has none of a tensor's methods."""
    check("sm_90", 64, heads=(1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [32, 80, 96, 128, 256])
@pytest.mark.parametrize("target", TARGETS)
def test_other_head_dimensions(target: str, dim: int) -> None:
    check(target, dim)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    dict(dtype=torch.float16),
    dict(group_size=16),
    dict(group_size=32, activation="linear"),
    dict(group_size=48),
    dict(taps=200),
    dict(value_dim=32),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("target", TARGETS)
def test_other_options(target: str, options: dict[str, Any]) -> None:
    check(target, 64, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_groups_of_128_spill_a_little(target: str, dim: int) -> None:
    check(target, dim, stack=512, group_size=128)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_float32_compiles(target: str, dim: int) -> None:
    """Without matrix instructions operands pass through registers and spill: slow, but bounded."""
    check(target, dim, stack=2560, dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_triton_3_6_compiles_them_too(tmp_path: Path) -> None:
    """torch 2.11 comes with triton 3.6."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    found = subprocess.run([*install, "triton==3.6.0"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"triton 3.6.0 cannot be had: {found.stderr.strip().splitlines()[-1]}")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import pytest, triton
assert triton.__version__ == "3.6.0", triton.__version__
sys.exit(pytest.main(["tests/kernels/test_triton_aot.py", "-q", "-m", "not slow", "-p", "no:cacheprovider"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
