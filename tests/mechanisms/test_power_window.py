"""`power_window`: no exponential of anything, numbers at the edge, and what it tends to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linearize.kernels import window_chunk as window
from live_models import bert, llama, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import linearize as lz
from linearize.errors import ConfigError, ExportError
from linearize.mechanisms.module import AttentionModule, SoftmaxAttention
from linearize.mechanisms.power_window import naive as oracle
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig

LENGTH, WINDOW = 30, 7


def build(power: int = 8, causal: bool = True, **options: Any) -> AttentionModule:
    spec = SiteSpec(4, 2, head_dim=8, value_dim=6, causal=causal)
    options = {"window": WINDOW, "power": power, **options}
    return build_attention(spec, LinearizeConfig(mechanism="power_window", options=options))


def given(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 8), (2, 8), (2, 6)
    return [torch.randn(2, heads, LENGTH, size, generator=generator).to(dtype) for heads, size in shapes]


@torch.no_grad()
def forms(module: Any, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """The output of every token, from each form there is."""
    found = {"parallel": module(query, key, value)}
    # Each kind of step has one form for rows of one length without rows to spare, and one for all others.
    for spare in (0, 2):

        def start(spare: int = spare) -> Any:
            return module.new_state(2, dtype=query.dtype, device=query.device, max_rewind=spare)

        state, pieces = start(), []
        for low, high in ((0, 3), (3, 10), (10, 11), (11, LENGTH)):
            pieces.append(module.extend(*(x[:, :, low:high] for x in (query, key, value)), state))
        found[f"pieces, {spare} to spare"] = torch.cat(pieces, 2)
        state, steps, drafts = start(), [], []
        for t in range(LENGTH):
            token = [x[:, :, t : t + 1] for x in (query, key, value)]
            drafts.append(module.tree(*token, state, torch.tensor([-1])))
            steps.append(module.extend(*token, state))
        found[f"steps, {spare} to spare"] = torch.cat(steps, 2)
        found[f"trees, {spare} to spare"] = torch.cat(drafts, 2)
    return found


def expected(module: Any, args: list[Tensor]) -> Tensor:
    query, key, value = (x.double() for x in args)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    maps = module.query_map.double(), module.key_map.double().repeat_interleave(2, 0)
    return oracle(
        query,
        key,
        value,
        *maps,
        module.far_weight.double(),
        window=module.window,
        sinks=module.sinks,
        power=module.power,
        scale=8**-0.5,
        causal=module.spec.causal,
    ).detach()


@pytest.mark.parametrize("size", (1.0, 300.0, 3e4, 1e15))
def test_scores_of_any_size_give_the_formula_in_every_form(size: float) -> None:
    """Products of the largest are 1e30, and their eighth powers far beyond any float."""
    module, (query, key, value) = build(), given()
    query, key = query * size, key * (size if size > 1e5 else 1)
    wanted = expected(module, [query, key, value])
    assert wanted.isfinite().all()
    for form, out in forms(module, query, key, value).items():
        torch.testing.assert_close(out.double(), wanted, atol=2e-5, rtol=1e-4, msg=form)


def test_a_query_that_no_score_reaches_averages_its_window_in_every_form() -> None:
    module, (query, key, value) = build(sinks=0, tail="none"), given()
    query, key = query.abs() * 100, -key.abs() * 100  # every score below -8
    wanted = torch.stack(
        [value[:, :, max(0, t + 1 - WINDOW) : t + 1].mean(2) for t in range(LENGTH)], 2
    ).repeat_interleave(2, 1)
    for form, out in forms(module, query, key, value).items():
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4, msg=form)


@pytest.mark.parametrize("size", (0.0, 1.0, -1e4, 1e15))
def test_gradients_stay_finite(size: float) -> None:
    module, (query, key, value) = build(), given()
    args = [x.requires_grad_() for x in (query.abs() * abs(size), key.abs() * size, value)]
    module(*args).square().sum().backward()
    assert all(x.grad.isfinite().all() for x in [*args, *module.parameters()])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    module = build().to(dtype)
    query, key, value = given(dtype)
    query = query * 300  # scores near a thousand, whose powers no half precision holds
    wanted = expected(module, [query, key, value])
    for form, out in forms(module, query, key, value).items():
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), wanted, atol=1e-2, rtol=1e-2, msg=form)


def test_a_larger_power_is_closer_to_softmax() -> None:
    args = given()
    exact = SoftmaxAttention(SiteSpec(4, 2, head_dim=8, value_dim=6, causal=True))(*args)
    errors = [(build(power, window=LENGTH)(*args) - exact).abs().max().item() for power in (2, 8, 64, 1024)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-2 < 0.1 < errors[0]


class Seen(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__.strip("_"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", (True, False))
def test_nothing_is_an_exponential_or_a_logarithm(causal: bool) -> None:
    module, args = build(causal=causal), given()
    with Seen() as seen:
        module(*args)
        if causal:
            forms(module, *args)
        # The operator is opaque to a mode from outside.
        rows = args[0].unflatten(1, (2, 2))
        weigh = lambda scores, hidden: window.power_weights(scores, hidden, 8)  # noqa: E731
        window.forward(rows, *args[1:], None, None, None, WINDOW, causal, weigh)
    assert "power_window" in seen.names and "mul" in seen.names
    simple = {name for name in seen.names if not name.startswith(("expand", "logical"))}
    named = ("exp", "log", "softmax", "sigmoid", "pow", "tanh", "erf")
    assert not [name for name in simple if any(word in name for word in named) and name != "power_window"]


@pytest.mark.parametrize("power", (0, 1, 3, 6, 8.0, True, None))
def test_the_power_is_a_power_of_two(power: Any) -> None:
    with pytest.raises(ConfigError, match="'power' of mechanism 'power_window' must be a power of two >= 2"):
        LinearizeConfig(mechanism="power_window", options={"power": power})


@pytest.mark.parametrize("model", (llama, bert))
def test_onnx_is_refused_with_the_reason(model: Any, tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    linear = lz.linearize(model(), mechanism="power_window", options={"window": 8})
    with pytest.raises(
        ExportError, match="power_window has no ONNX form|PowerWindowAttention has no ONNX form"
    ):
        lz.export_onnx(linear, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
    assert linear(tokens(1, 9)) is not None
