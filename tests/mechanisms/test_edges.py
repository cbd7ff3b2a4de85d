"""Numbers at the edges: rows of any size or of no numbers, padding of both, nothing at all, in every form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from linearize.kernels import dispatch, naive, registered_salient
from torch import Tensor

from linearize import mechanisms, ops
from linearize.errors import ConfigError, InputError
from linearize.mechanisms import augmented, power_window, softmax_window
from linearize.mechanisms.module import AttentionModule
from linearize.mechanisms.spec import SiteSpec
from linearize.ops.state import AttentionState
from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig

LENGTH, GROUP, TAPS = 72, 16, 4
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
SIZES = {"window": 8, "sinks": 2, "salient": 5}
OPTIONS: dict[str, dict[str, Any]] = {
    "augmented": SIZES,
    "softmax_window": {"window": 8, "sinks": 2},
    "power_window": {"window": 8, "sinks": 2, "power": 4},
}
CAUSAL = [
    name
    for name, mechanism in mechanisms.available().items()
    if "causal" in mechanism.supports and name != "softmax"
]
Tokens = list[Tensor]


def build(name: str, causal: bool = True) -> AttentionModule:
    torch.manual_seed(0)
    spec = SiteSpec(HEADS, KV_HEADS, head_dim=DIM, value_dim=VALUE_DIM, causal=causal, scale=0.4)
    config = LinearizeConfig(
        mechanism=name, group_size=GROUP, conv_taps=TAPS, augmentation=False, options=OPTIONS.get(name, {})
    )
    module = build_attention(spec, config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        if (tail := getattr(module, "tail_weight", None)) is not None:
            tail.zero_()  # what it estimates is no business of the formulas here
    return module


def tokens(length: int = LENGTH, batch: int = 2) -> Tokens:
    torch.manual_seed(1)
    shapes = (HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM)
    return [torch.randn(batch, heads, length, size) for heads, size in shapes]


def sized(x: Tensor, norm: float, rows: list[int]) -> None:
    x[:, :, rows] *= norm / x[:, :, rows].norm(dim=-1, keepdim=True)


def filled(x: Tensor, number: float) -> None:
    x[0, :, 40] = number


def one_entry(x: Tensor, number: float) -> None:
    x[0, 0, 40, 2] = number


SOME, ALL = [3, 40], list(range(LENGTH))
EDITS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "large queries": lambda q, k, v: sized(q, 1e20, SOME),
    "large keys": lambda q, k, v: sized(k, 1e20, SOME),
    "small rows": lambda q, k, v: [sized(x, 1e-38, ALL) for x in (q, k)],
    "large rows": lambda q, k, v: [sized(x, 1e20, SOME) for x in (q, k)],
    "a NaN key": lambda q, k, v: filled(k, math.nan),
    "an infinite key": lambda q, k, v: filled(k, math.inf),
    "an infinite entry": lambda q, k, v: one_entry(k, math.inf),
    "a NaN value": lambda q, k, v: filled(v, math.nan),
    "a NaN query": lambda q, k, v: filled(q, math.nan),
}
FEWER = ("large keys", "small rows", "a NaN key", "a NaN value")
"""For others than those of `FORMULAS`; products of two large rows leave float32 there."""


@torch.no_grad()
def in_pieces(module: AttentionModule, args: Tokens, ends: list[int], max_rewind: int = 0) -> Tensor:
    state = module.new_state(2, dtype=args[0].dtype, device=args[0].device, max_rewind=max_rewind)
    pieces = itertools.pairwise((0, *ends, LENGTH))
    return torch.cat([module.extend(*(x[:, :, a:b] for x in args), state) for a, b in pieces], 2)


def compiled_forms(module: AttentionModule, args: Tokens) -> Iterator[tuple[str, Tensor]]:
    """Those that have C++ where it is built."""
    with torch.no_grad():
        yield "at once", module(*args)
    yield "with gradients", module(*(x.clone().requires_grad_() for x in args)).detach()
    yield "token by token", in_pieces(module, args, list(range(1, LENGTH)))
    yield "in pieces", in_pieces(module, args, [20, 21, 38, 50])
    yield "with room to take back", in_pieces(module, args, [20, 21, 38, 50], max_rewind=4)


def forms(module: AttentionModule, args: Tokens, patch: pytest.MonkeyPatch) -> Iterator[tuple[str, Tensor]]:
    yield from compiled_forms(module, args)
    with patch.context() as plain:
        for place in (dispatch, registered_salient):
            plain.setattr(place, "load", lambda form: "left out")
        for name, out in compiled_forms(module, args):
            yield f"{name}, in PyTorch", out


def same(out: Tensor, wanted: Tensor, what: str) -> None:
    """The same tokens are no numbers, and the others agree."""
    out, wanted = out.double(), wanted.float().double()
    lost, should = (~x.isfinite().all(-1) for x in (out, wanted))
    assert lost.nonzero().tolist() == should.nonzero().tolist(), what
    fine = ~should[..., None]
    size = wanted.masked_fill(~fine, 0).abs().amax((1, 3), keepdim=True).clamp(min=1e-30)
    error = ((out - wanted) / size).masked_fill(~fine, 0).abs().max()
    assert error < 2e-4, f"{what}: {float(error):.1e}"


def by_prefixes(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A formula that sums over all tokens, of each query and the tokens up to it: so it sees no later one."""

    def run(q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor]) -> Tensor:
        ends = range(1, q.shape[2] + 1)
        return torch.cat([formula(q[:, :, :e], k[:, :, :e], v[:, :, :e], p)[:, :, -1:] for e in ends], 2)

    return run


