"""Site modules: what they own, that they survive what users do to modules, and that softmax is exact."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from bounds import softmax_bound
from torch import Tensor
from torch.export import Dim, export

from linearize.mechanisms.augmented_paper import PaperAttention
from linearize.mechanisms.module import SoftmaxAttention
from linearize.mechanisms.spec import SiteSpec
from linearize.ops import attention as ops
from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig

SPEC = SiteSpec(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=6, causal=True)
BIDIRECTIONAL = dataclasses.replace(SPEC, causal=False)
CROSS = dataclasses.replace(SPEC, causal=False, cross=True)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def inputs(length: int, keys: int | None = None, batch: int = 2, dtype=torch.float32):
    keys = length if keys is None else keys
    return (
        torch.randn(batch, 4, length, 8, dtype=dtype),
        torch.randn(batch, 2, keys, 8, dtype=dtype),
        torch.randn(batch, 2, keys, 6, dtype=dtype),
    )


def linear(spec: SiteSpec = SPEC, **options) -> PaperAttention:
    module = build_attention(
        spec, LinearizeConfig(**{"mechanism": "augmented_paper", "group_size": 16, "conv_taps": 4} | options)
    )
    assert isinstance(module, PaperAttention)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_parameters_start_as_the_local_part_alone_and_fit_the_site():
    module = build_attention(SPEC, LinearizeConfig(mechanism="augmented_paper", conv_taps=4))
    values = {name: (tuple(p.shape), set(p.flatten().tolist())) for name, p in module.named_parameters()}
    assert values == {"alpha": ((4,), {0.0}), "local_scale": ((4,), {1.0}), "conv_weight": ((4, 4), {0.0})}
    scaled = build_attention(SPEC, LinearizeConfig(mechanism="augmented_paper", local_scale=0.5))
    assert scaled.local_scale.tolist() == [0.5] * 4
    assert build_attention(BIDIRECTIONAL, LinearizeConfig(conv_taps=4)).conv_weight.shape == (4, 7)
    assert build_attention(CROSS, LinearizeConfig()).conv_weight is None


@pytest.mark.parametrize("spec", (SPEC, BIDIRECTIONAL, CROSS, dataclasses.replace(SPEC, kv_layout="tiled")))
def test_linear_module_is_the_op_with_its_settings(spec):
    module = linear(spec)
    args = inputs(40, 61 if spec.cross else None)
    mask = torch.rand(2, args[1].shape[2]) > 0.3
    wanted = ops.augmented_attention(
        *args,
        alpha=module.alpha,
        conv_weight=module.conv_weight,
        local_scale=module.local_scale,
        group_size=16,
        causal=spec.causal,
        cross=spec.cross,
        kv_layout=spec.kv_layout,
        key_mask=mask,
    )
    assert torch.equal(module(*args, key_mask=mask), wanted)


def test_ablations_are_parts_of_the_augmented_form():
    args = inputs(40)
    full = linear()
    parts = {name: linear(mechanism=name) for name in ("local", "grouped")}
    with torch.no_grad():
        full.conv_weight.zero_()
        parts["grouped"].alpha.copy_(full.alpha)
        parts["local"].local_scale.copy_(full.local_scale)
    assert [len(list(part.parameters())) for part in parts.values()] == [1, 1]
    torch.testing.assert_close(full(*args), parts["local"](*args) + parts["grouped"](*args))
    assert build_attention(SPEC, LinearizeConfig(mechanism="grouped")).alpha.tolist() == [1.0] * 4


@pytest.mark.parametrize("mechanism", ("augmented_paper", "softmax"))
def test_survives_copy_pickle_dtype_state_dict_and_meta(mechanism):
    config = LinearizeConfig(mechanism=mechanism, group_size=16, conv_taps=4)
    module = build_attention(SPEC, config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    args = inputs(40)
    wanted = module(*args)
    assert torch.equal(copy.deepcopy(module)(*args), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(module))(*args), wanted)
    with torch.device("meta"):
        empty = build_attention(SPEC, config)
    assert all(p.is_meta for p in empty.parameters())
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(module.state_dict())
    assert torch.equal(empty(*args), wanted)
    low = copy.deepcopy(module).bfloat16()(*(x.bfloat16() for x in args))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), wanted, atol=0.1, rtol=0.05)


def test_meta_module_gets_its_initial_values_back():
    with torch.device("meta"):
        module = build_attention(SPEC, LinearizeConfig(mechanism="grouped"))
    module = module.to_empty(device="cpu")
    module.alpha.data.fill_(7)
    module.reset_parameters()
    assert module.alpha.tolist() == [1.0] * 4


def test_fresh_module_learns_alpha_and_convolution():
    """Both start at zero; a zero gradient as well would leave them there."""
    module = build_attention(SPEC, LinearizeConfig(mechanism="augmented_paper", group_size=16, conv_taps=4))
    module(*inputs(40)).square().sum().backward()
    assert module.alpha.grad.abs().sum() > 0 and module.conv_weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "spec, mechanism",
    ((SPEC, "augmented"), (SPEC, "augmented_paper"), (SPEC, "softmax"), (CROSS, "augmented_paper")),
)
def test_compiles_and_exports_with_dynamic_sizes(mechanism, spec):
    module = build_attention(spec, LinearizeConfig(mechanism=mechanism, group_size=16, conv_taps=4))
    extra = 21 if spec.cross else 0

    def case(batch: int, length: int):
        args = inputs(length, length + extra, batch)
        return args, dict(key_mask=torch.rand(batch, length + extra) > 0.3)

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    batch, length = Dim("batch", min=2, max=64), Dim("length", min=2, max=999)
    keys = Dim("keys", min=2, max=999) if spec.cross else length
    args, options = case(3, 9)
    shapes = dict(
        query={0: batch, 2: length},
        key={0: batch, 2: keys},
        value={0: batch, 2: keys},
        key_mask={0: batch, 1: keys},
    )
    program = export(module, args, options, dynamic_shapes=shapes, strict=False).module()
    for size in ((3, 9), (2, 40), (5, 100)):
        args, options = case(*size)
        wanted = module(*args, **options)
        torch.testing.assert_close(compiled(*args, **options), wanted)
        torch.testing.assert_close(program(*args, **options), wanted)


# softmax, held against a few obvious lines in float64


def plain_softmax(
    spec: SiteSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    groups = spec.num_heads // spec.num_key_value_heads
    heads = torch.arange(spec.num_heads)
    heads = heads // groups if spec.kv_layout == "interleaved" else heads % spec.num_key_value_heads
    query, key, value = query.double(), key.double()[:, heads], value.double()[:, heads]
    scores = query @ key.mT * (spec.head_dim**-0.5 if spec.scale is None else spec.scale)
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if bias is not None:
        scores = scores + bias.double()
    weights = scores.exp() if keep is None else scores.exp() * keep
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp().view(1, -1, 1, 1)
    return torch.where(total > 0, weights / total, 0.0) @ value


def check(spec: SiteSpec, args, keep=None, bias=None, sinks=None, **call) -> None:
    out = SoftmaxAttention(spec)(*args, sinks=sinks, **call)
    assert out.dtype == args[2].dtype
    near(out, plain_softmax(spec, *args, keep, bias, sinks), spec, *args[:2])


def near(out: Tensor, wanted: Tensor, spec: SiteSpec, query: Tensor, key: Tensor) -> None:
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    allowed = softmax_bound(query, key, scale) * float(wanted.abs().max())
    torch.testing.assert_close(out.double(), wanted, atol=allowed, rtol=0)


def lags(queries: int, keys: int, start: int) -> Tensor:
    return torch.arange(queries)[:, None] + start - torch.arange(keys)


@pytest.mark.parametrize("softcap", (None, 1.5))
@pytest.mark.parametrize("scale", (None, 0.7))
@pytest.mark.parametrize("kv_layout", ("interleaved", "tiled"))
def test_softmax_is_exact(kv_layout, scale, softcap):
    options = dict(kv_layout=kv_layout, scale=scale, softcap=softcap)
    causal, full, cross = (dataclasses.replace(s, **options) for s in (SPEC, BIDIRECTIONAL, CROSS))
    key_mask = torch.rand(2, 33) > 0.4
    pad = key_mask[:, None, None]
    for sinks in (None, torch.randn(4)):
        check(causal, inputs(33), lags(33, 33, 0) >= 0, sinks=sinks)
        check(causal, inputs(33), (lags(33, 33, 0) >= 0) & pad, sinks=sinks, key_mask=key_mask)
        check(full, inputs(33), sinks=sinks)
        check(full, inputs(33), pad, sinks=sinks, key_mask=key_mask)
        check(cross, inputs(5, 33), pad, sinks=sinks, key_mask=key_mask)


@pytest.mark.parametrize("count", (1, 5))
def test_softmax_of_late_queries(count):
    for start in (20, torch.tensor(20)):
        check(SPEC, inputs(count, 33), lags(count, 33, 20) >= 0, query_start=start)
    check(SPEC, inputs(count, 33), lags(count, 33, 33 - count) >= 0)


def test_softmax_windows():
    causal, full = dataclasses.replace(SPEC, window=5), dataclasses.replace(BIDIRECTIONAL, window=5)
    lag = lags(33, 33, 0)
    check(causal, inputs(33), (lag >= 0) & (lag < 5))
    check(full, inputs(33), lag.abs() <= 5)
    check(causal, inputs(2, 33), (lags(2, 33, 31) >= 0) & (lags(2, 33, 31) < 5))


def test_softmax_honours_a_mask_and_nothing_else_positional():
    keep = torch.rand(2, 1, 33, 33) > 0.4
    bias = torch.randn(1, 4, 33, 33)
    key_mask = torch.rand(2, 33) > 0.3
    capped = dataclasses.replace(SPEC, softcap=1.5)
    for spec in (SPEC, capped):
        check(spec, inputs(33), keep, mask=keep)
        check(spec, inputs(33), keep & key_mask[:, None, None], mask=keep, key_mask=key_mask)
        check(spec, inputs(33), bias=bias, mask=bias)
        check(spec, inputs(33), key_mask[:, None, None], bias=bias, mask=bias, key_mask=key_mask)


@pytest.mark.parametrize("softcap", (None, 50.0))
def test_softmax_rows_without_keys_follow_the_mask(softcap):
    """Boolean: zero. finfo.min, as transformers fills it: the average of what it covers. Gradients finite."""
    spec = dataclasses.replace(SPEC, softcap=softcap)
    args = [x.requires_grad_() for x in inputs(6)]
    keep = lags(6, 6, 0) >= 0
    keep[:2] = False
    out = SoftmaxAttention(spec)(*args, mask=keep)
    assert not out[:, :, :2].any() and out[:, :, 2:].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), args))
    filled = torch.zeros(6, 6).masked_fill(~keep, torch.finfo(torch.float32).min)
    out = SoftmaxAttention(spec)(*args, mask=filled)
    mean = args[2].mean(2, keepdim=True).repeat_interleave(2, 1).expand(-1, -1, 2, -1)
    torch.testing.assert_close(out[:, :, :2], mean)


def test_softmax_drops_weights_in_training_only():
    args = inputs(33)
    for softcap in (None, 50.0):
        module = SoftmaxAttention(dataclasses.replace(SPEC, dropout=0.5, softcap=softcap))
        assert not torch.equal(module(*args), module(*args))
        module.eval()
        assert torch.equal(module(*args), module(*args))
