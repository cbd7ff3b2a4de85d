"""The C++ form that looks both ways: the token-by-token form in float64, at many shapes, masked and not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from linearize.kernels import cpu, dispatch, registered_salient
from linearize.kernels.cpu import bidirectional as compiled
from linearize.kernels.salient import Sizes
from linearize.kernels.softmax import Scores
from torch import Tensor

from linearize.errors import InputError
from linearize.mechanisms.augmented import AugmentedAttention, naive
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.config import LinearizeConfig

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "")
BATCH, KV_HEADS = 2, 2
RULE, CAPPED = Scores(0.4), Scores(0.4, softcap=1.5)
LENGTHS = (1, 11, 12, 13, 64, 130, 200)
CASES = [
    pytest.param(Sizes(16, 2, 5), (8, 6), 3, LENGTHS, id="all parts, heads that share"),
    pytest.param(Sizes(64, 4, 16), (32, 32), 1, LENGTHS, id="whole vectors"),
    pytest.param(Sizes(20, 0, 0), (40, 16), 2, LENGTHS, id="a window alone"),
    pytest.param(Sizes(0, 1, 5), (8, 20), 1, LENGTHS, id="no window"),
    pytest.param(Sizes(30, 6, 0), (5, 3), 2, LENGTHS, id="no salient tokens"),
    pytest.param(Sizes(300, 0, 40), (16, 16), 1, LENGTHS, id="everything is near"),
    pytest.param(Sizes(0, 3, 500), (16, 16), 1, LENGTHS, id="everything is kept"),
    pytest.param(Sizes(16, 2, 9), (8, 8), 1, (530, 1100), id="several panels"),
]
Tokens = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=["avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> str:
    if request.param == "avx512" and cpu.isa() != "avx512":
        pytest.skip("this processor has no AVX512")
    return request.param


def tokens(length: int, dims: tuple[int, int], repeats: int) -> Tokens:
    """query [B, H, T, D], key [B, Hkv, T, D], value [B, Hkv, T, Dv]; scores that differ enough."""
    generator = torch.Generator().manual_seed(length)

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(BATCH, heads, length, dim, generator=generator)

    return normal(KV_HEADS * repeats, dims[0]) * 2, normal(KV_HEADS, dims[0]), normal(KV_HEADS, dims[1])


def oracle(query: Tensor, key: Tensor, value: Tensor, sizes: Sizes, rule: Scores = RULE) -> Tensor:
    """Float64, token by token, [B, H, T, Dv]."""
    groups = query.unflatten(1, (key.shape[1], -1))

    def of_head(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tokens = query.double(), key.double(), value.double()
        return naive(*tokens, sizes=sizes, **rule._asdict(), causal=False)

    rows = [
        torch.cat([of_head(*heads) for heads in zip(*row, strict=True)])
        for row in zip(groups, key, value, strict=True)
    ]
    return torch.stack(rows).float()


@pytest.mark.parametrize(
    ("sizes", "dims", "repeats", "lengths", "rule"),
    [
        *(pytest.param(*case.values, RULE, id=case.id) for case in CASES),
        pytest.param(Sizes(16, 2, 5), (8, 6), 3, (13, 130), CAPPED, id="a softcap"),
    ],
)
def test_it_is_the_token_by_token_form(
    isa: str, sizes: Sizes, dims: tuple[int, int], repeats: int, lengths: tuple[int, ...], rule: Scores
) -> None:
    for length in lengths:
        sequence = tokens(length, dims, repeats)
        out = compiled.attend(*sequence, sizes, rule, None, None, None, isa=isa)
        torch.testing.assert_close(out, oracle(*sequence, sizes, rule), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("last", [True, False], ids=["padding comes last", "padding anywhere"])
@pytest.mark.parametrize("form", ["interleaved", "tiled"])
def test_a_padded_row_gets_what_it_gets_alone(last: bool, form: str) -> None:
    """The module: attention, convolution and tail, all with weights, and padding that is no number."""
    length, heads = 150, 4
    config = LinearizeConfig(options={"window": 20, "sinks": 2, "salient": 9}, conv_taps=5)
    spec = SiteSpec(heads, KV_HEADS, 8, 6, causal=False, kv_layout=form)
    module = AugmentedAttention(spec, config).eval()
    torch.manual_seed(0)
    for weight in (module.conv_weight, module.tail_weight):
        assert weight is not None
        torch.nn.init.normal_(weight, std=0.3)
    query, key, value = tokens(length, (8, 6), heads // KV_HEADS)
    real = torch.rand(BATCH, length) < 0.8
    if last:
        real = torch.arange(length) < torch.tensor([[length - 31], [0]])
    hidden = ~real[:, None, :, None]
    padded = [x.masked_fill(hidden, torch.nan) for x in (query, key, value)]
    with torch.no_grad():
        out = module(*padded, key_mask=real)
        for row in range(BATCH):
            place = real[row].nonzero()[:, 0]
            alone = [x[row : row + 1, :, place] for x in (query, key, value)]
            if not len(place):
                continue
            wanted = module.double()(*(x.double() for x in alone)).float()  # in float64: the PyTorch form
            torch.testing.assert_close(out[row : row + 1, :, place], wanted, atol=2e-5, rtol=1e-4)
            module.float()
    assert not out.transpose(1, 2)[~real].any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_computed_in_single(isa: str, dtype: torch.dtype) -> None:
    sizes = Sizes(16, 2, 5)
    sequence = [x.to(dtype) for x in tokens(100, (8, 6), 2)]
    out = compiled.attend(*sequence, sizes, RULE, None, None, None, isa=isa)
    wanted = compiled.attend(*(x.float() for x in sequence), sizes, RULE, None, None, None, isa=isa)
    assert torch.equal(out, wanted)


def test_any_strides_and_threads_change_nothing() -> None:
    sizes = Sizes(16, 2, 9)
    sequence = tokens(1100, (8, 8), 1)
    turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in sequence]
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in sequence]
    outputs = []
    for given, threads in ((sequence, 1), (turned, 1), (apart, 1), (sequence, 4)):
        torch.set_num_threads(threads)
        outputs.append(compiled.attend(*given, sizes, RULE, None, None, None))
    torch.set_num_threads(1)
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_what_is_not_a_number_reaches_those_that_see_it_and_no_others() -> None:
    sizes = Sizes(16, 0, 0)
    for place in range(2):  # in a query, in a key
        sequence = tokens(100, (8, 8), 1)
        sequence[place][0, 0, 50] = torch.nan
        out = compiled.attend(*sequence, sizes, RULE, None, None, None)[0, 0].isnan().any(1)
        reach = 16 if place else 0
        assert out.nonzero()[:, 0].tolist() == list(range(50 - reach, 51 + reach))


def test_scores_of_any_size_give_weights_that_sum_to_one() -> None:
    query, key, _ = tokens(100, (8, 8), 1)
    value = torch.ones(BATCH, KV_HEADS, 100, 8)
    for factor in (1e-20, 1.0, 1e4, 1e15):
        out = compiled.attend(query * factor, key, value, Sizes(16, 1, 6), RULE, None, None, None)
        torch.testing.assert_close(out, torch.ones_like(out), atol=1e-5, rtol=0)


def test_shapes_that_do_not_fit_are_an_error() -> None:
    query, key, value = tokens(10, (8, 8), 2)
    wrong: list[tuple[Any, ...]] = [
        (query, key[:, :, :9], value, None),
        (query, key, value[:, :1], None),
        (query[:, :3], key, value, None),
        (query, key, value, torch.zeros(4, 6)),
    ]
    for *given, conv in wrong:
        with pytest.raises(ValueError, match="fit"):
            compiled.attend(*given, Sizes(16, 1, 6), RULE, conv, None, None)


def test_the_operator_runs_it_and_training_has_its_gradients(caplog: pytest.LogCaptureFixture) -> None:
    sizes, sequence = Sizes(16, 2, 5), tokens(100, (8, 6), 1)
    dispatch.say.cache_clear()
    rows = sequence[0].unflatten(1, (KV_HEADS, 1))
    with caplog.at_level(logging.DEBUG, logger="linearize"):
        out = registered_salient.salient_attention(rows, *sequence[1:], None, False, *sizes, *RULE)
    assert "cpu form" in caplog.text
    torch.testing.assert_close(out[:, :, 0], oracle(*sequence, sizes), atol=2e-5, rtol=1e-5)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (rows, *sequence[1:])]
        out = registered_salient.salient_attention(*leaves, None, False, *sizes, *RULE)
        found.append(torch.autograd.grad(out.sin().sum(), leaves))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted.float(), atol=2e-5, rtol=1e-4)


def test_a_module_names_what_does_not_fit() -> None:
    module = AugmentedAttention(SiteSpec(4, KV_HEADS, 8, 8, causal=False), LinearizeConfig())
    query, key, value = tokens(10, (8, 8), 2)
    with torch.no_grad():
        for wrong in ((query, key[:, :1], value), (query, key, value[:, :, :9]), (query[0], key, value)):
            with pytest.raises(InputError):
                module(*wrong)