def salient(q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor]) -> Tensor:
    out, sizes = q.new_zeros(*q.shape[:3], VALUE_DIM), (SIZES["window"], SIZES["sinks"], SIZES["salient"])
    for row, head in itertools.product(range(2), range(0, HEADS, 2)):
        one = q[row, head : head + 2], k[row, head], v[row, head]
        out[row, head : head + 2] = augmented.naive(*one, sizes=sizes, scale=0.4, causal=True)
    return out


MAPS = "query_map", "key_map", "far_weight"
FORMULAS: dict[str, Callable[..., Tensor]] = {
    "augmented": salient,
    "augmented_paper": lambda q, k, v, p: naive.augmented_attention(
        q, k, v, alpha=p["alpha"], local_scale=p["local_scale"], conv_weight=None, group_size=GROUP
    ),
    "softmax_window": by_prefixes(
        lambda q, k, v, p: softmax_window.naive(
            q, k, v, *(p[name] for name in MAPS), window=8, sinks=2, scale=0.4, causal=True
        )
    ),
    "power_window": by_prefixes(
        lambda q, k, v, p: power_window.naive(
            q, k, v, *(p[name] for name in MAPS), window=8, sinks=2, power=4, scale=0.4, causal=True
        )
    ),
}


def wanted_of(name: str, module: AttentionModule, args: Tokens) -> Tensor:
    wide = [x.double() for x in args]
    if name not in FORMULAS:
        return in_pieces(module, wide, list(range(1, LENGTH)))
    parameters = {name: x.detach().double() for name, x in module.named_parameters()}
    for key in ("key_map",):
        if key in parameters:
            parameters[key] = parameters[key].repeat_interleave(2, 0)
    return FORMULAS[name](wide[0], *(x.repeat_interleave(2, 1) for x in wide[1:]), parameters)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_form_gives_the_same_numbers_and_loses_the_same_tokens(name, monkeypatch):
    module = build(name)
    for edit in EDITS if name in FORMULAS else FEWER:
        args = tokens()
        EDITS[edit](*args)
        wanted = wanted_of(name, module, args)
        assert wanted.isfinite().any() and wanted[1].isfinite().all()  # the other row of the batch
        for form, out in forms(module, args, monkeypatch):
            same(out, wanted, f"{edit}, {form}")


@pytest.mark.parametrize("name", CAUSAL)
def test_a_call_of_numbers_after_one_of_others_is_as_ever(name):
    """No memory that a kernel keeps for its next call, and no padding in it, holds what came before."""
    module, args = build(name), tokens()
    before = dict(compiled_forms(module, args))
    dirty = [torch.full_like(x, math.nan) for x in args]
    list(compiled_forms(module, dirty))
    for form, out in compiled_forms(module, args):
        assert torch.equal(out, before[form]), form


