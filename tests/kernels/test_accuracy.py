"""Every length around a group border, group size and number of taps: outputs and gradients of the oracle.

The compiled forms have their own files; here is the plain PyTorch walk, and whatever form this machine would
choose by itself.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from bounds import bound
from linearize.kernels import naive as oracle
from linearize.kernels.activations import ACTIVATIONS
from torch import Tensor

from linearize.ops import attention as ops

LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 500, 1000)
TAPS = itertools.cycle((1, 2, 3, 17, 32, 63, 64))
GRID = [(length, group, next(TAPS)) for length in LENGTHS for group in (16, 32, 64, 128)]


def make(length: int, taps: int, dtype=torch.float32, heads=(4, 2), dim=16) -> dict[str, Tensor]:
    torch.manual_seed(length * 1000 + taps)
    tensors = {
        "query": torch.randn(2, heads[0], length, dim).to(dtype),
        "key": torch.randn(2, heads[1], length, dim).to(dtype),
        "value": torch.randn(2, heads[1], length, dim - 4).to(dtype),
        "alpha": torch.rand(heads[0]),
        "local_scale": torch.rand(heads[0]) + 0.5,
        "conv_weight": torch.randn(heads[0], taps) * 0.3,
    }
    return {name: x.requires_grad_() for name, x in tensors.items()}


def exact(tensors: dict[str, Tensor], **options) -> tuple[Tensor, dict[str, Tensor]]:
    """Oracle output and gradients, float64, for a fixed upstream gradient."""
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    repeats = wide["query"].shape[1] // wide["key"].shape[1]
    repeated = {name: wide[name].repeat_interleave(repeats, 1) for name in ("key", "value")}
    out = oracle.augmented_attention(**{**wide, **repeated}, **options)
    grads = torch.autograd.grad(out, list(wide.values()), upstream(out))
    return out.detach(), dict(zip(wide, grads, strict=True))


def upstream(out: Tensor) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(out.shape, dtype=torch.float64).to(out.dtype)


def error(actual: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest entry when that is above one."""
    return ((actual.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1)).item()


@pytest.mark.parametrize("form", ("torch", None))
@pytest.mark.parametrize("length, group_size, taps", GRID)
def test_float32_is_within_1e_5_of_the_oracle_with_gradients(form, length, group_size, taps):
    tensors = make(length, taps)
    wanted, grads = exact(tensors, group_size=group_size)
    out = ops.augmented_attention(**tensors, group_size=group_size, form=form)
    assert error(out, wanted) < 1e-5
    found = torch.autograd.grad(out, list(tensors.values()), upstream(out))
    for (name, want), got in zip(grads.items(), found, strict=True):
        assert error(got, want) < 1e-5, name


@pytest.mark.parametrize("form", ("torch", None))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("length", (2, 65, 500))
def test_half_precision_costs_its_rounding_in_outputs_and_gradients(form, dtype, length):
    tensors = make(length, 32, dtype)
    wanted, grads = exact(tensors, group_size=64)
    out = ops.augmented_attention(**tensors, group_size=64, form=form)
    # Over the tokens twice (into a state and out of it), over both widths. Stored: both unit rows, what is
    # multiplied with them, and in the backward the gradients of a weight and of a unit row; the result.
    allowed = bound(dtype, 2 * length + 16 + 12, stored=6)
    assert out.dtype == dtype and error(out, wanted) < allowed
    found = torch.autograd.grad(out, list(tensors.values()), upstream(out))
    for (name, want), got in zip(grads.items(), found, strict=True):
        assert got.dtype == tensors[name].dtype
        assert error(got, want) < allowed, name


# YOSO's angle needs unit vectors.
@pytest.mark.parametrize(
    "activation, normalize", [(a, n) for a in ACTIVATIONS for n in (True, False) if n or a != "yoso"]
)
def test_other_activations_and_a_bias_by_lag(activation, normalize):
    tensors = make(70, 5)
    tensors["local_bias"] = torch.randn(4, 16, requires_grad=True)
    options = dict(group_size=16, activation=activation, normalize=normalize)
    wanted, grads = exact(tensors, **options)
    out = ops.augmented_attention(**tensors, **options)
    assert error(out, wanted) < 1e-5
    found = torch.autograd.grad(out, list(tensors.values()), upstream(out))
    for (name, want), got in zip(grads.items(), found, strict=True):
        assert error(got, want) < 1e-5, name


