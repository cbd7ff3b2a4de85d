"""The attention of `kernels/salient.py`: a state in any pieces equals the token-by-token form in float64.

Everything is float64, so that what differs is no rounding; `naive` stands in the mechanism's file and shares
no code with the kernels.
"""

from __future__ import annotations

import random

import pytest
import torch
from linearize.kernels import salient, salient_chunk, salient_recurrent
from linearize.kernels.salient import BLOCK, DELAY, Sizes
from linearize.kernels.softmax import Scores
from torch import Tensor

from linearize.mechanisms.augmented import naive

BATCH, KV_HEADS, REPEATS, DIM, VALUE_DIM = 2, 2, 3, 8, 6
RULE, CAPPED = Scores(0.4), Scores(0.4, softcap=1.5)
CASES = [
    pytest.param(Sizes(64, 4, 16), 500, id="all parts"),
    pytest.param(Sizes(96, 2, 40), 330, id="more kept than leave at once"),
    pytest.param(Sizes(64, 4, 0), 300, id="no salient tokens"),
    pytest.param(Sizes(64, 0, 8), 300, id="no sinks"),
    pytest.param(Sizes(64, 0, 0), 200, id="a window alone"),
    pytest.param(Sizes(20, 1, 5), 200, id="a window narrower than a block"),
    pytest.param(Sizes(0, 1, 5), 200, id="no window"),
]
Tokens = tuple[Tensor, Tensor, Tensor]


