"""Every Triton kernel against the float64 oracle, one small case at a time.

    forward, backward        one walk over the whole length
    forward_split, ..        the length in splits, as for few long heads
    step                     single tokens after a state, rows of unequal lengths, across a fold
    tree                     draft nodes after the same state

`benchmarks/gpu.py` runs these on the GPU before it times anything, or in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from linearize.kernels import naive as oracle
from linearize.kernels import recurrent as plain
from linearize.kernels import triton
from linearize.kernels.triton.launch import Target
from torch import Tensor

from linearize.ops.attention import lineage
from linearize.ops.state import AttentionState

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""Largest |got - want| / |want|, over a whole tensor."""

GRADIENTS = ("dquery", "dkey", "dvalue", "dalpha", "dlocal_scale", "dconv_weight")


@dataclass(frozen=True)
class Case:
    """kernel: one of `KERNELS`. dtype: its name in torch."""

    kernel: str
    dtype: str
    head_dim: int
    group_size: int

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.dtype}/D{self.head_dim}/G{self.group_size}"


@dataclass(frozen=True)
class Outcome:
    """errors: relative, by output; a reason instead of "" when the case failed for another cause."""

    case: Case
    errors: dict[str, float]
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure


class Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor
    local_scale: Tensor
    conv_weight: Tensor


def cases(
    kernels: Iterable[str], dtypes: Iterable[str], dims: Iterable[int], groups: Iterable[int]
) -> list[Case]:
    """All combinations, cases of one dtype and head_dim side by side: they share compiled kernels."""
    kernels, groups, dims = list(kernels), list(groups), list(dims)
    return [
        Case(kernel, dtype, dim, group)
        for dtype in dtypes
        for dim in dims
        for group in groups
        for kernel in kernels
    ]


def run(case: Case, device: torch.device, small: bool = False) -> Outcome:
    """Check one case. small: sizes for the interpreter. An exception of the kernel is a failed outcome."""
    try:
        errors = KERNELS[case.kernel](case, device, small)
    except Exception as error:  # a kernel may fail in any way, and the others are still of interest
        return Outcome(case, {}, f"{type(error).__name__}: {error}".splitlines()[0])
    tolerance = TOLERANCE[case.dtype]
    wrong = [f"{name} off by {error:.2g}" for name, error in errors.items() if not error < tolerance]
    return Outcome(case, errors, ", ".join(wrong) + f" (limit {tolerance:g})" if wrong else "")


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; nan wherever got has one, so that no comparison passes."""
    got, want = got.detach().to("cpu", torch.float64), want.detach().to("cpu", torch.float64)
    return float((got - want).norm() / want.norm())


def make(case: Case, device: torch.device, batch: int, heads: int, length: int, taps: int = 32) -> Inputs:
    """Two query heads to a key/value head, laid out as models do: [B, T, H, D] seen as [B, H, T, D]."""
    generator = torch.Generator().manual_seed(length + case.head_dim)

    def rows(n: int) -> Tensor:
        x = torch.randn(batch, length, n, case.head_dim, generator=generator)
        return x.to(device, getattr(torch, case.dtype)).transpose(1, 2)

    def table(*shape: int) -> Tensor:
        return (torch.rand(*shape, generator=generator) + 0.5).to(device)

    conv = table(heads, taps) * 0.2
    return Inputs(rows(heads), rows(heads // 2), rows(heads // 2), table(heads), table(heads), conv)


def expected(x: Inputs, case: Case) -> Tensor:
    """The oracle on the CPU; differentiable in x."""
    q, k, v, alpha, scale, conv = (item.cpu().double() for item in x)
    repeats = q.shape[1] // k.shape[1]
    return oracle.augmented_attention(
        q,
        k.repeat_interleave(repeats, 1),
        v.repeat_interleave(repeats, 1),
        alpha=alpha,
        local_scale=scale,
        conv_weight=conv,
        group_size=case.group_size,
    )


def target(device: torch.device, splits: bool) -> Target | None:
    """A GPU's own, by which the lengths here are chosen; the interpreter is told how many it has."""
    return Target("cpu", 0, 64 if splits else 1) if device.type == "cpu" else None


def _sequence(case: Case, device: torch.device, small: bool, splits: bool) -> Inputs:
    tiles = (8 if small else 17) if splits else (2 if small else 4)
    length = tiles * max(64, case.group_size) + 9
    batch, heads = (1, 2) if small else (1, 4) if splits else (2, 4)
    return make(case, device, batch, heads, length)


