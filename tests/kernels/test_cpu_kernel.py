"""The C++ kernels equal the float64 oracle, forward and backward; steps and trees equal whole sequences."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from linearize.kernels import chunk as walk
from linearize.kernels import cpu
from linearize.kernels import naive as oracle
from torch import Tensor

needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "")
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 500, 1000)
NAMES = ("query", "key", "value", "alpha", "local_scale", "conv_weight")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["avx2", "avx512"])
def isa(request):
    if request.param == "avx512" and cpu.isa() != "avx512":
        pytest.skip("this processor has no AVX512")
    return request.param


def make(
    length: int, heads=(2, 1), dims=(16, 16), taps: int | None = 4, batch: int = 1
) -> list[Tensor | None]:
    """query, key, value, alpha, local_scale, conv_weight."""
    return [
        torch.randn(batch, heads[0], length, dims[0]),
        torch.randn(batch, heads[1], length, dims[0]),
        torch.randn(batch, heads[1], length, dims[1]),
        torch.randn(heads[0]),
        torch.rand(heads[0]) + 0.5,
        None if taps is None else torch.randn(heads[0], taps),
    ]


def expected(args, activation: str = "relu2", group: int = 64, normalize: bool = True) -> Tensor:
    query, key, value, alpha, local_scale, conv_weight = args
    repeats = query.shape[1] // key.shape[1]
    return oracle.augmented_attention(
        query,
        key.repeat_interleave(repeats, 1),
        value.repeat_interleave(repeats, 1),
        alpha=alpha,
        local_scale=local_scale,
        conv_weight=conv_weight,
        activation=activation,
        group_size=group,
        normalize=normalize,
    )


def close(actual: Tensor, wanted: Tensor, tolerance: float, what: str = "output") -> None:
    """Errors are measured against the largest entry."""
    assert actual.shape == wanted.shape and torch.isfinite(actual).all(), what
    error = (actual.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{what}: {error:.1e}"


def check(args, isa: str, tolerance: float = 1e-5, **how) -> None:
    """Forward and every gradient."""
    options = (how.get("activation", "relu2"), how.get("group", 64), how.get("normalize", True))
    leaves = [None if x is None else x.double().detach().requires_grad_() for x in args]
    wanted = expected(leaves, *options)
    grad = torch.randn(wanted.shape).to(args[2].dtype)
    close(cpu.forward(*args, *options, isa=isa), wanted.detach(), tolerance)
    given = [x for x in leaves if x is not None]
    gradients = iter(torch.autograd.grad(wanted, given, grad.double(), materialize_grads=True))
    actual = cpu.backward(grad, *args, *options, isa=isa)
    scale = wanted.detach().abs().max()
    for name, x, leaf, found in zip(NAMES, args, leaves, actual, strict=True):
        if leaf is None:
            assert found is None
            continue
        wanted_gradient = next(gradients)
        assert found.dtype == x.dtype
        if wanted_gradient.abs().max() < 1e-6 * scale:  # mathematically zero, such as dquery at length 1
            assert found.abs().max() < 1e-4 * scale, name
        else:
            close(found, wanted_gradient, tolerance, name)


@needs_library
@pytest.mark.parametrize("length", LENGTHS)
def test_forward_and_gradients_at_any_length_group_and_number_of_taps(isa, length):
    for group, taps in ((16, 1), (32, 3), (64, 32), (128, 64), (16, 40), (7, 17), (1, 2)):
        check(make(length, taps=taps), isa, group=group)


@needs_library
@pytest.mark.parametrize("dims", [(64, 64), (20, 36), (80, 80), (96, 48), (128, 128), (1, 1), (33, 17)])
def test_any_head_dimensions(isa, dims):
    check(make(150, dims=dims), isa, group=32)


@needs_library
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_query_heads_share_keys_and_values(isa, heads):
    check(make(100, heads, batch=2), isa, group=32)


@needs_library
@pytest.mark.parametrize("activation", ["relu2", "linear"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("without", [(), (3,), (4,), (5,), (3, 5), (4, 5), (3, 4), (3, 4, 5)])
def test_every_part_may_be_left_out(isa, without, normalize, activation):
    args = [None if index in without else x for index, x in enumerate(make(90, taps=20))]
    check(args, isa, group=32, normalize=normalize, activation=activation)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 65, 300])
def test_half_precision(isa, dtype, length):
    args = make(length, dims=(36, 20))
    check([x.to(dtype) for x in args[:3]] + args[3:], isa, tolerance=1e-2, group=32)


@needs_library
def test_rounding_to_bfloat16_is_to_nearest_even_and_keeps_nan(isa):
    args = make(40, (4, 1), dims=(32, 24), taps=1)
    args = [x.bfloat16() for x in args[:3]] + [None, None, torch.randn(4, 1)]
    # The last payload: a plain rounding of its bits makes this NaN a zero.
    args[5][0, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    wanted = (args[5][:, 0, None, None] * args[2].float()).bfloat16()
    torch.testing.assert_close(
        cpu.forward(*args, "relu2", 16, True, isa=isa), wanted, rtol=0, atol=0, equal_nan=True
    )


@needs_library
@pytest.mark.parametrize("size", [1e12, 1e-12, 1e19, 1e-25, 1e-30])
def test_rows_of_any_norm(isa, size):
    args = make(70)
    big = [args[0] * size, args[1] * size, *args[2:]]
    close(cpu.forward(*big, "relu2", 32, True, isa=isa), expected(args, group=32), 1e-5)
    grad = torch.randn(1, 2, 70, 16)
    wanted = cpu.backward(grad, *args, "relu2", 32, True, isa=isa)
    found = cpu.backward(grad, *big, "relu2", 32, True, isa=isa)
    for index in range(6):
        scale = size if index < 2 else 1.0
        close(found[index].double() * scale, wanted[index].double(), 2e-5, NAMES[index])


@needs_library
def test_rows_of_zeros_stay_zero_with_the_gradient_of_division_by_one(isa):
    args = make(70)
    args[0][0, 0, [0, 40]] = 0
    args[1][0, 0, [3, 33, 69]] = 0
    leaves = [x.double().requires_grad_() for x in args]
    unit = [
        x / torch.where((x == 0).all(-1, keepdim=True), 1.0, x.norm(dim=-1, keepdim=True)) for x in leaves[:2]
    ]
    wanted = expected([*unit, *leaves[2:]], group=32, normalize=False)
    close(cpu.forward(*args, "relu2", 32, True, isa=isa), wanted.detach(), 1e-5)
    grad = torch.randn(1, 2, 70, 16)
    found = cpu.backward(grad, *args, "relu2", 32, True, isa=isa)
    for name, x, y in zip(NAMES, found, torch.autograd.grad(wanted, leaves, grad.double()), strict=True):
        close(x, y, 1e-5, name)


@needs_library
def test_every_element_of_every_output_is_written(isa):
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        assert torch.empty(3).isnan().all()
        for length in (1, 37, 64):
            check(make(length, (4, 2), dims=(20, 12), batch=2), isa, group=16)
            args = make(length, (4, 2), dims=(20, 12), batch=2)
            check([*args[:3], None, None, None], isa, group=16)
    finally:
        torch.use_deterministic_algorithms(False)


@needs_library
def test_any_strides(isa):
    args = make(70, (4, 2), dims=(24, 24), batch=2)
    options = ("relu2", 32, True)
    out = cpu.forward(*args, *options, isa=isa)
    grad = torch.randn(2, 4, 70, 24)
    wanted = cpu.backward(grad, *args, *options, isa=isa)
    rows_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args[:3]]
    every_other = [torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(3)[..., ::2] for x in args[:3]]
    inside = [torch.nn.functional.pad(x, (3, 5), value=torch.nan)[..., 3:-5] for x in args[:3]]
    for variant in (rows_first, every_other, inside):
        assert not any(x.is_contiguous() for x in variant)
        assert torch.equal(cpu.forward(*variant, *args[3:], *options, isa=isa), out)
        moved = grad.transpose(1, 3).contiguous().transpose(1, 3)
        found = cpu.backward(moved, *variant, *args[3:], *options, isa=isa)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    same = [x[:1].expand(2, -1, -1, -1) for x in args[:3]]  # a stride of 0
    wanted_out = cpu.forward(*(x.contiguous() for x in same), *args[3:], *options, isa=isa)
    assert torch.equal(cpu.forward(*same, *args[3:], *options, isa=isa), wanted_out)


@needs_library
def test_threads_change_no_bit_while_there_are_heads_for_all():
    args = make(1500, (4, 4), dims=(64, 64))
    grad = torch.randn(1, 4, 1500, 64)
    one = cpu.forward(*args, "relu2", 64, True), *cpu.backward(grad, *args, "relu2", 64, True)
    torch.set_num_threads(3)
    many = cpu.forward(*args, "relu2", 64, True), *cpu.backward(grad, *args, "relu2", 64, True)
    assert all(torch.equal(x, y) for x, y in zip(one, many, strict=True))


@needs_library
@pytest.mark.parametrize(
    "group,taps,length", [(64, 32, 2000), (8, 30, 8 * 64 * 7 + 3), (16, 1, 1999), (32, None, 1024)]
)
def test_a_sequence_is_shared_between_threads_that_have_no_head_of_their_own(isa, group, taps, length):
    for without in ((), (3,), (4,)):
        args = [None if i in without else x for i, x in enumerate(make(length, (4, 1), (48, 64), taps))]
        grad = torch.randn(1, 4, length, 64)
        torch.set_num_threads(1)
        alone = cpu.forward(*args, "relu2", group, True, isa=isa)
        torch.set_num_threads(3)
        out = cpu.forward(*args, "relu2", group, True, isa=isa)
        found = cpu.backward(grad, *args, "relu2", group, True, isa=isa)
        assert without == (3,) or not torch.equal(out, alone)  # sums in another order: it was shared indeed
        args = [None if x is None else x.double() for x in args]
        close(out, walk.forward(*args, "relu2", group, True), 1e-5)
        wanted = walk.backward(grad.double(), *args, "relu2", group, True)
        for name, x, y in zip(NAMES, found, wanted, strict=False):
            assert (x is None) == (y is None)
            if x is not None:
                close(x, y, 1e-5, name)


@needs_library
@pytest.mark.parametrize("length", [8 * 64 - 1, 8 * 64, 8 * 64 + 1, 8 * 64 * 3 + 5])
def test_gradients_where_the_state_is_taken_from_an_anchor(isa, length):
    args = make(length, dims=(16, 16))
    args[2][:, :, 512:] *= (
        1e5  # subtracting these again from their sum would leave nothing of the values before
    )
    grad = torch.randn(1, 2, length, 16)
    grad[:, :, 512:] = 0
    found = cpu.backward(grad, *args, "relu2", 8, True, isa=isa)
    wanted = walk.backward(grad.double(), *(x.double() for x in args), "relu2", 8, True)
    for name, x, y in zip(NAMES, found, wanted, strict=False):
        close(x, y, 1e-5, name)


class Decoder:
    """A state and the constants around it, for the C++ step and tree."""

    def __init__(self, isa: str, args, group: int, rewind: int, normalize: bool = True, dtype=torch.float32):
        query, key, value, *self.parameters = args
        (batch, kv_heads, _, dim), taps = key.shape, 0 if args[5] is None else args[5].shape[1]
        window = group * -(-(rewind + max(group, taps)) // group)
        self.state = [
            torch.zeros(batch, kv_heads, dim, value.shape[3]),
            torch.zeros(batch, kv_heads, window, dim, dtype=dtype),
            torch.zeros(batch, kv_heads, window, value.shape[3], dtype=dtype),
            torch.zeros(batch, dtype=torch.int64),
            torch.zeros(batch, dtype=torch.int64),
        ]
        self.constants = (*self.parameters, "relu2", group, normalize)
        self.isa = isa

    def copy(self) -> Decoder:
        other = object.__new__(Decoder)
        other.__dict__.update(self.__dict__)
        other.state = [x.clone() for x in self.state]
        return other

    def step(self, *tokens: Tensor, active: Tensor | None = None) -> Tensor:
        return cpu.step(*tokens, *self.state, *self.constants, active, isa=self.isa)

    def append(self, key: Tensor, value: Tensor, path: Tensor | None) -> None:
        group, normalize = self.constants[4:]
        cpu.append(key, value, *self.state, group, normalize, path, isa=self.isa)

    def tree(self, *tokens: Tensor, depth: Tensor, ancestors: Tensor) -> Tensor:
        return cpu.tree(*tokens, *self.state, depth, ancestors, *self.constants, isa=self.isa)


@needs_library
@pytest.mark.parametrize(
    "group,taps,dims", [(8, 3, (16, 16)), (16, 40, (20, 36)), (7, None, (33, 1)), (1, 2, (64, 80))]
)
def test_steps_equal_the_whole_sequence_in_ragged_batches_with_rewinds(isa, group, taps, dims):
    length, rewind = 45, 9
    args = make(length, (4, 2), dims, taps, batch=3)
    whole = expected(args, group=group)
    decoder = Decoder(isa, args, group, rewind)
    at, furthest, seen, generator = [0, 0, 0], [0, 0, 0], set(), torch.Generator().manual_seed(1)
    for turn in range(130):
        active = torch.rand(3, generator=generator) > torch.tensor([0.0, 0.3, 0.6])
        active &= torch.tensor([x < length for x in at])
        before = decoder.copy().state
        row = [min(x, length - 1) for x in at]
        tokens = [torch.stack([x[b, :, row[b]] for b in range(3)])[:, :, None] for x in args[:3]]
        out = decoder.step(*tokens, active=None if active.all() else active)
        for b in range(3):
            if active[b]:
                error = (out[b, :, 0].double() - whole[b, :, at[b]]).abs().max()
                assert error < 1e-5 * whole.abs().max(), (turn, b)
                seen.add((b, at[b]))
                at[b] += 1
                furthest[b] = max(furthest[b], at[b])
            else:
                assert not out[b].any()
                assert all(torch.equal(x[b], y[b]) for x, y in zip(before, decoder.state, strict=True))
        if turn % 20 == 19:
            back = torch.tensor([min(rewind - (y - x), x) for x, y in zip(at, furthest, strict=True)])
            decoder.state[3] -= back
            at = [x - int(y) for x, y in zip(at, back, strict=True)]
        assert decoder.state[3].tolist() == at
    assert len(seen) > 2 * length


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_in_half_precision_with_windows_of_either_dtype(isa, dtype):
    args = make(40, (4, 2), (20, 12))
    args[:3] = [x.to(dtype) for x in args[:3]]
    whole = expected(args, group=8)
    for window_dtype in (torch.float32, dtype):
        decoder = Decoder(isa, args, 8, 0, dtype=window_dtype)
        for t in range(40):
            out = decoder.step(*(x[:, :, t : t + 1] for x in args[:3]))
            assert out.dtype == dtype
            assert (out[:, :, 0].double() - whole[:, :, t]).abs().max() < 1e-2 * whole.abs().max()


PARENTS = (-1, 0, 1, 1, 0, 4, 5, 6, 3, 8, -1, 10)
"""A forest: two roots, branches of up to five nodes, in an order in which parents come first."""


def forest() -> tuple[Tensor, Tensor]:
    nodes = len(PARENTS)
    depth, ancestors = torch.zeros(nodes, dtype=torch.int64), torch.eye(nodes, dtype=torch.bool)
    for node, parent in enumerate(PARENTS):
        if parent >= 0:
            depth[node] = depth[parent] + 1
            ancestors[node] |= ancestors[parent]
    return depth, ancestors


@needs_library
@pytest.mark.parametrize("group,taps,dims", [(4, 3, (16, 16)), (16, 20, (20, 36)), (7, None, (33, 1))])
def test_a_tree_equals_stepping_along_each_path_across_group_borders(isa, group, taps, dims):
    args = make(40, (4, 2), dims, taps, batch=2)
    decoder = Decoder(isa, args, group, 5)
    depth, ancestors = forest()
    nodes = len(PARENTS)
    depth, ancestors = depth.expand(2, nodes), ancestors.expand(2, nodes, nodes)
    for t in range(36):
        ahead = torch.tensor([True, t % 3 != 0])  # the rows of the batch drift apart
        decoder.step(*(x[:, :, t : t + 1] for x in args[:3]), active=ahead)
        if t % 5 != 4:
            continue
        drafts = [torch.randn(2, x.shape[1], nodes, x.shape[3]) for x in args[:3]]
        before = decoder.copy().state
        out = decoder.tree(*drafts, depth=depth, ancestors=ancestors)
        assert all(torch.equal(x, y) for x, y in zip(before, decoder.state, strict=True))
        scale = out.abs().max()
        for node in range(nodes):
            path, at = decoder.copy(), node
            chain = []
            while at >= 0:
                chain.append(at)
                at = PARENTS[at]
            for at in reversed(chain):
                last = path.step(*(x[:, :, at : at + 1] for x in drafts))
            assert (out[:, :, node] - last[:, :, 0]).abs().max() < 1e-5 * scale, (t, node)


@needs_library
@pytest.mark.parametrize("committed", (0, 5, 29))
@pytest.mark.parametrize("group,taps,dims", [(16, 20, (20, 36)), (64, 3, (16, 16)), (7, None, (33, 1))])
def test_every_node_of_a_large_tree_has_the_output_of_its_branch(isa, group, taps, dims, committed):
    """More nodes than a register tile or a vector holds; branches longer than a group."""
    nodes = 70
    args = make(committed + nodes, (4, 2), dims, taps)
    parents = [i - 1 if i % 3 else max(-1, i - 4) for i in range(nodes)]
    ancestors = torch.eye(nodes, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
    decoder = Decoder(isa, args, group, 5)
    if committed:
        decoder.append(*(x[:, :, :committed] for x in args[1:3]), None)
    drafts = [x[:, :, committed:] for x in args[:3]]
    out = decoder.tree(*drafts, depth=ancestors.sum(1)[None] - 1, ancestors=ancestors[None])
    for node in range(0, nodes, 3):
        branch = torch.cat([torch.arange(committed), ancestors[node].nonzero()[:, 0] + committed])
        wanted = expected([*(x[:, :, branch] for x in args[:3]), *args[3:]], group=group)[:, :, -1]
        assert (out[:, :, node] - wanted).abs().max() < 1e-5 * out.abs().max(), node


@needs_library
@pytest.mark.parametrize(
    "group,taps,dims", [(8, 3, (16, 16)), (16, 40, (20, 36)), (7, None, (33, 1)), (1, 2, (64, 80))]
)
def test_appended_tokens_count_as_if_decoded_in_ragged_batches_with_rewinds(isa, group, taps, dims):
    """Paths through tokens of which the others hold NaN; longer than the window too."""
    rewind, generator = 9, torch.Generator().manual_seed(2)
    args = make(180, (4, 2), dims, taps, batch=3)
    whole = expected(args, group=group)
    decoder = Decoder(isa, args, group, rewind)
    at = [0, 0, 0]
    for turn, size in enumerate((3, 1, 30, 5, 7, 9, 16, 17, 2, 60)):
        path = torch.full((3, size), -1)
        key, value = (torch.full((3, x.shape[1], size + 2, x.shape[3]), torch.nan) for x in args[1:3])
        for b in range(3):
            count = size if b == turn % 3 else int(torch.randint(size + 1, (), generator=generator))
            steps = torch.randperm(size, generator=generator)[:count].sort().values
            path[b, steps] = nodes = torch.randperm(size + 2, generator=generator)[:count]
            key[b, :, nodes] = args[1][b, :, at[b] : at[b] + count]
            value[b, :, nodes] = args[2][b, :, at[b] : at[b] + count]
            at[b] += count
        decoder.append(key, value, path)
        assert decoder.state[3].tolist() == at
        one = [torch.stack([x[b, :, at[b]] for b in range(3)])[:, :, None] for x in args[:3]]
        out = decoder.copy().step(*one)[:, :, 0]
        wanted = torch.stack([whole[b, :, at[b]] for b in range(3)])
        assert (out - wanted).abs().max() < 1e-5 * whole.abs().max(), turn
        if turn % 3 == 2:  # what was taken back is appended again
            back = torch.tensor([min(rewind, x) for x in at])
            decoder.state[3] -= back
            at = [x - int(y) for x, y in zip(at, back, strict=True)]


@needs_library
def test_a_path_to_a_token_that_is_not_there_changes_nothing(isa):
    args = make(6, (4, 2), batch=2)
    decoder = Decoder(isa, args, 4, 0)
    decoder.append(*args[1:3], None)
    before = decoder.copy().state
    with pytest.raises(IndexError, match="not among the new ones"):
        decoder.append(*args[1:3], torch.tensor([[0, 1], [2, 6]]))
    decoder.append(*args[1:3], torch.empty(2, 0, dtype=torch.int64))
    decoder.append(*args[1:3], torch.full((2, 3), -1))
    assert all(torch.equal(x, y) for x, y in zip(before, decoder.state, strict=True))


@needs_library
def test_a_tree_of_one_node_on_an_empty_state_is_the_first_token(isa):
    args = make(1, (4, 2), taps=3)
    decoder = Decoder(isa, args, 4, 0)
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    out = decoder.tree(*args[:3], depth=torch.zeros(1, 1, dtype=torch.int64), ancestors=one)
    close(out, expected(args, group=4), 1e-5)


@needs_library
def test_what_does_not_fit_is_refused_with_the_reason():
    args = make(10, (4, 2))
    with pytest.raises(ValueError, match="do not fit"):
        cpu.forward(args[0], args[1][:, :, :9], *args[2:], "relu2", 8, True)
    with pytest.raises(ValueError, match="alpha"):
        cpu.forward(*args[:3], torch.ones(3), *args[4:], "relu2", 8, True)
    with pytest.raises(ValueError, match="laplace"):
        cpu.forward(*args, "laplace", 8, True)
    with pytest.raises(ValueError, match="float64"):
        cpu.forward(*(x.double() for x in args[:3]), *args[3:], "relu2", 8, True)
    assert "laplace" in cpu.supports(*args[:3], None, "laplace", 8)
    assert cpu.supports(*args[:3], None, "relu2", 8) is None
    decoder = Decoder("avx2", args, 4, 0)
    decoder.constants = (*args[3:5], torch.randn(4, 5), "relu2", 4, True)
    with pytest.raises(ValueError, match="5 taps"):
        decoder.step(*(x[:, :, :1] for x in args[:3]))


def test_a_package_without_the_library_says_so(tmp_path):
    spec = importlib.util.spec_from_file_location("bare", tmp_path / "library.py")
    (tmp_path / "library.py").write_bytes((Path(cpu.__file__).parent / "library.py").read_bytes())
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    assert "not built" in bare.load()[1]
    (tmp_path / "_kernels.so").write_bytes(b"no library")
    bare.load.cache_clear()
    assert "could not be loaded" in bare.load()[1]


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_thread_computes_on_after_its_memory_ran_out(isa):
    """In a process of its own, whose memory is limited for one call: a tree so large that it does not fit."""
    import resource

    nodes = 5000
    args = make(nodes, dims=(8, 8))
    decoder = Decoder(isa, args, 8, 8)
    large = dict(
        depth=torch.arange(nodes)[None], ancestors=torch.ones(1, nodes, nodes, dtype=torch.bool).tril()
    )
    small = [x[:, :, :1] for x in args[:3]]
    one = dict(depth=torch.zeros(1, 1, dtype=torch.int64), ancestors=torch.ones(1, 1, 1, dtype=torch.bool))
    wanted = decoder.tree(*small, **one)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + 2**26
            before = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
            try:
                decoder.tree(*args[:3], **large)
                status = 2
            except MemoryError:
                resource.setrlimit(resource.RLIMIT_AS, before)
                status = 0 if torch.equal(decoder.tree(*small, **one), wanted) else 3
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
