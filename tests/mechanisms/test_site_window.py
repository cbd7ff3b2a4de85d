"""A window of the site's own that the mechanism's window covers is seen exactly, and nothing else is."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize import mechanisms
from linearize.errors import InputError
from linearize.mechanisms.module import SoftmaxAttention
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig

LENGTH = 90
SPEC = SiteSpec(4, 2, head_dim=8, value_dim=6, causal=True, scale=0.7, window=5)
EITHER = pytest.mark.parametrize("name", ("augmented", "softmax_window"))


def build(name: str, spec: SiteSpec, **options: Any) -> Any:
    config = LinearizeConfig(mechanism=name, augmentation=False, options={"window": 40, **options})
    return build_attention(spec, config).double()


def given(length: int = LENGTH, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (4, 8), (2, 8), (2, 6)
    return [torch.randn(2, n, length, d, generator=generator, dtype=torch.float64) for n, d in shapes]


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-10)


@EITHER
@pytest.mark.parametrize("kv_layout", ("interleaved", "tiled"))
@pytest.mark.parametrize("window", (1, 2, 5, 31, 40))
@torch.no_grad()
def test_every_form_is_the_sites_own_attention(window: int, kv_layout: str, name: str) -> None:
    spec = dataclasses.replace(SPEC, window=window, kv_layout=kv_layout)
    module, args = build(name, spec), given()
    wanted = SoftmaxAttention(spec)(*args)
    same(module(*args), wanted)
    for spare in (0, 6):
        state = module.new_state(2, dtype=torch.float64, device=torch.device("cpu"), max_rewind=spare)
        size = state.nbytes
        for start, stop in itertools.pairwise((0, 1, 3, 34, 35, 36, 70, 86)):
            same(module.extend(*(x[:, :, start:stop] for x in args), state), wanted[:, :, start:stop])
        if spare:
            state.rewind(5)
            state.rewind(torch.tensor([0, 1]))
        for row, at in enumerate(state.length.tolist()):
            branch = torch.arange(at, at + 4)
            new = [x[:, :, branch] for x in args]
            out = module.tree(*new, state, torch.arange(-1, 3))
            same(out[row], wanted[row, :, branch])
        assert state.nbytes == size


@EITHER
@torch.no_grad()
def test_a_token_hidden_between_others_is_refused_where_the_site_would_count_it(name: str) -> None:
    module, args = build(name, SPEC), given()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :20] = False
    real[1, 10:13] = False
    with pytest.raises(InputError, match="hides tokens between others"):
        module(*args, key_mask=real)
    real[1, 5:] = False
    real[1, 3] = False  # within the window from end to end
    kept = real[:, None, None, :]
    wanted = SoftmaxAttention(SPEC)(*args, key_mask=real)
    same(module(*args, key_mask=real)[kept.mT.expand_as(wanted)], wanted[kept.mT.expand_as(wanted)])


@EITHER
@torch.no_grad()
def test_padding_on_either_side_counts_for_nothing(name: str) -> None:
    module, (query, key, value) = build(name, SPEC), given()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :20] = False
    real[1, 50:] = False
    out = module(query, key, value, key_mask=real)
    state = module.new_state(2, dtype=torch.float64, device=torch.device("cpu"))
    pieces = [
        module.extend(
            *(x[:, :, start:stop] for x in (query, key, value)), state, key_mask=real[:, start:stop]
        )
        for start, stop in itertools.pairwise((0, 12, 13, 30, 31, LENGTH))
    ]
    for row in range(2):
        alone = [x[row : row + 1, :, real[row]] for x in (query, key, value)]
        wanted = SoftmaxAttention(SPEC)(*alone)[0]
        same(out[row, :, real[row]], wanted)
        same(torch.cat(pieces, 2)[row, :, real[row]], wanted)


@EITHER
@torch.no_grad()
def test_bidirectional_sites_see_their_window_on_either_side(name: str) -> None:
    spec = dataclasses.replace(SPEC, causal=False, window=4)
    module, args = build(name, spec), given()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :11], real[1, 70:] = False, False
    same(module(*args), SoftmaxAttention(spec)(*args))
    for row in range(2):
        alone = [x[row : row + 1, :, real[row]] for x in args]
        out = module(*args, key_mask=real)[row, :, real[row]]
        same(out, SoftmaxAttention(spec)(*alone)[0])


def test_gradients_are_those_of_the_site() -> None:
    module = build("augmented", SPEC)
    args, others = ([x.requires_grad_() for x in given(20)] for _ in range(2))
    module(*args).square().sum().backward()
    SoftmaxAttention(SPEC)(*others).square().sum().backward()
    for x, y in zip(args, others, strict=True):
        same(x.grad, y.grad)


def test_the_convolution_is_added_as_everywhere() -> None:
    config = LinearizeConfig(mechanism="augmented", conv_taps=3)
    module: Any = build_attention(SPEC, config).double()
    query, key, value = given(20)
    with torch.no_grad():
        module.conv_weight.copy_(torch.tensor([[0.5, 0.0, 2.0]]))
        shifted = torch.nn.functional.pad(value, (0, 0, 2, 0))[:, :, :20]
        wanted = SoftmaxAttention(SPEC)(query, key, value)
        wanted = wanted + (0.5 * value + 2 * shifted).repeat_interleave(2, 1)
        same(module(query, key, value), wanted)


@pytest.mark.parametrize(
    "name, causal, window, options, covered",
    [
        ("augmented", True, 129, {}, True),
        ("augmented", True, 130, {}, False),
        ("augmented", True, 130, {"window": 129}, True),
        ("augmented", False, 128, {}, True),
        ("augmented", False, 129, {}, False),
        ("softmax_window", True, 64, {}, True),
        ("softmax_window", True, 65, {}, False),
        ("softmax_window", False, 63, {}, True),
        ("softmax_window", False, 64, {}, False),
        ("power_window", True, 64, {}, True),
        ("augmented_paper", True, 2, {}, False),
        ("relu", True, 2, {}, False),
    ],
)
def test_a_wider_window_is_refused(
    name: str, causal: bool, window: int, options: dict[str, int], covered: bool
) -> None:
    mechanism = mechanisms.get(name)
    spec = dataclasses.replace(SPEC, causal=causal, window=window)
    refused = mechanism.refusal(spec, options=options)
    assert (refused is None) == covered == mechanism.covers(spec, options)
    assert refused is None or "window" in refused[1]
    assert mechanism.refusal(spec, approximate=("window",), options=options) is None


def test_a_window_dropped_knowingly_is_replaced_by_ours() -> None:
    spec = dataclasses.replace(SPEC, window=300)
    config = LinearizeConfig(mechanism="augmented", approximate=("window",))
    module: Any = build_attention(spec, config)
    assert module.sizes == (128, 4, 128)


def test_power_window_sees_no_more_than_the_site_does() -> None:
    module = build("power_window", SPEC, power=1024)
    args = [x / 3 for x in given()]
    torch.testing.assert_close(module(*args), SoftmaxAttention(SPEC)(*args), atol=1e-2, rtol=1e-2)
