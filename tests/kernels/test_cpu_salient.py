"""The C++ form of `kernels/salient.py`'s attention: the token-by-token form in float64, in any pieces."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from linearize.kernels import (
    cpu,
    registered_salient,
    salient,
    salient_chunk,
    salient_recurrent,
    salient_tail,
)
from linearize.kernels.cpu import salient as compiled
from linearize.kernels.salient import Sizes, State
from linearize.kernels.softmax import Scores
from torch import Tensor

from linearize.mechanisms.augmented import naive

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "")
BATCH, KV_HEADS, REPEATS = 2, 2, 3
RULE, CAPPED = Scores(0.4), Scores(0.4, softcap=1.5)
CASES = [
    pytest.param(Sizes(64, 4, 16), 500, (16, 16), id="all parts"),
    pytest.param(Sizes(96, 2, 40), 330, (8, 6), id="features that fill no vector"),
    pytest.param(Sizes(64, 4, 0), 300, (16, 3), id="no salient tokens"),
    pytest.param(Sizes(64, 0, 8), 300, (40, 16), id="no sinks"),
    pytest.param(Sizes(64, 0, 0), 200, (8, 8), id="a window alone"),
    pytest.param(Sizes(20, 1, 5), 200, (80, 80), id="a window narrower than a block"),
    pytest.param(Sizes(0, 1, 5), 200, (8, 20), id="no window"),
]
PIECES = (1, 1, 2, 5, 31, 32, 33, 64, 90)


@pytest.fixture(params=["avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> str:
    if request.param == "avx512" and cpu.isa() != "avx512":
        pytest.skip("this processor has no AVX512")
    return request.param


def tokens(length: int, dims: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """query [B, Hkv, R, T, D], key [B, Hkv, T, D], value [B, Hkv, T, Dv]; scores that differ enough."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, KV_HEADS, *shape, generator=generator)

    return normal(REPEATS, length, dims[0]) * 2, normal(length, dims[0]), normal(length, dims[1])


def oracle(query: Tensor, key: Tensor, value: Tensor, sizes: Sizes, rule: Scores) -> Tensor:
    """Float64, token by token."""
    rows = [
        torch.stack(
            [
                naive(*(x.double() for x in heads), sizes=sizes, **rule._asdict(), causal=True)
                for heads in zip(*row, strict=True)
            ]
        )
        for row in zip(query, key, value, strict=True)
    ]
    return torch.stack(rows)


def empty(sizes: Sizes, dims: tuple[int, int], dtype: torch.dtype = torch.float32, rewind: int = 0) -> State:
    return salient.new(BATCH, KV_HEADS, *dims, sizes, rewind, dtype=dtype)


@pytest.mark.parametrize(
    ("sizes", "length", "dims", "rule"),
    [
        *(pytest.param(*case.values, RULE, id=case.id) for case in CASES),
        pytest.param(Sizes(64, 4, 16), 300, (16, 6), CAPPED, id="a softcap"),
    ],
)
def test_all_at_once_and_in_pieces_it_is_the_oracle(
    isa: str, sizes: Sizes, length: int, dims: tuple[int, int], rule: Scores
) -> None:
    sequence = tokens(length, dims)
    wanted = oracle(*sequence, sizes, rule).float()
    query, key, value = sequence
    out = compiled.extend(query, key, value, empty(sizes, dims), sizes, rule, None, None, None, isa=isa)
    torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-5)
    choose, state, start = random.Random(1), empty(sizes, dims), 0
    while start < length:
        stop = start + choose.choice(PIECES)
        piece = query[:, :, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]
        out = compiled.extend(*piece, state, sizes, rule, None, None, None, isa=isa)
        torch.testing.assert_close(out, wanted[:, :, :, start:stop], atol=2e-5, rtol=1e-5)
        start = stop


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_state_of_any_dtype_goes_on_in_either_form(isa: str, dtype: torch.dtype) -> None:
    """Sequences of different lengths, convolution and tail, and pieces that the two forms take in turns."""
    sizes, dims, length = Sizes(40, 2, 24), (16, 8), 300
    query, key, value = (x.to(dtype) for x in tokens(length, dims))
    conv, tail = torch.randn(KV_HEADS, REPEATS, 5), torch.randn(KV_HEADS, REPEATS, 8, 16 + 8 + 1)

    def plain(piece: tuple[Tensor, ...], state: State, real: Tensor) -> Tensor:
        before = state.length.clone()
        out = salient_recurrent.extend(*piece, state, sizes, RULE, conv, real)
        return salient_tail.after_state(piece[0], out, tail, before, real, sizes, RULE.scale)

    mixed, alone = empty(sizes, dims, dtype), empty(sizes, dims, dtype)
    choose, start, turn = random.Random(2), 0, 0
    while start < length:
        stop, turn = min(start + choose.choice(PIECES), length), turn + 1
        piece = query[:, :, :, start:stop], key[:, :, start:stop], value[:, :, start:stop]
        real = torch.rand(BATCH, stop - start, generator=torch.Generator().manual_seed(start)) < 0.7
        wanted = plain(piece, alone, real)
        if turn % 2:
            out = plain(piece, mixed, real)
        else:
            out = registered_salient._after(*piece, mixed, sizes, RULE, conv, real, tail)
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)
        start = stop
    for ours, theirs in zip(mixed, alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_any_strides_and_threads_change_nothing() -> None:
    sizes, dims = Sizes(40, 2, 24), (16, 8)
    sequence = tokens(200, dims)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in sequence]
    outputs = []
    for given, threads in ((sequence, 1), (turned, 1), (sequence, 4)):
        torch.set_num_threads(threads)
        outputs.append(compiled.extend(*given, empty(sizes, dims), sizes, RULE, None, None, None))
    torch.set_num_threads(1)
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_among_equals_the_longest_kept_stays() -> None:
    sizes, dims, length = Sizes(32, 1, 6), (8, 8), 320
    _, key, value = tokens(length, dims)
    query = torch.zeros(BATCH, KV_HEADS, REPEATS, length, 8)  # every token gets the same
    states = [empty(sizes, dims) for _ in range(2)]
    out = compiled.extend(query, key, value, states[0], sizes, RULE, None, None, None)
    wanted = salient_recurrent.extend(query, key, value, states[1], sizes, RULE)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(states[0].keys, states[1].keys)


