"""No program of a Triton kernel reads or writes what another one of the same launch writes."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from interpreter import interpreted
from races import Watch
from torch import Tensor

HEADS, KV_HEADS, DIM, GROUP, TAPS = 4, 2, 32, 16, 7
HOW = ("relu2", GROUP, True)


def tokens(
    length: int, batch: int = 2, heads: int = HEADS, kv_heads: int = KV_HEADS, value_dim: int = DIM
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    shapes = (heads, DIM), (kv_heads, DIM), (kv_heads, value_dim)
    query, key, value = (torch.randn(batch, n, length, size) for n, size in shapes)
    return query, key, value


def tables(heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return torch.rand(heads), torch.rand(heads), torch.randn(heads, TAPS)


def sequences(arch: int, processors: int, length: int, heads: int, kv_heads: int) -> None:
    """Forward and backward."""
    from linearize.kernels.triton.backward import backward
    from linearize.kernels.triton.forward import forward
    from linearize.kernels.triton.launch import Target

    new, target = tokens(length, 1, heads, kv_heads), Target("cuda", arch, processors)
    out = forward(*new, *tables(heads), *HOW, target=target)
    backward(torch.randn_like(out), *new, *tables(heads), *HOW, target=target)


def states() -> None:
    """Steps until groups are folded, where one row of the batch rests; then a tree."""
    from linearize.kernels.triton.decode import step
    from linearize.kernels.triton.launch import Target
    from linearize.kernels.triton.tree import tree

    target, window, value_dim = Target("cpu", 0, 1), GROUP, 80
    state = (
        torch.zeros(2, KV_HEADS, DIM, value_dim),
        torch.zeros(2, KV_HEADS, window, DIM),
        torch.zeros(2, KV_HEADS, window, value_dim),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
    )
    new = tokens(window + 3, value_dim=value_dim)
    for t in range(window + 3):
        active = torch.tensor([True, t % 5 > 0])
        step(*(x[:, :, t : t + 1] for x in new), *state, *tables(), *HOW, active, target=target)
    nodes = tokens(5, value_dim=value_dim)
    depth, ancestors = (
        torch.arange(5).expand(2, -1),
        torch.ones(5, 5, dtype=torch.bool).tril().expand(2, -1, -1),
    )
    tree(*nodes, *state, depth, ancestors, *tables(), *HOW, target=target)


def the_operator_of_onnx() -> None:
    from linearize.kernels.triton import launch, rolling

    past: tuple[Tensor, ...] = (
        torch.zeros(2, KV_HEADS, DIM, DIM),
        torch.zeros(2, KV_HEADS, max(GROUP, TAPS) - 1, 2 * DIM),
        torch.zeros(2, dtype=torch.int64),
    )
    for length in (1, 5, 20):
        real = torch.ones(2, length, dtype=torch.bool)
        real[0, 0] = False
        new = tokens(length)
        item, made = rolling.prepare(*new, real, *past, *tables(), *HOW)
        launch.run([item], real.device)
        past = (*made[1:], past[2] + real.sum(1))


WHOLE = {"forward", "query_grad", "key_grad", "value_grad", "taps_grad", "unit", "unit_backward"}
RUNS: dict[str, tuple[Any, set[str]]] = {
    "sequences": (lambda: sequences(80, 1, 70, HEADS, KV_HEADS), WHOLE),
    "sequences by descriptor": (lambda: sequences(90, 1, 70, HEADS, KV_HEADS), WHOLE),
    "sequences in pieces": (lambda: sequences(80, 100, 773, 1, 1), WHOLE | {"state", "scan", "grad_state"}),
    "states": (states, {"step", "commit", "tree"}),
    "onnx": (the_operator_of_onnx, {"rolling"}),
}
"""By name: what runs, and the kernels that it is here for."""


@interpreted
def test_every_kernel_is_watched() -> None:
    import linearize.kernels.triton as package

    found = set()
    for info in pkgutil.iter_modules(package.__path__):
        file = importlib.import_module(f"{package.__name__}.{info.name}")
        found |= {name.removesuffix("_kernel") for name in vars(file) if name.endswith("_kernel")}
    assert found == set().union(*(expected for _, expected in RUNS.values()))


@interpreted
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "onnx" else pytest.mark.slow) for name in RUNS]
)
def test_no_kernel_has_a_race(name: str) -> None:
    run, expected = RUNS[name]
    with Watch() as watch:
        run()
    assert {kernel.removesuffix("_kernel") for kernel in watch.kernels} == expected
    assert not watch.races
    print(f"{name}: {watch.accesses} accesses of {len(expected)} kernels, no race")


@interpreted
def test_a_race_is_found_that_no_result_shows() -> None:
    """A sum that every program adds to: right in the interpreter, which runs one program after the other."""
    import triton
    import triton.language as tl

    @triton.jit
    def sums(X, OUT, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        part = tl.sum(tl.load(X + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))
        if ATOMIC:
            tl.atomic_add(OUT, part)
        else:
            tl.store(OUT, tl.load(OUT) + part)

    x = torch.arange(64.0)
    for atomic in (False, True):
        out = torch.zeros(1)
        with Watch() as watch:
            sums[(4,)](x, out, atomic, 16)
        assert out.item() == x.sum().item()
        kinds = {race.kind for race in watch.races}
        assert kinds == (set() if atomic else {"write and write", "write and read"})
