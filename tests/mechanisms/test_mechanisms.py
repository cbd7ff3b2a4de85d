"""Every mechanism is its formula, with and without the convolution, wherever queries and padding lie."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import bound, softmax_bound
from linearize.kernels import cpu
from linearize.kernels import naive as core_oracle
from linearize.kernels import window_chunk as window
from live_models import VOCAB, bart, bert, llama, recompute, tokens
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode

import linearize as lz
from linearize import mechanisms
from linearize.errors import ConfigError, InputError
from linearize.mechanisms import (
    augmented,
    augmented_paper,
    castling,
    flash_global,
    flash_local,
    hedgehog,
    linformer,
    performer,
    power_window,
    relu,
    rfa,
    softmax_window,
    transnormer,
    yoso,
)
from linearize.mechanisms.module import AttentionModule, SoftmaxAttention
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig

GROUP, TAPS, WINDOW = 32, 4, 16
LENGTHS = (1, 2, 31, 33, 64, 65, 130)
SPEC = SiteSpec(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=6, causal=True, scale=0.4)
SPECS = {
    "causal": SPEC,
    "bidirectional": dataclasses.replace(SPEC, causal=False),
    "cross": dataclasses.replace(SPEC, causal=False, cross=True),
}

Oracle = Callable[..., Tensor]
"""(query, key, value, parameters by name, causal, cross) -> [B, H, T, Dv], heads and parameters repeated."""


def core(q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor], causal: bool, cross: bool) -> Tensor:
    return core_oracle.augmented_attention(
        q,
        k,
        v,
        alpha=p.get("alpha"),
        conv_weight=None,
        local_scale=p.get("local_scale"),
        group_size=GROUP,
        causal=causal,
        cross=cross,
    )


def flash(module: Any, **more: Any) -> Oracle:
    names = ("query_gamma", "query_beta", "key_gamma", "key_beta")
    return lambda q, k, v, p, causal, cross: module.naive(
        q, k, v, *(p[name] for name in names), group_size=GROUP, causal=causal, **more
    )


def windowed(module: Any, sinks: int, window: int = WINDOW, **more: Any) -> Oracle:
    names = ("query_map", "key_map", "far_weight")
    sizes = dict(window=window, sinks=sinks, scale=0.4)
    return lambda q, k, v, p, causal, cross: module.naive(
        q, k, v, *(p.get(name) for name in names), causal=causal, **sizes, **more
    )


def salient(q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor], causal: bool, cross: bool) -> Tensor:
    """One key/value head at a time: its query heads are those whose keys are the same."""
    if cross:
        return core(q, k, v, p, causal, cross)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for row, head in itertools.product(range(q.shape[0]), range(q.shape[1])):
        group = [other for other in range(q.shape[1]) if torch.equal(k[row, other], k[row, head])]
        if head == group[0]:
            out[row, group] = augmented.naive(
                q[row, group], k[row, head], v[row, head], sizes=(WINDOW, 2, 5), scale=0.4, causal=causal
            )
    return out


# Case: mechanism, its options, and its oracle.
CASES: dict[str, tuple[str, dict[str, Any], Oracle]] = {
    "augmented": ("augmented", {"window": WINDOW, "sinks": 2, "salient": 5}, salient),
    "augmented_paper": ("augmented_paper", {}, core),
    "augmented_paper_mean": (
        "augmented_paper",
        {"grouped": "mean"},
        lambda q, k, v, p, causal, cross: augmented_paper.naive(
            q, k, v, p["alpha"], p["local_scale"], group_size=GROUP, causal=causal, cross=cross
        ),
    ),
    "local": ("local", {}, core),
    "grouped": ("grouped", {}, core),
    "flash_local": ("flash_local", {}, flash(flash_local, activation="relu2")),
    "flash_laplace": ("flash_local", {"activation": "laplace"}, flash(flash_local, activation="laplace")),
    "flash_global": ("flash_global", {}, flash(flash_global)),
    "linformer": (
        "linformer",
        {"rank": 5, "max_length": 200},
        lambda q, k, v, p, causal, cross: linformer.naive(
            q, k, v, p["key_projection"], p["value_projection"], scale=0.4
        ),
    ),
    "performer": (
        "performer",
        {"features": 12, "seed": 3},
        lambda q, k, v, p, causal, cross: performer.naive(q, k, v, p["projection"], scale=0.4, causal=causal),
    ),
    "rfa": (
        "rfa",
        {"features": 12},
        lambda q, k, v, p, causal, cross: rfa.naive(q, k, v, p["sigma"], p["projection"], causal=causal),
    ),
    "relu": ("relu", {}, lambda q, k, v, p, causal, cross: relu.naive(q, k, v, causal=causal)),
    "hedgehog": (
        "hedgehog",
        {},
        lambda q, k, v, p, causal, cross: hedgehog.naive(
            q, k, v, p["query_map"], p["key_map"], causal=causal
        ),
    ),
    "transnormer": (
        "transnormer",
        {},
        lambda q, k, v, p, causal, cross: transnormer.naive(q, k, v, p["weight"], causal=causal),
    ),
    "yoso": (
        "yoso",
        {},
        lambda q, k, v, p, causal, cross: yoso.naive(q, k, v, group_size=GROUP, causal=causal),
    ),
    "castling": ("castling", {}, lambda q, k, v, p, causal, cross: castling.naive(q, k, v, causal=causal)),
    "softmax_window": ("softmax_window", {"window": WINDOW}, windowed(softmax_window, 4)),
    "softmax_window_only": (
        "softmax_window",
        {"window": WINDOW, "sinks": 0},
        windowed(softmax_window, 0),
    ),
    "softmax_window_first": (
        "softmax_window",
        {"window": 5, "sinks": 7, "tail": "none"},
        windowed(softmax_window, 7, window=5),
    ),
    "power_window": ("power_window", {"window": WINDOW, "power": 4}, windowed(power_window, 4, power=4)),
    "power_window_first": (
        "power_window",
        {"window": 5, "power": 4, "sinks": 7, "tail": "none"},
        windowed(power_window, 7, power=4, window=5),
    ),
}
PER_KEY_HEAD = ("key_gamma", "key_beta", "key_map", "sigma")
"""Parameters with one row per key/value head."""

EACH = [
    pytest.param(case, form, id=f"{case}-{form}")
    for case, (name, _, _) in CASES.items()
    for form in SPECS
    if form in mechanisms.get(name).supports
]
CAUSAL = [case for case, (name, _, _) in CASES.items() if "causal" in mechanisms.get(name).supports]
LATE = [case for case in CAUSAL if case != "augmented"]  # it reads the queries of all tokens


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def build(case: str, spec: SiteSpec, augmentation: bool = True) -> AttentionModule:
    """The case's module, every parameter moved away from its initial value."""
    name, options, _ = CASES[case]
    module = build_attention(
        spec,
        LinearizeConfig(
            mechanism=name, options=options, augmentation=augmentation, group_size=GROUP, conv_taps=TAPS
        ),
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return module


def inputs(form: str, length: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Cross-attention has 37 more keys than queries."""
    keys = length + 37 if form == "cross" else length
    shapes = ((4, length, 8), (2, keys, 8), (2, keys, 6))
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def expected(case: str, module: AttentionModule, args: list[Tensor], params: dict[str, Tensor]) -> Tensor:
    """The case's oracle and the convolution's; args and params in float64, heads not repeated."""
    spec = module.spec

    def repeat(x: Tensor, axis: int) -> Tensor:
        tiled = torch.cat([x, x], axis)
        return tiled if spec.kv_layout == "tiled" else x.repeat_interleave(2, axis)

    query, key, value = args[0], repeat(args[1], 1), repeat(args[2], 1)
    params = {n: repeat(p, 0) if n in PER_KEY_HEAD else p for n, p in params.items()}
    out = CASES[case][2](query, key, value, params, spec.causal, spec.cross)
    if "conv_weight" in params:
        out = out + core_oracle.augmented_attention(
            query,
            key,
            value,
            alpha=None,
            local_scale=None,
            conv_weight=params["conv_weight"],
            causal=spec.causal,
        )
    return out if "tail_weight" not in params else with_tail(query, out, params["tail_weight"], spec.causal)


def with_tail(query: Tensor, out: Tensor, weight: Tensor, causal: bool) -> Tensor:
    """Token by token; the sizes are those of the case `augmented`."""
    rows, length = [], query.shape[2]
    for t in range(length):
        dropped = t // 32 * 32 - WINDOW - 7 if causal else length - (2 * WINDOW + 1) - 7
        share = math.log(1 + max(dropped, 0) / (WINDOW + 7))
        one = out.new_ones(*out.shape[:2], 1)
        found = torch.cat([query[:, :, t] * 0.4, out[:, :, t], one], 2) * share
        rows.append(torch.einsum("hvf,bhf->bhv", weight, found))
    return out + torch.stack(rows, 2)


def wide(module: nn.Module) -> dict[str, Tensor]:
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: x.detach().double() for name, x in own.items()}


def close(actual: Tensor, wanted: Tensor, relative: float, what: str = "", least: float = 1e-12) -> None:
    """The largest error is at most `relative` times the largest entry, or `least` where that is more."""
    actual, wanted = actual.detach().double(), wanted.detach().double()
    error = (actual - wanted).abs().max() / wanted.abs().max().clamp(min=least)
    assert error <= relative, f"{what}: {error:.2e} of the largest entry"


# --- the formula


@pytest.mark.parametrize("augmentation", (True, False), ids=("convolution", "plain"))
@pytest.mark.parametrize("case, form", EACH)
def test_equals_its_oracle_with_gradients(case: str, form: str, augmentation: bool) -> None:
    module = build(case, SPECS[form], augmentation)
    assert (getattr(module, "conv_weight", None) is not None) == (augmentation and form != "cross")
    for length in LENGTHS:
        args = [x.requires_grad_() for x in inputs(form, length)]
        exact = [x.detach().double().requires_grad_() for x in args]
        params = {name: x.requires_grad_() for name, x in wide(module).items()}
        out, wanted = module(*args), expected(case, module, exact, params)
        close(out, wanted, 1e-5, f"length {length}")
        weights = torch.randn(out.shape)
        learned = dict(module.named_parameters())
        got = torch.autograd.grad(
            (out * weights).sum(), [*args, *learned.values()], allow_unused=True, materialize_grads=True
        )
        should = torch.autograd.grad(
            (wanted * weights).sum(),
            [*exact, *(params[name] for name in learned)],
            allow_unused=True,
            materialize_grads=True,
        )
        # One key leaves a normalised mechanism nothing to choose, so some gradients are nothing but rounding.
        least = 0.5 * float(max(b.abs().max() for b in should[:3]))
        for name, a, b in zip(("query", "key", "value", *learned), got, should, strict=True):
            close(a, b, 1e-5, f"gradient of {name} at length {length}", max(least, 1e-12))


@pytest.mark.parametrize("case, form", EACH)
def test_tiled_heads_and_half_precision(case: str, form: str) -> None:
    module = build(case, dataclasses.replace(SPECS[form], kv_layout="tiled"))
    args = inputs(form, 65)
    close(module(*args), expected(case, module, [x.double() for x in args], wide(module)), 1e-5)
    module, args = module.bfloat16(), inputs(form, 65, dtype=torch.bfloat16)
    out = module(*args)
    assert out.dtype == torch.bfloat16
    # Stored: query and key as mapped, a weight or state, the mechanism's part, the convolution's, their sum.
    allowed = bound(torch.bfloat16, args[1].shape[2] + args[1].shape[3], stored=6)
    close(out, expected(case, module, [x.double() for x in args], wide(module)), allowed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(*args), out)


@pytest.mark.parametrize("case, form", EACH)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_float32_parameters_in_a_model_of_half_precision(case: str, form: str, dtype: torch.dtype) -> None:
    """As a conversion makes them: the output is that of the tokens' dtype, and an optimizer sees float32."""
    module = build(case, SPECS[form])
    args = [x.requires_grad_() for x in inputs(form, 65, dtype=dtype)]
    assert {p.dtype for p in module.parameters()} <= {torch.float32}
    out = module(*args)
    assert out.dtype == dtype
    allowed = bound(dtype, args[1].shape[2] + args[1].shape[3], stored=6)
    close(out, expected(case, module, [x.detach().double() for x in args], wide(module)), allowed)
    out.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all() for x in args)
    found = {p.grad.dtype for p in module.parameters() if p.grad is not None}
    assert found == ({torch.float32} if any(p.requires_grad for p in module.parameters()) else set())


@pytest.mark.parametrize("case", CAUSAL)
def test_the_compiled_form_takes_tokens_of_half_precision_with_float32_parameters(case: str) -> None:
    module: Any = build(case, SPEC)
    args = inputs("causal", 65, dtype=torch.bfloat16)
    for term in (*module.terms(*args), *module._apart(*args)):
        activation = term.activation if term.activation in cpu.ACTIVATIONS else "relu2"
        call = term.query, term.key, term.value, term.conv_weight, activation, GROUP
        assert cpu.supports(*call) is None


def test_performer_with_many_features_is_the_softmax_it_estimates() -> None:
    """The random features are the same everywhere; with more of them the estimate comes closer."""
    args = [x * 0.7 for x in inputs("causal", 40)]
    errors = []
    for features in (512, 8192):
        config = LinearizeConfig(mechanism="performer", options={"features": features})
        error = build_attention(SPEC, config)(*args) - SoftmaxAttention(SPEC)(*args)
        errors.append(float(error.detach().abs().mean()))
    assert errors[1] < 0.75 * errors[0] and errors[1] < 0.06


# --- padding, late queries, causality


@pytest.mark.parametrize("case, form", EACH)
def test_padding_changes_no_real_token(case: str, form: str) -> None:
    module = build(case, SPECS[form])
    query, key, value = inputs(form, 90, batch=3)
    mask = torch.ones(3, key.shape[2], dtype=torch.bool)
    mask[0, :21] = False
    mask[1, -35:] = False
    mask[2] = torch.rand(key.shape[2]) > 0.3
    out = module(query, key, value, key_mask=mask)
    for row, keep in enumerate(mask):
        one, real = slice(row, row + 1), slice(None) if form == "cross" else keep
        alone = module(query[one, :, real], key[one, :, keep], value[one, :, keep])
        close(out[one, :, real], alone, 1e-5, f"row {row}")
        assert form == "cross" or not out[row, :, ~keep].any()


@pytest.mark.parametrize("padded", (False, True), ids=("plain", "padded"))
@pytest.mark.parametrize("case", LATE)
def test_late_queries_equal_their_rows_of_the_whole(case: str, padded: bool) -> None:
    module = build(case, SPEC)
    query, key, value = inputs("causal", 100)
    mask = None
    if padded:
        mask = torch.ones(2, 100, dtype=torch.bool)
        mask[0, :13] = False
        mask[1, 40:47] = False
    whole = module(query, key, value, key_mask=mask)
    for start, count in ((99, 1), (64, 1), (96, 4), (37, 40), (3, 97)):
        late, end = query[:, :, start : start + count], start + count
        wanted = whole[:, :, start:end]
        seen = None if mask is None else mask[:, :end]
        close(module(late, key[:, :, :end], value[:, :, :end], key_mask=seen), wanted, 1e-5, f"{start}")
        for at in (start, torch.tensor(start)):  # a static cache: later columns hold something else
            later = torch.ones(2, 100, dtype=torch.bool) if mask is None else mask.clone()
            later[:, end:] = False
            close(module(late, key, value, query_start=at, key_mask=later), wanted, 1e-5, f"{start} static")
            close(module(late, key, value, query_start=at, key_mask=mask), wanted, 1e-5, f"{start} at")


@pytest.mark.parametrize("case", [case for case, form in (p.values for p in EACH) if form == "cross"])
def test_cross_queries_can_come_one_by_one(case: str) -> None:
    module = build(case, SPECS["cross"])
    query, key, value = inputs("cross", 70)
    whole = module(query, key, value)
    for start in (0, 31, 64, 69):
        out = module(query[:, :, start : start + 1], key, value, query_start=start)
        close(out, whole[:, :, start : start + 1], 1e-5, f"{start}")


@pytest.mark.parametrize("case", CAUSAL)
def test_the_future_changes_nothing(case: str) -> None:
    module = build(case, SPEC)
    args = inputs("causal", 100)
    before = module(*args)
    for now in (1, 32, 63):
        changed = [torch.cat([x[:, :, :now], 50 * torch.randn(x[:, :, now:].shape)], 2) for x in args]
        assert torch.equal(module(*changed)[:, :, :now], before[:, :, :now])


# --- numbers at the edge


@pytest.mark.parametrize("case, form", EACH)
def test_a_sequence_of_padding_gives_zeros_and_finite_gradients(case: str, form: str) -> None:
    module = build(case, SPECS[form])
    args = [x.requires_grad_() for x in inputs(form, 40)]
    mask = torch.ones(2, args[1].shape[2], dtype=torch.bool)
    mask[0] = False
    out = module(*args, key_mask=mask)
    assert not out[0].any() and out[1].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in [*args, *module.parameters()])