def test_scores_of_any_size_give_weights_that_sum_to_one() -> None:
    sizes, dims, length = Sizes(32, 1, 6), (8, 8), 100
    query, key, _ = tokens(length, dims)
    value = torch.ones(BATCH, KV_HEADS, length, 8)
    for factor, rule in itertools.product((1e-20, 1.0, 1e4, 1e15), (RULE, CAPPED)):
        out = compiled.extend(query * factor, key, value, empty(sizes, dims), sizes, rule, None, None, None)
        torch.testing.assert_close(out, torch.ones_like(out), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", [RULE, CAPPED], ids=["plain", "a softcap"])
def test_what_is_not_a_number_stays_where_it_is_seen(rule: Scores) -> None:
    sizes, dims = Sizes(32, 1, 6), (8, 8)
    query, key, value = tokens(64, dims)
    query[0, 0, 0, 10] = torch.nan
    out = compiled.extend(query, key, value, empty(sizes, dims), sizes, rule, None, None, None)
    assert out[0, 0, 0, 10].isnan().all()
    out[0, 0, 0, 10] = 0
    assert out.isfinite().all()


def test_what_it_does_not_take_is_left_to_the_torch_form() -> None:
    sizes, dims = Sizes(32, 1, 6), (8, 8)
    query, key, value = tokens(10, dims)

    def why(state: State, dtype: torch.dtype = torch.float32) -> str | None:
        return compiled.refusal(*(x.to(dtype) for x in (query, key, value)), state, sizes)

    assert why(empty(sizes, dims)) is None
    assert "float64" in (why(empty(sizes, dims), torch.float64) or "")
    assert "float64" in (why(empty(sizes, dims, torch.float64)) or "")
    assert "back" in (why(empty(sizes, dims, rewind=40)) or "")
    state = empty(sizes, dims)
    assert "apart" in (why(state._replace(keys=state.keys.mT.contiguous().mT)) or "")
    for name, dtype in (("scores", torch.float16), ("votes", torch.float64), ("length", torch.int32)):
        cast = state._replace(**{name: getattr(state, name).to(dtype)})
        assert str(dtype) in (why(cast) or "")
        with pytest.raises(ValueError, match="does not take"):
            compiled.extend(query, key, value, cast, sizes, RULE, None, None, None)
    out = registered_salient._after(
        *(x.double() for x in (query, key, value)), empty(sizes, dims, torch.float64), sizes, RULE
    )
    assert out.dtype == torch.float64


def test_shapes_that_do_not_fit_are_an_error_and_change_nothing() -> None:
    sizes, dims = Sizes(32, 1, 6), (8, 8)
    query, key, value = tokens(10, dims)
    state = empty(sizes, dims)
    before = [x.clone() for x in state]
    conv = torch.zeros(KV_HEADS, REPEATS, sizes.window + 2)
    wrong = [
        ((query, key[:, :, :9], value), state, None),
        ((query, key, value[:, :1]), state, None),
        ((query, key, value), empty(Sizes(34, 1, 6), dims), None),
        ((query, key, value), empty(sizes, (8, 6)), None),
        ((query, key, value), state._replace(length=state.length[:1]), None),
        ((query, key, value), state, conv),
    ]
    for given, into, weight in wrong:
        with pytest.raises(ValueError, match="fit"):
            compiled.extend(*given, into, sizes, RULE, weight, None, None)
    assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))


@pytest.mark.parametrize(
    ("sizes", "length", "dims", "rule"),
    [
        *(pytest.param(*case.values, RULE, id=case.id) for case in CASES if case.id != "no window"),
        pytest.param(Sizes(64, 4, 16), 300, (16, 6), CAPPED, id="a softcap"),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_the_torch_form(
    isa: str, sizes: Sizes, length: int, dims: tuple[int, int], rule: Scores, padded: bool
) -> None:
    sequence = tokens(length, dims)
    real = None
    if padded:
        real = torch.ones(BATCH, length, dtype=torch.bool)
        real[0, :7], real[1, 40:90] = False, False
    leaves = [x.double().requires_grad_() for x in sequence]
    out = salient_chunk.forward(*leaves, sizes, rule, real)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad(out, leaves, grad.double())
    if isa == cpu.isa():  # by the operator
        leaves = [x.clone().requires_grad_() for x in sequence]
        out = registered_salient.salient_attention(*leaves, real, True, *sizes, *rule)
        found = torch.autograd.grad(out, leaves, grad)
    else:
        positions = salient_chunk.select(*sequence[:2], sizes, rule)
        if padded:
            return
        found = compiled.backward(grad, *sequence, positions, sizes, rule, None, isa=isa)
    for ours, theirs in zip(found, wanted, strict=True):
        largest = float(theirs.abs().max())  # what is summed is as large, and rounded in float32
        torch.testing.assert_close(ours, theirs.float(), atol=1e-5 * largest, rtol=1e-4)
