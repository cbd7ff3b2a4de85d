"""The Triton decode step and tree equal the oracle, in Triton's interpreter (CPU tensors, no GPU)."""

from __future__ import annotations

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


class Model:
    """Random weights of one layer, its state, and what the oracle says to any sequence."""

    def __init__(
        self,
        *,
        dim: int = 16,
        value_dim: int | None = None,
        batch: int = 1,
        heads: int = 1,
        kv_heads: int | None = None,
        group_size: int = 16,
        taps: int = 7,
        rewind: int = 0,
        parts: tuple[str, ...] = ALL,
        activation: str = "relu2",
        normalize: bool = True,
        dtype: torch.dtype = torch.float32,
        window_dtype: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(dim + heads + group_size)
        value_dim, kv_heads = value_dim or dim, kv_heads or heads
        self.batch, self.heads, self.kv_heads, self.dim, self.value_dim = (
            batch,
            heads,
            kv_heads,
            dim,
            value_dim,
        )
        self.dtype, self.normalize = dtype, normalize
        self.how = (activation, group_size, normalize)
        self.alpha = torch.rand(heads) + 0.5 if "alpha" in parts else None
        self.local_scale = torch.rand(heads) - 1.5 if "local" in parts else None
        self.conv_weight = torch.randn(heads, taps) * 0.3 if "conv" in parts else None
        self.tables = (self.alpha, self.local_scale, self.conv_weight)
        window = group_size * -(-(rewind + max(group_size, taps)) // group_size)
        self.state = (
            torch.zeros(batch, kv_heads, dim, value_dim),
            torch.full((batch, kv_heads, window, dim), torch.nan, dtype=window_dtype or dtype),
            torch.full((batch, kv_heads, window, value_dim), torch.nan, dtype=dtype),
            torch.zeros(batch, dtype=torch.int64),
            torch.zeros(batch, dtype=torch.int64),
        )

    @property
    def length(self) -> Tensor:
        return self.state[3]

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        shrink = 1.0 if self.normalize else self.dim**-0.5
        return (
            (torch.randn(self.batch, self.heads, count, self.dim) * shrink).to(self.dtype),
            (torch.randn(self.batch, self.kv_heads, count, self.dim) * shrink).to(self.dtype),
            torch.randn(self.batch, self.kv_heads, count, self.value_dim).to(self.dtype),
        )

    def oracle(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from linearize.kernels.naive import augmented_attention

        activation, group_size, normalize = self.how
        return augmented_attention(
            query,
            key.repeat_interleave(self.heads // self.kv_heads, 1),
            value.repeat_interleave(self.heads // self.kv_heads, 1),
            alpha=self.alpha,
            local_scale=self.local_scale,
            conv_weight=self.conv_weight,
            activation=activation,
            group_size=group_size,
            normalize=normalize,
        )

    def allowed(self, length: int) -> float:
        """Summed over the tokens, and over the width for the norm and for the score.

        Stored: the new rows, those kept in the window, the weights that are multiplied, the result.
        """
        return bound(self.dtype, length + 2 * self.dim, stored=4)

    def step(self, query: Tensor, key: Tensor, value: Tensor, active: Tensor | None = None) -> Tensor:
        from linearize.kernels.triton.decode import step
        from linearize.kernels.triton.launch import Target

        new = (query, key, value)
        return step(*new, *self.state, *self.tables, *self.how, active, target=Target("cpu", 0, 1))

    def steps(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        every = range(query.shape[2])
        return torch.cat([self.step(*(x[:, :, t : t + 1] for x in (query, key, value))) for t in every], 2)

    def tree(self, query: Tensor, key: Tensor, value: Tensor, parents: list[int]) -> Tensor:
        """One tree for all rows, and the state must stay as it is."""
        from linearize.kernels.triton.launch import Target
        from linearize.kernels.triton.tree import tree

        before = [x.clone() for x in self.state]
        above = ancestors(parents)
        depth = (above.sum(1) - 1).expand(self.batch, -1)
        above = above.expand(self.batch, -1, -1)
        out = tree(
            query, key, value, *self.state, depth, above, *self.tables, *self.how, target=Target("cpu", 0, 1)
        )
        for old, new in zip(before, self.state, strict=True):
            assert torch.equal(old.nan_to_num(7), new.nan_to_num(7))
        return out

    def oracle_tree(self, past: Any, query: Tensor, key: Tensor, value: Tensor, parents: list[int]) -> Tensor:
        """Each node as the last token of its own path after `past` (key, value)."""
        rows = []
        for node, path in enumerate(ancestors(parents)):
            path = path.nonzero()[:, 0]
            k, v = (torch.cat([old, new[:, :, path]], 2) for old, new in zip(past, (key, value), strict=True))
            q = torch.ones(self.batch, self.heads, k.shape[2], self.dim, dtype=query.dtype)
            q[:, :, -1] = query[:, :, node]
            rows.append(self.oracle(q, k, v)[:, :, -1:])
        return torch.cat(rows, 2)


def ancestors(parents: list[int]) -> Tensor:
    above = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            above[node] |= above[parent]
    return above


def check(length: int, **options: Any) -> Model:
    model = Model(**options)
    tokens = model.tokens(length)
    got, want = model.steps(*tokens), model.oracle(*tokens)
    assert got.dtype == model.dtype and got.shape == want.shape
    assert relative(got, want) <= model.allowed(length)
    assert model.length.tolist() == [length] * model.batch
    return model


@interpreted
@pytest.mark.parametrize(("rewind", "folded"), [(0, 48), (16, 32)])
def test_steps_equal_the_oracle_through_several_foldings(rewind: int, folded: int) -> None:
    """With room to rewind, tokens of earlier groups are read from the window."""
    model = check(52, heads=2, value_dim=24, rewind=rewind)
    assert model.state[4].item() == folded


@interpreted
def test_steps_equal_the_rows_of_the_forward() -> None:
    from linearize.kernels.triton.forward import forward
    from linearize.kernels.triton.launch import Target

    model = Model(heads=2, kv_heads=1)
    tokens = model.tokens(40)
    want = forward(*tokens, *model.tables, *model.how, target=Target("cpu", 0, 1))
    assert relative(model.steps(*tokens), want) < 1e-6


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_types_stay_within_their_rounding(dtype: torch.dtype) -> None:
    check(40, dtype=dtype)
    check(36, dtype=dtype, window_dtype=torch.float32)


@interpreted
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_query_heads_share_a_state(kv_heads: int) -> None:
    check(20, heads=4, kv_heads=kv_heads, batch=2)


@interpreted
@pytest.mark.parametrize("options", [
    dict(group_size=24, taps=40, rewind=9),
    dict(taps=17),
    dict(taps=1),
    dict(parts=("alpha",)),
    dict(parts=("local",)),
    dict(parts=("conv",)),
    dict(parts=()),
    dict(activation="linear"),
    dict(normalize=False),
    dict(dim=80, value_dim=40),
    dict(dim=256, value_dim=32),
], ids=str)  # fmt: skip
def test_options(options: dict[str, Any]) -> None:
    model = Model(**options)
    tokens = model.tokens(60 if "group_size" in options else 20)
    got, want = model.steps(*tokens), model.oracle(*tokens)
    assert float((got - want).norm()) <= 2e-6 * float(want.norm())


@interpreted
def test_rows_of_a_batch_may_have_different_lengths_and_rest() -> None:
    """Where it rests a row changes nothing, and its output is zero: also where its window is full."""
    model = Model(batch=3, heads=2, kv_heads=1)
    query, key, value = model.tokens(40)
    goes = torch.ones(40, 3, dtype=torch.bool)
    goes[16, 1] = False
    goes[::2, 2] = False
    outputs: list[list[Tensor]] = [[], [], []]
    for t in range(40):
        before = [x.clone() for x in model.state]
        out = model.step(query[:, :, t : t + 1], key[:, :, t : t + 1], value[:, :, t : t + 1], goes[t])
        for b in range(3):
            if goes[t, b]:
                outputs[b].append(out[b : b + 1])
            else:
                assert not out[b].any()
                for old, new in zip(before, model.state, strict=True):
                    assert torch.equal(old[b].nan_to_num(7), new[b].nan_to_num(7))
    assert model.length.tolist() == goes.sum(0).tolist() and model.state[4].min() < model.state[4].max()
    for b in range(3):
        taken = [x[b : b + 1, :, goes[:, b]] for x in (query, key, value)]
        assert relative(torch.cat(outputs[b], 2), model.oracle(*taken)) < 2e-6


@interpreted
def test_rewound_tokens_leave_no_trace() -> None:
    """Also across the folding of a group: `length -= n` is all that a rewind is."""
    model = Model(rewind=16, taps=9)
    kept: list[list[Tensor]] = [[], [], []]
    for run, back in ((31, 5), (20, 16), (3, 1), (16, 16), (30, 11), (9, 0)):
        tokens = model.tokens(run)
        model.steps(*tokens)
        model.length.sub_(back)
        for store, x in zip(kept, tokens, strict=True):
            store.append(x)
            whole = torch.cat(store, 2)
            store[:] = [whole[:, :, : whole.shape[2] - back]]
    assert model.state[4].item() > 0
    query, key, value = (x[0] for x in kept)
    last = model.tokens(1)
    got = model.step(*last)
    want = model.oracle(*(torch.cat(pair, 2) for pair in zip((query, key, value), last, strict=True)))
    assert relative(got, want[:, :, -1:]) < 2e-6


@interpreted
def test_a_state_that_is_not_contiguous_is_changed_all_the_same() -> None:
    model, other = Model(heads=2), Model(heads=2)
    other.state = tuple(
        x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x for x in other.state
    )
    other.state = (other.state[0].mT.contiguous().mT, *other.state[1:])
    tokens = model.tokens(18)
    assert torch.equal(model.steps(*tokens), other.steps(*tokens))
    for one, two in zip(model.state, other.state, strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))


BRANCHES = [-1, 0, 1, 1, 3, 2, 5, 4, 4, 8, 9, 10, 6, 12, 13, 11]
"""Four leaves, ten deep, three branch points; in no order but parents first."""


@interpreted
@pytest.mark.parametrize("length", [0, 1, 9, 15, 16, 17, 31, 38])
def test_trees_are_exact_at_every_border(length: int) -> None:
    """From 9 and 15 on branches cross into the next group, at different depths."""
    model = Model(rewind=16, taps=9)
    past = model.tokens(length)
    if length:
        model.steps(*past)
    nodes = model.tokens(len(BRANCHES))
    got = model.tree(*nodes, BRANCHES)
    assert relative(got, model.oracle_tree(past[1:], *nodes, BRANCHES)) < 2e-6


@interpreted
@pytest.mark.parametrize("count", [1, 2, 33, 64, 70])
def test_trees_of_any_size(count: int) -> None:
    """70 nodes take two blocks; chains of them cross several groups."""
    parents = [max(-1, node - 1 - (node % 5 == 4) * 3) for node in range(count)]
    model = Model(heads=2, kv_heads=1, value_dim=24)
    past = model.tokens(20)
    model.steps(*past)
    nodes = model.tokens(count)
    assert relative(model.tree(*nodes, parents), model.oracle_tree(past[1:], *nodes, parents)) < 2e-6


@interpreted
@pytest.mark.parametrize("options", [
    dict(dtype=torch.bfloat16),
    dict(dtype=torch.float16),
    dict(dtype=torch.float16, window_dtype=torch.float32),
    dict(batch=2, heads=4, kv_heads=2),
    dict(group_size=24, taps=40),
    dict(parts=("alpha",)),
    dict(parts=("local",)),
    dict(parts=("conv",)),
    dict(activation="linear"),
    dict(normalize=False),
    dict(dim=80, value_dim=100),
], ids=str)  # fmt: skip
def test_trees_with_options(options: dict[str, Any]) -> None:
    model = Model(**options)
    past = model.tokens(30)
    model.steps(*past)
    nodes = model.tokens(len(BRANCHES))
    want = model.oracle_tree(past[1:], *nodes, BRANCHES)
    assert relative(model.tree(*nodes, BRANCHES), want) <= model.allowed(30 + len(BRANCHES))


@interpreted
def test_a_path_of_a_tree_equals_its_steps() -> None:
    model = Model(heads=2, kv_heads=1)
    model.steps(*model.tokens(28))
    nodes = model.tokens(len(BRANCHES))
    got = model.tree(*nodes, BRANCHES)
    path = ancestors(BRANCHES)[11].nonzero()[:, 0]
    assert relative(got[:, :, path], model.steps(*(x[:, :, path] for x in nodes))) < 1e-6


@interpreted
def test_rows_of_a_batch_may_have_different_trees() -> None:
    from linearize.kernels.triton.launch import Target
    from linearize.kernels.triton.tree import tree

    model = Model(batch=2)
    past = model.tokens(20)
    active = torch.tensor([[True, t < 9] for t in range(20)])
    for t in range(20):
        model.step(*(x[:, :, t : t + 1] for x in past), active[t])
    trees = ([-1, 0, 1, 2, 3, 4], [-1, 0, 0, 0, 1, 1])
    above = torch.stack([ancestors(parents) for parents in trees])
    nodes = model.tokens(6)
    depth = above.sum(2) - 1
    got = tree(*nodes, *model.state, depth, above, *model.tables, *model.how, target=Target("cpu", 0, 1))
    for b, parents in enumerate(trees):
        before = [x[:, :, : active[:, b].sum()] for x in past[1:]]
        assert relative(got[b], model.oracle_tree(before, *nodes, parents)[b]) < 2e-6