@pytest.mark.parametrize("case, form", EACH)
@pytest.mark.parametrize("norm", (0.0, 1e-6, 1e4))
def test_any_norm_gives_finite_numbers(case: str, form: str, norm: float) -> None:
    module = build(case, SPECS[form])
    query, key, value = inputs(form, 70)
    with torch.no_grad():
        query[:, :, ::3] *= norm
        key[:, :, ::2] *= norm
    args = [x.requires_grad_() for x in (query, key, value)]
    out = module(*args)
    assert out.isfinite().all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in [*args, *module.parameters()])


def test_keys_that_no_random_feature_meets_are_averaged() -> None:
    """Their features underflow; the epsilon keeps the denominator, whatever the future holds."""
    module = build("performer", SPEC, augmentation=False)
    query, key, value = inputs("causal", 40)
    out = module(query, key * 1e3, value)
    mean = value.cumsum(2) / torch.arange(1, 41)[:, None]
    close(out, mean.repeat_interleave(2, 1), 1e-4)


def test_keys_that_no_learned_feature_meets_are_averaged() -> None:
    """Query and key features are one-hot, in different places: float32 has no other weight for them."""
    config = LinearizeConfig(mechanism="hedgehog", group_size=GROUP)
    query, key, value = (torch.zeros_like(x) for x in inputs("causal", 40))
    query[..., 0], query[..., 1], key[..., 2], key[..., 3] = 200, -200, 200, -200
    value.normal_()
    mean = value.cumsum(2) / torch.arange(1, 41)[:, None]
    close(build_attention(SPEC, config)(query, key, value), mean.repeat_interleave(2, 1), 1e-5)