def _forward(case: Case, device: torch.device, small: bool, splits: bool = False) -> dict[str, float]:
    x = _sequence(case, device, small, splits)
    got = triton.forward(*x, "relu2", case.group_size, True, target=target(device, splits))
    return {"out": relative(got, expected(x, case))}


def _backward(case: Case, device: torch.device, small: bool, splits: bool = False) -> dict[str, float]:
    x = _sequence(case, device, small, splits)
    leaves = Inputs(*(item.cpu().double().requires_grad_() for item in x))
    out = expected(leaves, case)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(x.value.dtype)
    want = torch.autograd.grad(out, leaves, grad.double())
    got = triton.backward(grad.to(device), *x, "relu2", case.group_size, True, target=target(device, splits))
    return {name: relative(a, b) for name, a, b in zip(GRADIENTS, got, want, strict=True)}


def _prefilled(case: Case, device: torch.device, small: bool, more: int) -> tuple[Inputs, Any, list[int]]:
    """Two rows just before a group border and well before it, `more` tokens to come, and their state."""
    lengths = [3 * case.group_size - 2, 3 * case.group_size - 19]
    x = make(case, device, 2, 2 if small else 4, lengths[0] + more)
    new = AttentionState.new(
        2, x.key.shape[1], case.head_dim, group_size=case.group_size, taps=x.conv_weight.shape[1],
        dtype=x.key.dtype, device=device,
    )  # fmt: skip
    real = torch.arange(lengths[0], device=device) < torch.tensor(lengths, device=device)[:, None]
    key, value = x.key[:, :, : lengths[0]], x.value[:, :, : lengths[0]]
    plain.append(key, value, new.tensors, case.group_size, True, real)
    return x, new.tensors, lengths


def _after(x: Tensor, lengths: list[int], start: int, count: int) -> Tensor:
    """Tokens `start`.. after each row's length: [B, H, count, D]."""
    return torch.stack([row[:, n + start : n + start + count] for row, n in zip(x, lengths, strict=True)])


def _step(case: Case, device: torch.device, small: bool) -> dict[str, float]:
    steps = 5
    x, state, lengths = _prefilled(case, device, small, steps + 1)
    options = (*x[3:], "relu2", case.group_size, True)
    errors = {"out": 0.0, "active": 0.0}
    got = [
        triton.step(*(_after(item, lengths, t, 1) for item in x[:3]), *state, *options, None)
        for t in range(steps)
    ]
    active = torch.tensor([True, False], device=device)
    last = triton.step(*(_after(item, lengths, steps, 1) for item in x[:3]), *state, *options, active)
    for row, n in enumerate(lengths):
        one = Inputs(*(item[row : row + 1, :, : n + steps + 1] for item in x[:3]), *x[3:])
        want = expected(one, case)[:, :, n:]
        out = torch.cat([step[row : row + 1] for step in got], 2)
        errors["out"] = max(errors["out"], relative(out, want[:, :, :steps]))
        if row == 0:
            errors["active"] = relative(last[:1], want[:, :, steps:])
    if last[1].abs().max() != 0 or state.length.tolist() != [lengths[0] + steps + 1, lengths[1] + steps]:
        raise ValueError("a row that was not active was changed")
    return errors


def _tree(case: Case, device: torch.device, small: bool) -> dict[str, float]:
    nodes = 9 if small else 64
    x, state, lengths = _prefilled(case, device, small, nodes)
    parents = [-1, *(max(node - 1 - node % 3, -1) for node in range(1, nodes))]
    depth, ancestors = lineage(torch.tensor(parents), 2, nodes, device)
    draft = [_after(item, lengths, 0, nodes) for item in x[:3]]
    got = triton.tree(*draft, *state, depth, ancestors, *x[3:], "relu2", case.group_size, True)
    want = torch.zeros(got.shape, dtype=torch.float64)
    for row, n in enumerate(lengths):
        for leaf in set(range(nodes)) - set(parents):
            path = ancestors[row, leaf].nonzero()[:, 0].to(device)
            branch = [
                torch.cat([item[row, :, :n], new[row].index_select(1, path)], 1)[None]
                for item, new in zip(x[:3], draft, strict=True)
            ]
            want[row, :, path.cpu()] = expected(Inputs(*branch, *x[3:]), case)[0, :, n:]
    return {"out": relative(got, want)}


KERNELS: dict[str, Callable[..., dict[str, float]]] = {
    "forward": _forward,
    "forward_split": lambda *arguments: _forward(*arguments, splits=True),
    "backward": _backward,
    "backward_split": lambda *arguments: _backward(*arguments, splits=True),
    "step": _step,
    "tree": _tree,
}
