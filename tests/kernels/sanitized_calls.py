"""Random calls of every entry of the C++ library in a folder, for `test_cpu_sanitized`.

`python sanitized_calls.py FOLDER COUNT`: FOLDER has a copy of `kernels` in it, `sanitized`, whose library is
its own.
"""

from __future__ import annotations

import random
import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

draw = random.Random(0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def laid_out(x: Tensor) -> Tensor:
    """The same numbers in other memory: transposed, with gaps, or from an odd place on."""
    kind = draw.randrange(4)
    if kind == 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 2:
        wide = x.new_empty(*x.shape[:3], x.shape[3] + draw.randint(1, 5))
        wide[..., -x.shape[3] :] = x
        return wide[..., -x.shape[3] :]
    if kind == 3:
        flat = x.new_empty(x.numel() + 3)
        flat[3:] = x.flatten()
        return flat[3:].view(x.shape)
    return x


class Shapes:
    """Sizes of one call, with the tensors that its parameters and its state are."""

    def __init__(self) -> None:
        self.batch, self.kv_heads = draw.randint(1, 3), draw.randint(1, 3)
        self.heads = self.kv_heads * draw.randint(1, 3)
        self.dim, self.value_dim = draw.randint(1, 40), draw.randint(1, 40)
        self.group, self.taps = draw.randint(1, 20), draw.choice((None, 1, 2, 5, 17))
        self.dtype, self.window_dtype = draw.choice(DTYPES), draw.choice(DTYPES)
        self.alpha = draw.choice((None, torch.randn(self.heads)))
        self.local = draw.choice((None, torch.rand(self.heads)))
        self.conv = None if self.taps is None else torch.randn(self.heads, self.taps)
        self.rest = (draw.choice(("relu2", "linear")), self.group, draw.random() < 0.5)

    def tokens(self, count: int) -> list[Tensor]:
        sizes = ((self.heads, self.dim), (self.kv_heads, self.dim), (self.kv_heads, self.value_dim))
        return [laid_out(torch.randn(self.batch, n, count, d).to(self.dtype)) for n, d in sizes]

    def state(self) -> list[Tensor]:
        rewind = draw.choice((0, 3))
        window = self.group * -(-(rewind + max(self.group, self.taps or 0)) // self.group)
        heads = (self.batch, self.kv_heads)
        return [
            torch.zeros(*heads, self.dim, self.value_dim),
            torch.zeros(*heads, window, self.dim, dtype=self.window_dtype),
            torch.zeros(*heads, window, self.value_dim, dtype=self.window_dtype),
            torch.zeros(self.batch, dtype=torch.int64),
            torch.zeros(self.batch, dtype=torch.int64),
        ]

    @property
    def parameters(self) -> tuple[Any, ...]:
        return (self.alpha, self.local, self.conv, *self.rest)


def lineage(batch: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Depth and ancestors of a random tree."""
    parents = [draw.randint(-1, i - 1) for i in range(nodes)]
    ancestors = torch.eye(nodes, dtype=torch.bool)
    depth = torch.zeros(nodes, dtype=torch.int64)
    for node, parent in enumerate(parents):
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
            depth[node] = depth[parent] + 1
    return depth.expand(batch, -1).contiguous(), ancestors.expand(batch, -1, -1).contiguous()


def one(cpu: Any, isa: str) -> None:
    shapes = Shapes()
    call = shapes.tokens(draw.choice((1, 2, 7, 16, 33, 100)))
    out = cpu.forward(*call, *shapes.parameters, isa=isa)
    cpu.backward(torch.randn_like(out), *call, *shapes.parameters, isa=isa)
    state = shapes.state()
    for _ in range(draw.randint(1, 4)):
        count = draw.randint(1, 30)
        query, key, value = shapes.tokens(count)
        path = draw.choice((None, torch.randint(-1, count, (shapes.batch, draw.randint(1, count)))))
        cpu.append(key, value, *state, *shapes.rest[1:], path, isa=isa)
        active = draw.choice((None, torch.rand(shapes.batch) < 0.5))
        cpu.step(*shapes.tokens(1), *state, *shapes.parameters, active, isa=isa)
        nodes = draw.randint(1, 20)
        cpu.tree(*shapes.tokens(nodes), *state, *lineage(shapes.batch, nodes), *shapes.parameters, isa=isa)


def salient(kernels: Any, compiled: Any, isa: str) -> None:
    """The form of `augmented`, with numbers that are none among its tokens; and its gradients."""
    batch, kv_heads, shared = draw.randint(1, 2), draw.randint(1, 3), draw.randint(1, 3)
    dim, value_dim = draw.randint(1, 40), draw.randint(1, 40)
    sizes = kernels.Sizes(draw.randint(0, 70), draw.randint(0, 5), draw.randint(0, 40))
    dtype, state_dtype = draw.choice(DTYPES), draw.choice(DTYPES)
    taps = draw.choice((None, draw.randint(1, sizes.window + 1)))
    conv = None if taps is None else torch.randn(kv_heads, shared, taps)
    tail = draw.choice((None, torch.randn(kv_heads, shared, value_dim, dim + value_dim + 1)))

    def tokens(count: int) -> list[Tensor]:
        query = torch.randn(batch, kv_heads, shared, count, dim)
        key, value = (torch.randn(batch, kv_heads, count, size) for size in (dim, value_dim))
        for x in draw.choice(((), (query, key, value))):
            x.view(-1)[draw.randrange(x.numel())] = draw.choice((float("nan"), float("inf"), 1e30))
        return [laid_out(x.to(dtype)) if x.dim() == 4 else x.to(dtype) for x in (query, key, value)]

    state = kernels.new(batch, kv_heads, dim, value_dim, sizes, dtype=state_dtype)
    for _ in range(draw.randint(1, 5)):
        count = draw.choice((1, 2, 7, 31, 32, 33, 100))
        real = draw.choice((None, torch.randint(0, count + 1, (batch,))))
        compiled.extend(*tokens(count), state, sizes, 0.3, conv, tail, real, isa=isa)
    query, key, value = tokens(count)
    positions = torch.randint(-1, count, (batch, kv_heads, -(-count // kernels.BLOCK), sizes.kept))
    grad = torch.randn(*query.shape[:4], value_dim)
    compiled.backward(grad, query, key, value, positions, sizes, 0.3, real, isa=isa)


def main() -> None:
    folder, count = sys.argv[1], int(sys.argv[2])
    sys.path.insert(0, folder)
    cpu = import_module("sanitized.cpu")
    own = import_module("sanitized.salient"), import_module("sanitized.cpu.salient")
    assert cpu.available(), cpu.unavailable_reason()
    torch.manual_seed(0)
    for index in range(count):
        torch.set_num_threads(1 + index % 3)
        isa = draw.choice(("avx2", cpu.isa()))
        one(cpu, isa)
        salient(*own, isa)
    print(f"{count} rounds of forward, backward, append, step and tree, and of both of augmented")


if __name__ == "__main__":
    main()