# --- softmax_window


@pytest.mark.parametrize("form", ("causal", "bidirectional"))
@pytest.mark.parametrize("kv_layout", ("interleaved", "tiled"))
def test_a_window_that_covers_the_sequence_is_softmax(form: str, kv_layout: str) -> None:
    spec = dataclasses.replace(SPECS[form], kv_layout=kv_layout, scale=None)
    args = [3 * x for x in inputs(form, 50)]
    mask = torch.rand(2, 50) > 0.3
    exact = SoftmaxAttention(spec)
    allowed = 2 * softmax_bound(*args[:2], spec.head_dim**-0.5)  # both sides are rounded
    for size in (50, 51, 1000):
        config = LinearizeConfig(mechanism="softmax_window", options={"window": size}, group_size=GROUP)
        module = build_attention(spec, config)
        close(module(*args), exact(*args), allowed)
        real = mask[:, None, :, None]
        close(module(*args, key_mask=mask) * real, exact(*args, key_mask=mask) * real, allowed)
        if form == "causal":
            late = (args[0][:, :, 45:], *args[1:])
            close(module(*late), exact(*late), allowed)


def test_scores_far_beyond_exp_keep_the_window_exact() -> None:
    module = build("softmax_window_only", SPEC, augmentation=False)
    query, key, value = inputs("causal", 60)
    spec = dataclasses.replace(SPEC, window=WINDOW)
    out = module(100 * query, 100 * key, value)
    sharp = SoftmaxAttention(spec)(100 * query, 100 * key, value)
    scores = (query @ key.repeat_interleave(2, 1).mT * 4000).diagonal(dim1=2, dim2=3)
    peaked = scores > 100  # so is the largest in the window, and nothing far weighs against exp(100)
    assert peaked.any() and out.isfinite().all()
    # Scores of 10^4 are rounded to 10^-3, differently by different orders of summation.
    close(out.transpose(1, 2)[peaked.mT], sharp.transpose(1, 2)[peaked.mT], 1e-3)


