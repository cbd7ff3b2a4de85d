"""The bidirectional operator in C++: the oracle in float64 at many shapes, and padding that adds nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linearize.kernels import cpu
from linearize.kernels import naive as oracle
from torch import Tensor

from linearize.ops import attention as ops

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "")
LENGTHS = (1, 2, 5, 63, 64, 65, 130, 500)
CASES = [
    pytest.param(dict(heads=(4, 2), dims=(8, 6), group=16, taps=5), id="heads that share"),
    pytest.param(dict(heads=(3, 3), dims=(32, 32), group=64, taps=63), id="whole vectors"),
    pytest.param(dict(heads=(2, 1), dims=(40, 17), group=7, taps=None), id="no convolution"),
    pytest.param(dict(heads=(2, 2), dims=(5, 33), group=64, taps=129), id="taps beyond a group"),
]


@pytest.fixture(params=["avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> str:
    if request.param == "avx512" and cpu.isa() != "avx512":
        pytest.skip("this processor has no AVX512")
    return request.param


def make(length: int, heads: tuple[int, int], dims: tuple[int, int], taps: int | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return dict(
        query=normal(2, heads[0], length, dims[0]),
        key=normal(2, heads[1], length, dims[0]),
        value=normal(2, heads[1], length, dims[1]),
        alpha=normal(heads[0]),
        local_scale=normal(heads[0]),
        conv_weight=None if taps is None else normal(heads[0], taps),
    )


def exact(call: dict[str, Any], **options: Any) -> Tensor:
    repeats = call["query"].shape[1] // call["key"].shape[1]
    repeated = {name: call[name].repeat_interleave(repeats, 1) for name in ("key", "value")}
    return oracle.augmented_attention(**{**call, **repeated}, causal=False, **options)


def same(out: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-6 * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("left_out", ["alpha", "local_scale", "both", "nothing"])
def test_it_is_the_oracle(isa: str, case: dict[str, Any], left_out: str) -> None:
    for length in LENGTHS:
        call = make(length, case["heads"], case["dims"], case["taps"])
        for name in ("alpha", "local_scale"):
            if left_out in (name, "both"):
                call[name] = None
        for activation, normalize in (("relu2", True), ("linear", False)):
            out = cpu.forward_both(*call.values(), activation, case["group"], normalize, isa=isa)
            same(out, exact(call, activation=activation, group_size=case["group"], normalize=normalize))


@pytest.mark.parametrize("threads", [1, 4])
def test_padding_anywhere_adds_nothing(threads: int) -> None:
    """By the operator, which this machine's compiled form runs; several threads share a long sequence."""
    length = 1700
    call = make(length, (4, 2), (8, 6), 5)
    real = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.8
    padded = {
        name: x.masked_fill(~real[:, None, :, None], torch.nan) for name, x in call.items() if x.dim() == 4
    }
    torch.set_num_threads(threads)
    out = ops.augmented_attention(
        **{**call, **padded}, causal=False, group_size=16, key_mask=real, form="cpu"
    )
    torch.set_num_threads(1)
    assert not out.transpose(1, 2)[~real].any()
    for row in range(2):
        place = real[row].nonzero()[:, 0]
        alone = {name: call[name][row : row + 1, :, place] for name in padded}
        same(out[row : row + 1, :, place], exact({**call, **alone}, group_size=16))


def test_gradients_and_half_precision_are_those_of_the_torch_form() -> None:
    found = {}
    for form in ("torch", "cpu"):
        call = make(100, (4, 2), (8, 6), 5)
        leaves = [
            x.bfloat16().requires_grad_() if x.dim() == 4 else x.requires_grad_() for x in call.values()
        ]
        named = dict(zip(call, leaves, strict=True))
        out = ops.augmented_attention(**named, causal=False, group_size=16, form=form)
        assert out.dtype == torch.bfloat16
        found[form] = [out, *torch.autograd.grad(out.float().sin().sum(), leaves)]
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_an_even_number_of_taps_is_an_error() -> None:
    call = make(10, (4, 2), (8, 6), 4)
    with pytest.raises(ValueError, match="odd"):
        cpu.forward_both(*call.values(), "relu2", 16, True)