@pytest.mark.parametrize("causal", (True, False))
def test_a_bias_by_lag_reaches_late_queries_and_both_directions(causal):
    tensors = make(37, 5)
    tensors["local_bias"] = torch.randn(4, 8 if causal else 15)
    options = dict(group_size=8, causal=causal)
    wanted, _ = exact({n: x.detach().requires_grad_() for n, x in tensors.items()}, **options)
    assert error(ops.augmented_attention(**tensors, **options), wanted) < 1e-5
    if causal:
        for count in (1, 11):
            late = {**tensors, "query": tensors["query"][:, :, -count:]}
            assert error(ops.augmented_attention(**late, **options), wanted[:, :, -count:]) < 1e-5


@pytest.mark.parametrize("size", (1e-12, 1e12))
def test_the_size_of_queries_and_keys_does_not_matter(size):
    tensors = make(70, 4)
    wanted, _ = exact(tensors, group_size=16)
    scaled = {**tensors, "query": tensors["query"] * size, "key": tensors["key"] / size}
    assert error(ops.augmented_attention(**scaled, group_size=16), wanted) < 1e-5


def test_gradients_stay_exact_past_many_saved_states():
    """The states of the backward are rebuilt by subtraction, 64 groups at a time."""
    tensors = make(1000, 3)
    wanted, grads = exact(tensors, group_size=4)
    out = ops.augmented_attention(**tensors, group_size=4, form="torch")
    assert error(out, wanted) < 1e-5
    found = torch.autograd.grad(out, list(tensors.values()), upstream(out))
    for (name, want), got in zip(grads.items(), found, strict=True):
        assert error(got, want) < 1e-5, name


@pytest.mark.parametrize("form", ("torch", None))
def test_early_gradients_of_a_long_sequence_are_those_of_a_short_one(form):
    """Rounding does not pile up over thousands of rebuilt states; values of one sign make the last huge."""
    torch.manual_seed(0)
    long = {name: torch.rand(1, 1, 64_000, 4) + 0.5 for name in ("query", "key", "value")}
    grad = torch.randn(1, 1, 64_000, 4)

    def gradient(length: int) -> Tensor:
        leaves = {name: x[:, :, :length].clone().requires_grad_() for name, x in long.items()}
        out = ops.augmented_attention(**leaves, alpha=1.0, conv_weight=None, group_size=8, form=form)
        return torch.autograd.grad(out, leaves["query"], grad[:, :, :length])[0]

    short = gradient(256)
    assert error(gradient(64_000)[:, :, :256], short.double()) < 1e-4


def test_samples_mapped_over_keep_their_own_tables():
    tensors = {name: x.detach() for name, x in make(37, 4).items()}
    samples = [make(37, 4) for _ in range(3)]
    for i, sample in enumerate(samples):
        for name in sample:
            sample[name] = (sample[name] + i).detach()

    def attend(query, key, value, alpha, conv_weight):
        return ops.augmented_attention(query, key, value, alpha=alpha, conv_weight=conv_weight, group_size=16)

    names = ("query", "key", "value", "alpha", "conv_weight")
    for mapped in (names, ("query", "conv_weight"), ("value",)):
        dims = tuple(0 if name in mapped else None for name in names)
        stacked = [torch.stack([s[n] for s in samples]) if n in mapped else tensors[n] for n in names]
        leaves = [x.requires_grad_() for x in stacked]
        out = torch.func.vmap(attend, in_dims=dims)(*leaves)
        one_by_one = torch.stack(
            [
                attend(*(x[i] if dim == 0 else x for x, dim in zip(leaves, dims, strict=True)))
                for i in range(3)
            ]
        )
        torch.testing.assert_close(out, one_by_one)
        grads = torch.autograd.grad(out, leaves, upstream(out))
        for got, want in zip(grads, torch.autograd.grad(one_by_one, leaves, upstream(out)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_can_be_batched():
    tensors = make(37, 4)
    leaves = list(tensors.values())
    out = ops.augmented_attention(**tensors, group_size=16)
    many = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, leaves, many, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for got, want in zip(
            batched, torch.autograd.grad(out, leaves, many[i], retain_graph=True), strict=True
        ):
            torch.testing.assert_close(got[i], want, rtol=1e-4, atol=1e-4)