@pytest.mark.parametrize("kind", ("softmax", "power"))
@pytest.mark.parametrize("form", ("causal", "bidirectional"))
def test_the_window_operators_can_be_differentiated_twice(form: str, kind: str) -> None:
    query, key, value = (x.double().requires_grad_() for x in inputs(form, 9, batch=1))
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 2] = False

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        args = q.unflatten(1, (2, 2)), k, v, mask, None, 3, form == "causal"
        out = window.softmax_window(*args) if kind == "softmax" else window.power_window(*args, 4)
        return out * mask[:, None, None, :, None]

    once, again = (
        torch.autograd.grad(call(query, key, value).sum(), query, create_graph=c) for c in (False, True)
    )
    torch.testing.assert_close(once, again)
    assert torch.autograd.gradcheck(call, (query, key, value))
    assert torch.autograd.gradgradcheck(call, (query[..., :2], key[..., :2], value[..., :1]), fast_mode=True)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("form", ("causal", "bidirectional"))
def test_a_window_never_makes_a_square_of_the_length(form: str) -> None:
    query, key, value = inputs(form, 4096, batch=1)
    query = query.unflatten(1, (2, 2))
    mask = torch.rand(1, 4096) > 0.1
    with Largest() as seen:  # the operator is opaque to it, what is inside is not
        causal, weigh = form == "causal", window.softmax_weights
        window.forward(query, key, value, mask, None, None, WINDOW, causal, weigh)
    assert 0 < seen.elements <= 4 * 4096 * 3 * WINDOW