def tokens(length: int, seed: int = 0) -> Tokens:
    """query [B, Hkv, R, T, D], key [B, Hkv, T, D], value [B, Hkv, T, Dv]; scores that differ enough."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, KV_HEADS, *shape, generator=generator, dtype=torch.float64)

    return normal(REPEATS, length, DIM) * 2, normal(length, DIM), normal(length, VALUE_DIM)


def cut(sequence: Tokens, start: int, stop: int) -> Tokens:
    query, key, value = sequence
    return query[:, :, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]


def whole(sequence: Tokens, sizes: Sizes, causal: bool = True, rule: Scores = RULE) -> Tensor:
    query, key, value = sequence
    rows = [
        torch.stack(
            [naive(*heads, sizes=sizes, **rule._asdict(), causal=causal) for heads in zip(*row, strict=True)]
        )
        for row in zip(query, key, value, strict=True)
    ]
    return torch.stack(rows)


def empty(sizes: Sizes, max_rewind: int = 0) -> salient.State:
    return salient.new(BATCH, KV_HEADS, DIM, VALUE_DIM, sizes, max_rewind, dtype=torch.float64)


def extend(
    sequence: Tokens, state: salient.State, sizes: Sizes, real: Tensor | None = None, rule: Scores = RULE
) -> Tensor:
    return salient_recurrent.extend(*sequence, state, sizes, rule, real=real)


def same(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "length", "rule"),
    [
        *(pytest.param(*case.values, RULE, id=case.id) for case in CASES),
        pytest.param(Sizes(64, 4, 16), 300, CAPPED, id="a softcap"),
    ],
)
def test_whole_sequences_and_random_pieces_equal_the_naive_form(
    sizes: Sizes, length: int, rule: Scores
) -> None:
    sequence = tokens(length)
    wanted = whole(sequence, sizes, rule=rule)
    same(salient_chunk.forward(*sequence, sizes, rule), wanted)
    choose, state, start = random.Random(1), empty(sizes), 0
    size = sum(x.numel() for x in state)
    while start < length:
        stop = start + choose.choice([1, 1, 2, 5, 31, 32, 33, 64, 90])
        same(extend(cut(sequence, start, stop), state, sizes, rule=rule), wanted[:, :, :, start:stop])
        start = stop
    assert sum(x.numel() for x in state) == size and state.length.tolist() == [length] * BATCH


@pytest.mark.parametrize(("sizes", "length"), CASES)
def test_padding_anywhere_leaves_each_row_what_it_is_alone(sizes: Sizes, length: int) -> None:
    sequence, choose = tokens(length), random.Random(2)
    real = torch.rand(BATCH, length, generator=torch.Generator().manual_seed(3)) < 0.8
    query, key, value = (
        x.masked_fill(~real.reshape(BATCH, *(1,) * (x.dim() - 3), length, 1), torch.nan) for x in sequence
    )
    out = salient_chunk.forward(query, key, value, sizes, RULE, real)
    for row in range(BATCH):
        place = real[row].nonzero()[:, 0]
        alone = tuple(x[row : row + 1].index_select(-2, place) for x in sequence)
        same(out[row : row + 1].index_select(-2, place), salient_chunk.forward(*alone, sizes, RULE))
    assert not out.transpose(1, 3)[~real].any()
    state, start = empty(sizes), 0
    while start < length:
        stop = start + choose.choice([1, 7, 40])
        piece = extend(cut((query, key, value), start, stop), state, sizes, real[:, start:stop])
        same(piece, out[:, :, :, start:stop])
        start = stop
    assert state.length.tolist() == real.sum(1).tolist()


@pytest.mark.parametrize(("sizes", "length"), CASES)
def test_tokens_are_taken_back_exactly_across_selections(sizes: Sizes, length: int) -> None:
    sequence, choose, back = tokens(length), random.Random(4), 40
    wanted, state = whole(sequence, sizes), empty(sizes, back)
    start = furthest = 0
    while start < length:
        stop = min(length, start + choose.choice([1, 7, 32, 40]))
        same(extend(cut(sequence, start, stop), state, sizes), wanted[:, :, :, start:stop])
        start, furthest = stop, max(furthest, stop)
        if start < length and choose.random() < 0.5:
            count = choose.randint(0, min(back - (furthest - start), start))
            state.length.sub_(count)
            start -= count


@pytest.mark.parametrize(
    ("before", "rule"),
    [*((n, RULE) for n in (0, 1, 31, 32, 33, 63, 64, 150, 223, 224, 225, 300)), (225, CAPPED)],
)
def test_trees_as_deep_as_the_delay_are_exact_at_every_border(before: int, rule: Scores) -> None:
    """A trunk of `DELAY` nodes, and a branch from its first half that repeats the second."""
    sizes, sequence = Sizes(64, 4, 16), tokens(before + DELAY + 1)
    wanted, state = whole(sequence, sizes, rule=rule), empty(sizes)
    if before:
        extend(cut(sequence, 0, before), state, sizes, rule=rule)
    kept = [x.clone() for x in state]
    half = DELAY // 2
    depth = torch.tensor([*range(DELAY + 1), *range(half, DELAY + 1)])
    ancestors = depth[None, :] <= depth[:, None]
    ancestors[: DELAY + 1, DELAY + 1 :] = False
    ancestors[DELAY + 1 :, half : DELAY + 1] = False
    nodes = tuple(x.index_select(-2, before + depth) for x in sequence)
    out = salient_recurrent.tree(
        *nodes, state, sizes, rule, None, depth.expand(BATCH, -1), ancestors.expand(BATCH, -1, -1)
    )
    same(out, wanted.index_select(3, before + depth))
    assert all(torch.equal(x, y) for x, y in zip(state, kept, strict=True))


def test_a_selection_depends_on_nothing_younger_than_the_delay() -> None:
    """The first query of a block sees the same however the `DELAY` tokens before it are changed, if it does
    not see these themselves."""
    sizes, sequence = Sizes(64, 4, 16), tokens(320)
    state, other = empty(sizes), empty(sizes)
    start = 320 - DELAY
    changed = tokens(320, seed=5)
    extend(cut(sequence, 0, 320), state, sizes)
    mixed = tuple(
        torch.cat([x[..., :start, :], y[..., start:, :]], -2) for x, y in zip(sequence, changed, strict=True)
    )
    extend(mixed, other, sizes)
    (first, _), (second, _) = salient.advance(state, sizes), salient.advance(other, sizes)
    assert torch.equal(first.keys[:, :, : sizes.kept], second.keys[:, :, : sizes.kept])
    assert first.block.tolist() == [320 // BLOCK] * BATCH


def test_what_gets_attention_is_kept_for_ever_and_what_gets_none_is_not() -> None:
    """One key that every query wants, far before the window, among keys that none wants."""
    sizes, length = Sizes(64, 0, 4), 600
    query = torch.zeros(BATCH, KV_HEADS, REPEATS, length, DIM, dtype=torch.float64)
    key = torch.zeros(BATCH, KV_HEADS, length, DIM, dtype=torch.float64)
    value = torch.zeros(BATCH, KV_HEADS, length, VALUE_DIM, dtype=torch.float64)
    query[..., 0], key[:, :, 37, 0], value[:, :, 37] = 40.0, 1.0, 1.0
    out = salient_chunk.forward(query, key, value, sizes, RULE)
    assert float(out[:, :, :, 37:].min()) > 0.99
    assert float(salient_chunk.forward(query, key, value, Sizes(64, 4, 0), RULE)[:, :, :, 200:].max()) < 0.01


@pytest.mark.parametrize("rule", [RULE, CAPPED], ids=["plain", "a softcap"])
def test_gradients_are_those_of_the_naive_form(rule: Scores) -> None:
    sizes, sequence = Sizes(32, 2, 6), tokens(200)
    weight = torch.randn(1, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    found = []
    for form in (lambda x: salient_chunk.forward(*x, sizes, rule), lambda x: whole(x, sizes, rule=rule)):
        leaves = tuple(x.clone().requires_grad_() for x in sequence)
        (form(leaves).sin() * weight).sum().backward()
        found.append([x.grad for x in leaves])
    for got, wanted in zip(*found, strict=True):
        same(got, wanted)


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        (Sizes(16, 2, 5), RULE),
        (Sizes(64, 4, 16), RULE),
        (Sizes(128, 4, 128), RULE),
        (Sizes(16, 2, 5), CAPPED),
        (Sizes(64, 4, 16), CAPPED),
    ],
)
def test_bidirectional_sequences_equal_the_naive_form(sizes: Sizes, rule: Scores) -> None:
    sequence = tokens(230)
    wanted = whole(sequence, sizes, causal=False, rule=rule)
    same(salient_chunk.bidirectional(*sequence, sizes, rule), wanted)


@pytest.mark.slow
def test_a_hundred_thousand_tokens_do_not_drift() -> None:
    """float32: what is decoded after 100,000 tokens is what the form for whole sequences gives there."""
    sizes, length = Sizes(128, 4, 32), 100_000
    sequence = tuple(x[:1, :1].float() for x in tokens(length))
    state = salient.new(1, 1, DIM, VALUE_DIM, sizes, dtype=torch.float32)
    wanted = salient_chunk.forward(*sequence, sizes, RULE)
    extend(cut(sequence, 0, length - 300), state, sizes)
    for t in range(length - 300, length):
        out = extend(cut(sequence, t, t + 1), state, sizes)
        torch.testing.assert_close(out, wanted[:, :, :, t : t + 1], atol=1e-5, rtol=1e-5)