@pytest.mark.parametrize("causal", (True, False), ids=("causal", "bidirectional"))
@pytest.mark.parametrize("name", mechanisms.available())
def test_padding_of_whatever_changes_nothing(name, causal):
    kind = "causal" if causal else "bidirectional"
    if name == "softmax" or kind not in mechanisms.get(name).supports:
        pytest.skip(f"no {kind} form")
    module, real = build(name, causal), torch.rand(2, LENGTH) > 0.3
    real[1] = False
    outs, grads = [], []
    for junk in (0.0, math.nan, math.inf, 1e30):
        args = [x.masked_fill(~real[:, None, :, None], junk).requires_grad_() for x in tokens()]
        out = module(*args, key_mask=real)
        grads.append(torch.autograd.grad(out[:, :, real[0]].square().sum(), args))
        outs.append(out.detach())
        with torch.no_grad():
            torch.testing.assert_close(module(*args, key_mask=real), outs[0], atol=1e-5, rtol=1e-4)
        if name.startswith("flash") and junk == 1e30:
            continue  # neither divides by norms: 1e30 squared, times zero, is what their gradients are of
        for got, should in zip(grads[-1], grads[0], strict=True):
            torch.testing.assert_close(got, should, atol=1e-4, rtol=1e-3)
    assert not outs[0][1].any() and not outs[0][:, :, ~real[0]].any()


@pytest.mark.parametrize("name", mechanisms.available())
def test_nothing_at_all_is_refused_with_one_error(name):
    if name == "softmax":
        pytest.skip("it is the model's own")
    module = build(name, causal="causal" in mechanisms.get(name).supports)
    for batch, length in ((0, 5), (2, 0)):
        with pytest.raises(InputError, match="is empty: "):
            module(*tokens(length, batch))
    with pytest.raises(InputError, match="is empty: "):
        module(*(x[:, :0] for x in tokens()))
    if module.has_state:
        with pytest.raises(InputError, match="positive sizes"):
            module.new_state(0, dtype=torch.float32, device=torch.device("cpu"))
        state = module.new_state(2, dtype=torch.float32, device=torch.device("cpu"))
        with pytest.raises(InputError, match="is empty: "):
            module.extend(*tokens(0), state)
        assert state.length.tolist() == [0, 0]


def test_no_heads_and_no_sizes_are_refused_where_they_are_said():
    for heads, kv_heads, dim in ((0, 0, 8), (4, 0, 8), (4, 2, 0)):
        with pytest.raises(ConfigError, match="not positive"):
            SiteSpec(heads, kv_heads, dim, 8, causal=True)
    with pytest.raises(InputError, match="is empty: "):
        ops.augmented_attention(*(torch.randn(2, 2, 5, 0),) * 3, alpha=1.0, conv_weight=None)
    with pytest.raises(InputError, match="positive sizes"):
        AttentionState.new(2, 0, 8)


LONG = ("augmented_paper", "softmax_window")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in LONG else pytest.mark.slow) for name in CAUSAL]
)
@torch.no_grad()
def test_a_state_of_float16_after_100k_tokens(name):
    """Its sums are float32: they neither overflow nor stand still, as sums of float16 would at 2048."""
    module, count = build(name), 50
    piece = [x.half() for x in tokens(2000, 1)]
    piece[2] = piece[2].abs() + 1  # sums that grow
    half, wide = (
        module.new_state(1, dtype=dtype, device=torch.device("cpu"))
        for dtype in (torch.float16, torch.float64)
    )
    for _ in range(count - 1):
        module.commit(*piece, half)
        module.commit(*(x.double() for x in piece), wide)
    out, wanted = module.extend(*piece, half), module.extend(*(x.double() for x in piece), wide)
    assert half.length.tolist() == [100_000] and out.isfinite().all()
    error = (out.double() - wanted).abs() / wanted.abs().amax((2, 3), keepdim=True)
    assert float(error.max()) < 2e-3