# --- settings, seeds, storage


def test_parameters_and_buffers_lie_on_the_module_itself() -> None:
    """The compile backend passes them to the graph by plain names."""
    for case, (name, _, _) in CASES.items():
        for form in SPECS:
            if form in mechanisms.get(name).supports:
                assert not [key for key in build(case, SPECS[form]).state_dict() if "." in key]


def test_linformer_says_how_long_a_sequence_may_be() -> None:
    module = build("linformer", SPECS["bidirectional"])
    with pytest.raises(InputError, match="projections for 200 tokens and got 201"):
        module(*inputs("bidirectional", 201))


@pytest.mark.parametrize("case", ("performer", "rfa", "linformer"))
def test_random_features_follow_their_seed_everywhere(case: str) -> None:
    name, options, _ = CASES[case]
    spec = SPECS["bidirectional"]

    def fresh(seed: int) -> AttentionModule:
        return build_attention(spec, LinearizeConfig(mechanism=name, options={**options, "seed": seed}))

    args = inputs("bidirectional", 20)
    torch.manual_seed(1)
    first = fresh(0)
    torch.manual_seed(2)
    assert torch.equal(first(*args), fresh(0)(*args))
    assert not torch.equal(first(*args), fresh(1)(*args))
    assert any("projection" in key for key in first.state_dict())


