"""Random calls of every entry of the C++ library in a folder, for `test_cpu_sanitized`.

`python sanitized_calls.py FOLDER COUNT`: FOLDER is a package with `kernels/cpu`, whose library is its own.
"""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
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
    if shapes.taps is None or shapes.taps % 2:
        cpu.forward_both(*call, *shapes.parameters, isa=isa)
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


def exact(package: str, isa: str) -> None:
    """The entries for exact attention to near and kept tokens: after a state, its gradient, and both ways."""
    salient, softmax, after, both = (importlib.import_module(f"{package}.{x}") for x in _EXACT)
    rule = softmax.Scores(0.3, draw.choice((None, 2.0)))
    shapes, sizes = Shapes(), salient.Sizes(*(draw.choice((0, 1, 5, 40)) for _ in range(3)))
    batch, kv_heads, repeats = shapes.batch, shapes.kv_heads, shapes.heads // shapes.kv_heads
    tail = draw.choice((None, torch.randn(shapes.heads, shapes.value_dim, shapes.dim + shapes.value_dim + 1)))
    dims = batch, kv_heads, shapes.dim, shapes.value_dim
    state = salient.new(*dims, sizes, dtype=shapes.window_dtype)
    for _ in range(draw.randint(1, 4)):
        length = draw.choice((1, 2, 7, 33, 100, 600))
        query, key, value = tokens = shapes.tokens(length)
        for x in draw.choice(((), tokens)):  # numbers that are none take ways of their own
            x[(draw.randrange(x.shape[0]), 0, -1, 0)] = draw.choice((float("nan"), float("inf"), 1e30))
        count = draw.choice((None, torch.randint(0, length + 1, (batch,))))
        taps = draw.choice((1, 3, 33))
        conv = draw.choice((None, torch.randn(shapes.heads, taps)))
        both.attend(query, key, value, sizes, rule, conv, tail, count, isa=isa)
        rows = query.unflatten(1, (kv_heads, repeats))
        taps = min(taps, sizes.window + 1)
        tables = None if conv is None else conv[:, :taps], tail
        tables = tuple(None if x is None else x.unflatten(0, (kv_heads, repeats)) for x in tables)
        out = after.extend(rows, key, value, state, sizes, rule, *tables, count, isa=isa)
        blocks = -(-length // salient.BLOCK)
        places = torch.randint(-1, length, (batch, kv_heads, blocks, sizes.kept))
        places = places.minimum(torch.arange(blocks)[:, None] * salient.BLOCK)  # none that comes later
        bounds = torch.tensor(sorted(draw.choices(range(length + 1), k=draw.randint(1, batch) + 1)))
        flat = salient.Flat(torch.randperm(batch)[: len(bounds) - 1], bounds[:-1], bounds.diff())
        after.extend_flat(rows[:1], key[:1], value[:1], state, sizes, rule, *tables, flat)
        after.backward(torch.randn_like(out), rows, key, value, places, sizes, rule, count, isa=isa)


_EXACT = ("salient", "softmax", "cpu.salient", "cpu.bidirectional")


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    sys.path.insert(0, str(folder.parent))
    cpu = importlib.import_module(f"{folder.name}.cpu")
    assert cpu.available(), cpu.unavailable_reason()
    torch.manual_seed(0)
    for index in range(count):
        torch.set_num_threads(1 + index % 3)
        isa = draw.choice(("avx2", cpu.isa()))
        one(cpu, isa)
        exact(folder.name, isa)
    print(f"{count} rounds of every entry")


if __name__ == "__main__":
    main()
