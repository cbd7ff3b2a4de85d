"""The state's contract: any split of a sequence into pieces, trees and rewinds gives what one call gives."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from bounds import bound
from linearize.kernels import naive as oracle
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from linearize.errors import InputError
from linearize.ops import attention as ops
from linearize.ops.attention import AttentionState

LENGTH = 60
NAN = float("nan")


class Case:
    """A batch of two sequences of `LENGTH` tokens, the outputs of the oracle, and an empty state."""

    def __init__(
        self, group_size=8, taps=5, heads=(4, 2), max_rewind=0, dtype=torch.float64, seed=0, drop=()
    ) -> None:
        torch.manual_seed(seed)
        self.query = torch.randn(2, heads[0], LENGTH, 6).to(dtype)
        self.key = torch.randn(2, heads[1], LENGTH, 6).to(dtype)
        self.value = torch.randn(2, heads[1], LENGTH, 5).to(dtype)
        tables = {
            "alpha": torch.rand(heads[0]).to(dtype),
            "local_scale": torch.rand(heads[0]).to(dtype),
            "conv_weight": torch.randn(heads[0], taps).to(dtype) if taps else None,
        }
        self.options = {name: None if name in drop else x for name, x in tables.items()}
        repeats = heads[0] // heads[1]
        self.wanted = oracle.augmented_attention(
            self.query,
            self.key.repeat_interleave(repeats, 1),
            self.value.repeat_interleave(repeats, 1),
            group_size=group_size,
            **self.options,
        )
        # Summed over the tokens, and over the width for the norm and for the score. Stored: both unit rows, a
        # table, the result. In float64 there is room to spare below any fault.
        rounding = bound(dtype, LENGTH + 2 * 6, float(self.wanted.abs().max()), stored=4)
        self.tolerance = 1e-10 if dtype == torch.float64 else rounding
        self.state = AttentionState.new(
            2, heads[1], 6, 5, group_size=group_size, taps=taps, max_rewind=max_rewind, dtype=dtype
        )

    def tokens(self, where: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query[:, :, where], self.key[:, :, where], self.value[:, :, where]

    def extend(self, start: int, stop: int, **options) -> None:
        out = ops.augmented_extend(*self.tokens(slice(start, stop)), self.state, **self.options, **options)
        self.check(out, self.wanted[:, :, start:stop])

    def check(self, out: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(out.double(), wanted.double(), atol=self.tolerance, rtol=0)


SPLITS = ((60,), (1,) * 60, (7, 1, 1, 15, 16, 17, 3), (8, 8, 8, 1, 31, 4), (59, 1), (1, 59))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("pieces", SPLITS, ids=lambda x: f"{len(x)} pieces")
@pytest.mark.parametrize("taps", (0, 1, 5, 19))
def test_pieces_equal_the_whole(pieces, taps, dtype):
    case = Case(taps=taps, dtype=dtype)
    for start, stop in itertools.pairwise(itertools.accumulate(pieces, initial=0)):
        case.extend(start, stop)
        # Groups leave the window when their rows are needed, and not before: rewinds count on it.
        window = case.state.tensors.key_window.shape[2]
        assert case.state.tensors.folded.tolist() == [max(0, -(-(stop - window) // 8) * 8)] * 2
    assert case.state.length.tolist() == [LENGTH, LENGTH]


@pytest.mark.parametrize("drop", ("alpha", "local_scale", "conv_weight"))
def test_parts_can_be_left_out(drop):
    case = Case(drop=(drop,))
    for start, stop in itertools.pairwise((0, 20, 21, 22, 50, 51)):
        case.extend(start, stop)


@pytest.mark.parametrize("seed", range(12))
def test_ragged_rows_padding_and_rewinds_in_any_order(seed):
    """Rows advance by different numbers of tokens in one call; padded tokens hold NaN and change nothing."""
    rng = random.Random(seed)
    case = Case(
        group_size=rng.choice((4, 8)),
        taps=rng.choice((1, 3, 11)),
        max_rewind=rng.choice((0, 5, 13)),
        seed=seed,
    )
    at, furthest = [0, 0], [0, 0]
    while min(at) < LENGTH:
        size = rng.choice((1, 1, 2, 3, 7, 20))
        real = torch.rand(2, size) > 0.3
        source = torch.zeros(2, size, dtype=torch.long)
        for b in range(2):
            real[b] &= real[b].cumsum(0) <= LENGTH - at[b]
            source[b] = (real[b].cumsum(0) - 1 + at[b]).clamp(0, LENGTH - 1)
            at[b] += int(real[b].sum())
        pick = [
            torch.stack([x[b][:, source[b]].masked_fill(~real[b][:, None], NAN) for b in range(2)])
            for x in (case.query, case.key, case.value)
        ]
        out = ops.augmented_extend(*pick, case.state, **case.options, key_mask=real)
        wanted = torch.stack(
            [case.wanted[b][:, source[b]].masked_fill(~real[b][:, None], 0) for b in range(2)]
        )
        case.check(out, wanted)
        assert case.state.length.tolist() == at
        furthest = [max(pair) for pair in zip(at, furthest, strict=True)]
        lowest = [max(0, far - case.state.max_rewind) for far in furthest]
        back = torch.tensor([n - rng.randint(min(low, n), n) for n, low in zip(at, lowest, strict=True)])
        if rng.random() < 0.4:
            case.state.rewind(back)
            at = [n - int(r) for n, r in zip(at, back, strict=True)]


@pytest.mark.parametrize("taps", (1, 5, 19))
@pytest.mark.parametrize("filled", (0, 1, 7, 8, 9, 31, 32, 33))
def test_the_declared_rewind_is_always_possible_and_exact(filled, taps):
    case = Case(taps=taps, max_rewind=10)
    for start in range(filled + 10):
        case.extend(start, start + 1)
    case.state.rewind(10)
    case.extend(filled, filled + 15)


def test_a_rewind_too_far_is_refused_and_changes_nothing():
    case = Case(max_rewind=4)
    case.extend(0, 40)
    with pytest.raises(InputError, match="max_rewind=4"):
        case.state.rewind(30)
    with pytest.raises(InputError, match="cannot take back"):
        case.state.rewind(-1)
    assert case.state.length.tolist() == [40, 40]
    case.extend(40, 50)


def test_the_state_has_one_size_at_every_length():
    case = Case()
    size = case.state.nbytes
    addresses = [x.data_ptr() for x in case.state.tensors]
    for start in range(0, LENGTH, 20):
        case.extend(start, start + 20)
        assert case.state.nbytes == size
        assert [x.data_ptr() for x in case.state.tensors] == addresses


def branches(parents: list[int]) -> list[list[int]]:
    """The nodes from the root to each node, itself included."""
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    return paths


TREE = [-1, -1, 0, 0, 1, 2, 2, 3, 5, 5, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("taps", (0, 1, 5, 19))
@pytest.mark.parametrize("committed", (0, 1, 4, 6, 7, 8, 9, 15, 40))
def test_every_branch_of_a_tree_equals_decoding_it(committed, taps):
    """At every distance to a group border, with contexts shorter and longer than the convolution."""
    case = Case(taps=taps)
    if committed:
        case.extend(0, committed)
    nodes = torch.arange(committed, committed + len(TREE))
    before = case.state.clone()
    out = ops.augmented_tree(*case.tokens(nodes), case.state, torch.tensor(TREE), **case.options)
    for tensor, old in zip(case.state.tensors, before.tensors, strict=True):
        assert torch.equal(tensor, old)
    for node, path in enumerate(branches(TREE)):
        alone = ops.augmented_extend(*case.tokens(nodes[path]), before.clone(), **case.options)
        case.check(out[:, :, node], alone[:, :, -1])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_rows_of_a_batch_can_have_different_trees_and_accept_different_branches(dtype):
    case = Case(dtype=dtype)
    case.extend(0, 13)
    trees = torch.tensor([TREE, [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, -1]])
    nodes = torch.arange(13, 13 + len(TREE))
    query, key, value = case.tokens(nodes)
    out = ops.augmented_tree(query, key, value, case.state, trees, **case.options)
    accepted = torch.tensor([[0, 2, 5, -1, -1], [0, 1, 2, 3, 4]])
    old = case.state.clone()
    ops.augmented_commit(key, value, case.state, accepted)
    assert case.state.length.tolist() == [16, 18]
    for row, count in ((0, 3), (1, 5)):
        one = old.select(torch.tensor([row]))
        path = accepted[row, :count]
        alone = [x[row : row + 1, :, path] for x in (query, key, value)]
        ahead = ops.augmented_extend(*alone, one, **case.options)
        case.check(out[row : row + 1, :, path], ahead)
        kept = case.state.select(torch.tensor([row]))
        following = [x[row : row + 1, :, 40:55] for x in (case.query, case.key, case.value)]
        case.check(
            ops.augmented_extend(*following, kept, **case.options),
            ops.augmented_extend(*following, one, **case.options),
        )


def test_selected_rows_go_on_alone():
    case = Case()
    case.extend(0, 21)
    picked = case.state.select(torch.tensor([1, 1, 0]))
    rows = torch.tensor([1, 1, 0])
    query, key, value = (x[rows][:, :, 21:30] for x in (case.query, case.key, case.value))
    out = ops.augmented_extend(query, key, value, picked, **case.options)
    case.check(out, case.wanted[rows][:, :, 21:30])
    case.extend(21, 30)


def test_half_precision_windows_cost_no_more_than_their_rounding():
    case = Case(dtype=torch.bfloat16, taps=5)
    for start in range(LENGTH):
        case.extend(start, start + 1)
    assert case.state.recurrent.dtype == torch.float32


def test_steps_compile_into_one_graph_that_serves_every_token():
    case = Case(dtype=torch.float32)
    graphs = CompileCounter()

    @torch.compile(backend=graphs, fullgraph=True)
    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.augmented_extend(query, key, value, case.state, **case.options) * 2

    for start in range(20):
        out = step(*(x.clone() for x in case.tokens(slice(start, start + 1))))
        case.check(out / 2, case.wanted[:, :, start : start + 1])
    assert graphs.frame_count == 1


def test_registered_ops_pass_the_library_checks():
    case = Case(dtype=torch.float32)
    case.extend(0, 11)
    tables = (*case.options.values(), "relu2", 8, True)
    real = torch.rand(2, 3) > 0.3
    for size, mask in ((1, None), (3, real), (1, real[:, :1])):
        torch.library.opcheck(
            torch.ops.linearize.augmented_extend.default,
            (*case.tokens(slice(11, 11 + size)), *case.state.clone().tensors, *tables, mask, None),
        )
    depth, ancestors = ops.lineage(torch.tensor([-1, 0, 0]), 2, 3, torch.device("cpu"))
    torch.library.opcheck(
        torch.ops.linearize.augmented_tree.default,
        (*case.tokens(slice(11, 14)), *case.state.tensors, depth, ancestors, *tables, None),
    )
    path = torch.tensor([[0, 2], [1, -1]])
    torch.library.opcheck(
        torch.ops.linearize.augmented_append.default,
        (*case.tokens(slice(11, 14))[1:], *case.state.clone().tensors, 8, True, path),
    )


@pytest.mark.parametrize(
    "parents, message",
    (
        ([0, 0, 1], "after its parent"),
        ([-1, 2, 1], "after its parent"),
        ([-1, -2, 0], "after its parent"),
        ([-1, 0], "parents must be integers"),
        ([-1.0, 0.0, 0.0], "parents must be integers"),
        (torch.empty(0, dtype=torch.int64), "one at least"),
    ),
)
def test_what_is_no_tree_is_refused(parents, message):
    case = Case()
    tokens = case.tokens(slice(0, 3 if isinstance(parents, list) else 0))
    with pytest.raises(InputError, match=message):
        ops.augmented_tree(*tokens, case.state, torch.as_tensor(parents), **case.options)


def test_tokens_that_do_not_fit_the_state_are_refused_and_it_stays_as_it_was():
    case = Case()
    case.extend(0, 11)
    before = case.state.clone()
    query, key, value = case.tokens(slice(11, 12))
    wide = torch.randn(4, 9, dtype=torch.float64)
    for change, message in (
        (dict(query=query[:1], key=key[:1], value=value[:1]), "the state holds"),
        (dict(value=value[..., :4]), "the state holds"),
        (dict(key_mask=torch.ones(2, 2, dtype=torch.bool)), "key_mask"),
        (dict(conv_weight=wide), "made for 5 convolution taps"),
        (dict(query=query.clone().requires_grad_()), "no gradients"),
        (dict(form="triton"), "triton"),
    ):
        call = {"query": query, "key": key, "value": value, **case.options, **change}
        with pytest.raises((InputError, ValueError), match=message):
            ops.augmented_extend(state=case.state, **call)
        for tensor, old in zip(case.state.tensors, before.tensors, strict=True):
            assert torch.equal(tensor, old)
    with pytest.raises(InputError, match="positive sizes"):
        AttentionState.new(2, 2, 0)
    for path, message in (
        (torch.zeros(3, 1, dtype=torch.long), "path must be integers"),
        (torch.tensor([[0], [1]]), "names node 1, and there are 1"),
    ):
        with pytest.raises(InputError, match=message):
            ops.augmented_commit(key, value, case.state, path)
    for tensor, old in zip(case.state.tensors, before.tensors, strict=True):
        assert torch.equal(tensor, old)


def test_layers_can_share_the_lineage_of_a_tree():
    case = Case()
    case.extend(0, 13)
    tokens, parents = case.tokens(slice(13, 13 + len(TREE))), torch.tensor(TREE)
    shared = ops.lineage(parents, 2, len(TREE), torch.device("cpu"))
    ancestors = torch.zeros(len(TREE), len(TREE), dtype=torch.bool)
    for node, path in enumerate(branches(TREE)):
        ancestors[node, path] = True
    assert torch.equal(shared.ancestors, ancestors.expand(2, -1, -1))
    assert shared.depth.tolist() == [[len(path) - 1 for path in branches(TREE)]] * 2
    out = ops.augmented_tree(*tokens, case.state, shared, **case.options)
    assert torch.equal(out, ops.augmented_tree(*tokens, case.state, parents, **case.options))
    with pytest.raises(InputError, match="the tree is of shape"):
        ops.augmented_tree(*case.tokens(slice(13, 15)), case.state, shared, **case.options)