@pytest.mark.parametrize("case, form", EACH)
def test_meta_modules_get_their_initial_values_and_copies_are_exact(case: str, form: str) -> None:
    name, options, _ = CASES[case]
    config = LinearizeConfig(mechanism=name, options=options, augmentation=True, group_size=GROUP)
    with torch.device("meta"):
        empty = build_attention(SPECS[form], config)
    state = empty.state_dict()
    assert all(x.is_meta for x in state.values())
    filled: Any = empty.to_empty(device="cpu")
    with torch.no_grad():
        for x in filled.state_dict().values():
            x.fill_(7)
    filled.reset_parameters()
    normal = build_attention(SPECS[form], config)
    given = filled.state_dict()
    assert all(torch.equal(given[name], x) for name, x in normal.state_dict().items())
    args = inputs(form, 20)
    assert torch.equal(copy.deepcopy(normal)(*args), filled(*args))


@pytest.mark.parametrize("case, form", EACH)
def test_attention_dropout_is_not_applied(case: str, form: str) -> None:
    module = build(case, dataclasses.replace(SPECS[form], dropout=0.5)).train()
    args = inputs(form, 20)
    assert torch.equal(module(*args), module.eval()(*args))


def test_what_the_mathematics_does_not_allow_is_refused() -> None:
    assert mechanisms.get("linformer").refusal(SPEC) is not None
    for name in ("castling", "softmax_window", "power_window"):
        assert mechanisms.get(name).refusal(SPECS["cross"]) is not None
    with pytest.raises(ConfigError, match="takes no convolution"):
        LinearizeConfig(mechanism="softmax", augmentation=True)


# --- compiled and exported


@pytest.mark.parametrize(
    "case",
    (
        "performer",
        "yoso",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("softmax_window", "power_window")),
    ),
)
def test_compiles_and_exports_with_dynamic_sizes(case: str) -> None:
    module = build(case, SPEC)

    def call(batch: int, length: int) -> tuple[list[Tensor], Tensor]:
        return inputs("causal", length, batch), torch.rand(batch, length) > 0.3

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    batch, length = Dim("batch", min=2, max=64), Dim("length", min=2, max=999)
    shapes = dict(
        query={0: batch, 2: length},
        key={0: batch, 2: length},
        value={0: batch, 2: length},
        key_mask={0: batch, 1: length},
    )
    args, mask = call(3, 9)
    program = export(module, tuple(args), dict(key_mask=mask), dynamic_shapes=shapes, strict=False).module()
    for size in ((3, 9), (2, 40), (5, 100)):
        args, mask = call(*size)
        wanted = module(*args, key_mask=mask)
        torch.testing.assert_close(compiled(*args, key_mask=mask), wanted)
        torch.testing.assert_close(program(*args, key_mask=mask), wanted)
        torch.testing.assert_close(compiled(*args), module(*args))


# --- in models


def settings(case: str, **more: Any) -> dict[str, Any]:
    name, options, _ = CASES[case]
    return dict(mechanism=name, options=options, group_size=4, **more)


def awake(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear_attention" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model


@pytest.mark.parametrize("case", CAUSAL)
def test_a_decoder_generates_what_recomputing_gives_and_loads_back(case: str, tmp_path: Any) -> None:
    model: Any = awake(lz.linearize(llama(), augmentation=True, **settings(case)))
    prompt = tokens(2, 21)
    mask = torch.ones_like(prompt)
    mask[0, :5] = 0
    greedy = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, disable_compile=True)
    out = model.generate(prompt, attention_mask=mask, **greedy)
    for row, keep in enumerate(mask.bool()):
        assert torch.equal(out[row, 21:], recompute(model, prompt[row : row + 1, keep], 6)[0, keep.sum() :])
    lz.save(model, tmp_path / "m")
    again: Any = lz.load(tmp_path / "m")
    assert again._linearize.config == model._linearize.config
    assert torch.equal(again(prompt).logits, model(prompt).logits)


@pytest.mark.parametrize("case", [case for case, form in (p.values for p in EACH) if form == "bidirectional"])
def test_an_encoder_converts(case: str) -> None:
    model = awake(lz.linearize(bert(), augmentation=True, **settings(case)))
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    out = model(ids, attention_mask=mask).last_hidden_state
    alone = model(ids[:1, :11]).last_hidden_state
    assert out.isfinite().all()
    torch.testing.assert_close(out[:1, :11], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ("relu", "hedgehog", "yoso", "flash_global"))
def test_an_encoder_decoder_generates_what_it_does_without_a_cache(case: str) -> None:
    model: Any = awake(lz.linearize(bart(), augmentation=True, **settings(case)))
    prompt = tokens(2, 17)
    mask = torch.ones_like(prompt)
    mask[0, -6:] = 0
    greedy = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    out = model.generate(prompt, attention_mask=mask, **greedy)
    assert torch.equal(out, model.generate(prompt, attention_mask=mask, **greedy, use_cache=False))
    assert torch.equal(out[:1], model.generate(prompt[:1, :11], **greedy))


def test_a_covering_window_leaves_the_model_as_it_was() -> None:
    original = llama()
    model = lz.linearize(copy.deepcopy(original), mechanism="softmax_window", options={"window": 64})
    ids = torch.randint(3, VOCAB, (2, 40))
    wanted = original(ids).logits
    # A term goes through two layers of four matrices, a feed-forward and 40 keys, and the last matrix.
    additions = 2 * (4 * 32 + 48 + 40) + 32
    allowed = 2 * bound(torch.float32, additions, float(wanted.detach().abs().max()))
    torch.testing.assert_close(model(ids).logits, wanted, atol=allowed, rtol=0)
