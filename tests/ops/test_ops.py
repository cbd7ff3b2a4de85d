"""The reference form equals its oracle, wherever the queries, the padding and the heads lie."""

from __future__ import annotations

import pytest
import torch
from linearize.kernels import chunk as walk
from linearize.kernels import naive as oracle
from torch import Tensor, nn
from torch.export import Dim, export

from linearize.errors import InputError
from linearize.ops import attention as ops

LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 200)
FORMS = ("causal", "bidirectional", "cross")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make(form: str, length: int, taps: int = 4, heads=(4, 2), batch: int = 2, dtype=torch.float64):
    """query, key, value and keyword arguments; cross-attention has 37 more keys than queries."""
    keys = length + 37 if form == "cross" else length
    query = torch.randn(batch, heads[0], length, 8, dtype=dtype)
    key = torch.randn(batch, heads[1], keys, 8, dtype=dtype)
    value = torch.randn(batch, heads[1], keys, 6, dtype=dtype)
    weight = torch.randn(heads[0], ops.conv_width(taps, form == "causal"), dtype=dtype)
    options = dict(
        alpha=torch.tensor([0.3], dtype=dtype),
        conv_weight=weight,
        local_scale=0.7,
        causal=form == "causal",
        cross=form == "cross",
    )
    return (query, key, value), options


def repeat(x: Tensor, heads: int, kv_layout: str = "interleaved") -> Tensor:
    groups = heads // x.shape[1]
    return x.repeat_interleave(groups, 1) if kv_layout == "interleaved" else x.repeat(1, groups, 1, 1)


def expected(args, options, kv_layout: str = "interleaved") -> Tensor:
    query, key, value = args
    heads = query.shape[1]
    return oracle.augmented_attention(
        query, repeat(key, heads, kv_layout), repeat(value, heads, kv_layout), **options
    )


def close(actual: Tensor, wanted: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual.double(), wanted.double(), atol=atol, rtol=0)


def test_oracle_is_the_formula_written_with_loops():
    (query, key, value), options = make("causal", 9, taps=3, heads=(2, 2), batch=1)
    out = oracle.augmented_attention(query, key, value, group_size=4, **options)
    q, k = (x[0] / x[0].norm(dim=-1, keepdim=True) for x in (query, key))
    for h in range(2):
        for t in range(9):
            total = torch.zeros(6, dtype=torch.float64)
            for j in range(t + 1):
                score = torch.dot(q[h, t], k[h, j])
                same_group = j // 4 == t // 4
                total += (0.7 * score.clamp(min=0) ** 2 if same_group else 0.3 * score) * value[0, h, j]
            for lag in range(min(3, t + 1)):
                total += options["conv_weight"][h, lag] * value[0, h, t - lag]
            close(out[0, h, t], total)


@pytest.mark.parametrize("taps", (1, 4, 32))
@pytest.mark.parametrize("group_size", (16, 64))
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_oracle_at_every_length_and_head_layout(form, group_size, taps):
    for length in LENGTHS:
        args, options = make(form, length, taps)
        for kv_layout in ("interleaved", "tiled"):
            actual = ops.augmented_attention(*args, group_size=group_size, kv_layout=kv_layout, **options)
            close(actual, expected(args, dict(options, group_size=group_size), kv_layout))


@pytest.mark.parametrize("drop", ("alpha", "conv_weight", "normalize"))
def test_parts_can_be_left_out(drop):
    (query, key, value), options = make("causal", 70, heads=(2, 2))
    if drop == "normalize":
        query, key = (x / x.norm(dim=-1, keepdim=True) for x in (query, key))
        actual = ops.augmented_attention(query, key, value, group_size=16, normalize=False, **options)
        wanted = options
    else:
        actual = ops.augmented_attention(query, key, value, group_size=16, **dict(options, **{drop: None}))
        wanted = dict(options, **{drop: 0.0 if drop == "alpha" else None})
    close(actual, oracle.augmented_attention(query, key, value, group_size=16, **wanted))


@pytest.mark.parametrize("group_size", (16, 64))
@pytest.mark.parametrize("spelling", ("default", "int", "tensor", "static cache"))
def test_late_queries_equal_their_rows_of_the_whole(group_size, spelling):
    for length in (2, 33, 64, 65, 200):
        args, options = make("causal", length)
        options["group_size"] = group_size
        whole = expected(args, options)
        for count in {1, 2, 17, 64, length - 1}:
            start = length - count
            if start < 0:
                continue
            query, key, value = args[0][:, :, start:], *args[1:]
            at: int | Tensor | None = start if spelling == "int" else torch.tensor(start)
            if spelling == "default":
                at = None
            if spelling == "static cache":  # later columns hold nothing yet
                key, value = (nn.functional.pad(x, (0, 0, 0, 50), value=9.0) for x in (key, value))
            actual = ops.augmented_attention(query, key, value, query_start=at, **options)
            close(actual, whole[:, :, start:])


def test_late_queries_of_cross_attention_keep_their_group():
    args, options = make("cross", 60)
    whole = expected(args, dict(options, group_size=16))
    for start, stop in ((0, 20), (7, 8), (17, 50), (59, 60)):
        actual = ops.augmented_attention(
            args[0][:, :, start:stop], *args[1:], query_start=start, group_size=16, **options
        )
        close(actual, whole[:, :, start:stop])


MASKS = {
    "left": lambda keys: torch.stack([torch.arange(keys) >= keys // 3, torch.arange(keys) >= 0]),
    "right": lambda keys: torch.stack([torch.arange(keys) < keys - keys // 3, torch.arange(keys) >= 0]),
    "holes": lambda keys: torch.rand(2, keys) > 0.4,
}


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_padding_never_changes_a_real_token(form, where):
    for length in (1, 2, 33, 64, 127, 200):
        (query, key, value), options = make(form, length)
        options["group_size"] = 16
        mask = MASKS[where](key.shape[2])
        key, value = (x.masked_fill(~mask[:, None, :, None], 1e4) for x in (key, value))
        out = ops.augmented_attention(query, key, value, key_mask=mask, **options)
        for row, real in enumerate(mask):
            pick = slice(None) if form == "cross" else real
            one = slice(row, row + 1)
            wanted = expected((query[one, :, pick], key[one, :, real], value[one, :, real]), options)
            close(out[one, :, pick], wanted)
            if form != "cross":
                assert not out[row, :, ~real].any()


@pytest.mark.parametrize("where", MASKS)
def test_late_queries_with_padding_equal_their_rows_of_the_whole(where):
    args, options = make("causal", 127)
    options["group_size"] = 16
    mask = MASKS[where](127)
    whole = ops.augmented_attention(*args, key_mask=mask, **options)
    for start, stop in ((126, 127), (90, 91), (100, 127), (20, 75), (0, 40)):
        for at in (start, torch.tensor(start)):
            actual = ops.augmented_attention(
                args[0][:, :, start:stop], *args[1:], key_mask=mask, query_start=at, **options
            )
            close(actual, whole[:, :, start:stop])


@pytest.mark.parametrize("length", (1, 17, 70))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_those_of_the_oracle(form, masked, length):
    args, options = make(form, length)
    options["group_size"] = 16
    leaves = [x.requires_grad_() for x in (*args, options["alpha"], options["conv_weight"])]
    mask = None
    wanted = expected(args, options)
    if masked and form != "cross":  # a right-padded batch whose real part is the whole problem
        padded = [nn.functional.pad(x, (0, 0, 0, 9)) for x in args]
        mask = (torch.arange(length + 9) < length).expand(2, -1)
        actual = ops.augmented_attention(*padded, key_mask=mask, **options)[:, :, :length]
    else:
        actual = ops.augmented_attention(*args, **options)
    weight = torch.randn_like(wanted)
    pair = [torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True) for out in (actual, wanted)]
    for got, want in zip(*pair, strict=True):
        if want is None:
            assert got is None or not got.any()
        else:
            close(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_first_and_second_derivatives_by_finite_differences(form):
    args, options = make(form, 5, taps=2, heads=(2, 1), batch=1)
    args = [x[:, :, :5, :3].contiguous() for x in args]
    leaves = [x.requires_grad_() for x in (*args, options.pop("alpha"), options.pop("conv_weight"))]

    def call(query, key, value, alpha, conv_weight):
        conv = None if form == "cross" else conv_weight
        return ops.augmented_attention(
            query, key, value, alpha=alpha, conv_weight=conv, group_size=2, **options
        )

    inputs = leaves[:4] + [leaves[4].detach()] if form == "cross" else leaves
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize(
    "dtype, tolerance", ((torch.float32, 2e-5), (torch.bfloat16, 0.03), (torch.float16, 4e-3))
)
def test_low_precision_input_costs_no_more_than_its_rounding(dtype, tolerance):
    """A thousand positive products: a bfloat16 sum would stop growing at 256 times its terms."""
    query, key, value = (torch.rand(1, 2, 1200, 8).to(dtype) for _ in range(3))
    options = dict(alpha=torch.tensor([0.3], dtype=dtype), conv_weight=torch.randn(2, 4).to(dtype))
    out = ops.augmented_attention(query, key, value, **options)
    assert out.dtype == dtype
    wanted = oracle.augmented_attention(query, key, value, **options)
    assert ((out - wanted).abs() / wanted.abs().clamp(min=1)).max() < tolerance


def test_autocast_does_not_round_the_state():
    query, key, value = (torch.rand(1, 2, 1200, 8) for _ in range(3))
    options = dict(alpha=torch.tensor([0.3]), conv_weight=torch.randn(2, 4))
    plain = ops.augmented_attention(*(x.bfloat16() for x in (query, key, value)), **options)
    with torch.autocast("cpu", torch.bfloat16):
        # Whatever dtype each comes in; as scaled_dot_product_attention does.
        out = ops.augmented_attention(query, key, value.bfloat16(), **options)
        double = ops.augmented_attention(query.double(), key.double(), value.double(), **options)
    assert torch.equal(out, plain) and double.dtype == torch.float64


@pytest.mark.parametrize("length", (1, 40))
@pytest.mark.parametrize("scale", (0.0, 1e-12, 1e12))
def test_zero_and_extreme_rows_stay_finite_forward_and_backward(scale, length):
    args, options = make("causal", length, dtype=torch.float32)
    args = (args[0] * scale, args[1] * scale, args[2])
    leaves = [x.requires_grad_() for x in args]
    out = ops.augmented_attention(*leaves, group_size=16, **options)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
    if scale:
        close(out, expected(args, dict(options, group_size=16)), 1e-4)


@pytest.mark.parametrize("length", (1, 40))
@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_nothing_but_padding_is_zero(form, length):
    args, options = make(form, length)
    leaves = [x.requires_grad_() for x in args]
    mask = torch.ones(2, args[1].shape[2], dtype=torch.bool)
    mask[0] = False
    out = ops.augmented_attention(*leaves, key_mask=mask, group_size=16, **options)
    assert not out[0].any() and out[1].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


def test_any_strides_give_the_same_numbers():
    args, options = make("causal", 70)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args]
    assert not strided[0].is_contiguous()
    close(ops.augmented_attention(*strided, **options), expected(args, options))


def test_memory_is_linear_in_length():
    """No tensor of the computation, forward or backward, has a [T, T] in it."""
    length = 1024
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    (query, key, value), options = make("causal", length, heads=(1, 1), batch=1)
    query.requires_grad_()
    with Watch():
        tables = (options["alpha"], torch.ones(1, dtype=query.dtype), options["conv_weight"])
        out = walk.Chunk.apply(query, key, value, *tables, "relu2", 16, True, None, None, 0)
        out.sum().backward()
    # Not even a state per group: 64 groups of 8 x 6.
    assert 0 < largest <= length * 8


class Site(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.conv = nn.Parameter(torch.randn(4, ops.conv_width(4, form == "causal")))
        self.alpha = nn.Parameter(torch.tensor([0.3]))

    def forward(
        self, x: Tensor, y: Tensor, key_mask: Tensor | None = None, start: Tensor | None = None
    ) -> Tensor:
        query = x.unflatten(2, (4, 8)).transpose(1, 2)
        key, value = (z.unflatten(2, (2, 8)).transpose(1, 2) for z in y.chunk(2, dim=2))
        return ops.augmented_attention(
            query,
            key,
            value,
            alpha=self.alpha,
            conv_weight=self.conv,
            group_size=16,
            causal=self.form == "causal",
            cross=self.form == "cross",
            key_mask=key_mask,
            query_start=start,
        )


@pytest.mark.parametrize("traced_at", (9, 40))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("form", FORMS)
def test_export_holds_at_lengths_it_was_not_traced_at(form, masked, traced_at):
    """A trace on less than one group must not decide how many groups there are."""
    site = Site(form)
    batch, length = Dim("batch", min=2, max=64), Dim("length", min=2, max=4096)
    keys = Dim("keys", min=2, max=4096) if form == "cross" else length

    def inputs(batch: int, length: int):
        keys = length + 21 if form == "cross" else length
        mask = (torch.rand(batch, keys) > 0.3,) if masked else (None,)
        return torch.randn(batch, length, 32), torch.randn(batch, keys, 32), *mask

    shapes = ({0: batch, 1: length}, {0: batch, 1: keys}, {0: batch, 1: keys} if masked else None)
    program = export(site, inputs(3, traced_at), dynamic_shapes=shapes, strict=False).module()
    for size in ((2, 5), (2, 16), (5, 130)):
        args = inputs(*size)
        close(program(*args), site(*args), 1e-5)


def test_export_of_a_static_cache_step_takes_the_position_as_a_tensor():
    site = Site("causal")
    args = (torch.randn(2, 1, 32), torch.randn(2, 50, 32), None, torch.tensor(30))
    program = export(site, args, strict=False).module()
    for position in (0, 15, 16, 49):
        args = (*args[:3], torch.tensor(position))
        close(program(*args), site(*args), 1e-5)


@pytest.mark.parametrize("dynamic", (True, None))
def test_compiles_without_breaks_forward_and_backward(dynamic):
    torch._dynamo.reset()
    site = Site("causal")
    compiled = torch.compile(site, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (40, 33, 7):
        for mask in (None, torch.rand(2, length) > 0.3):
            x, y = (torch.randn(2, length, 32, requires_grad=True) for _ in range(2))
            pair = [f(x, y, mask) for f in (compiled, site)]
            close(*pair, 1e-6)
            grads = [torch.autograd.grad(out.square().sum(), (x, y, site.conv, site.alpha)) for out in pair]
            for got, want in zip(*grads, strict=True):
                close(got, want, 1e-4)


def test_registered_op_passes_the_library_checks():
    (query, key, value), options = make("causal", 20, dtype=torch.float32)
    tables = (torch.rand(4), torch.rand(4), options["conv_weight"], torch.randn(4, 16))
    leaves = [x.requires_grad_() for x in (query, key, value, *tables)]
    for mask, start in ((None, None), (torch.rand(2, 20) > 0.3, torch.tensor(0))):
        torch.library.opcheck(
            torch.ops.linearize.augmented_attention.default,
            (*leaves, "relu2", 16, True, False, mask, None, start, True, None),
        )


@pytest.mark.parametrize(
    "change, message",
    (
        (dict(query=torch.zeros(2, 4, 8)), "query must be a floating point"),
        (dict(value=torch.zeros(2, 2, 20, 6, dtype=torch.long)), "value must be a floating point"),
        (dict(key=torch.zeros(2, 3, 20, 8)), "number of heads"),
        (dict(key=torch.zeros(2, 2, 20, 7)), "features"),
        (dict(key=torch.zeros(2, 2, 19, 8)), "key has 19 tokens and value has 20"),
        (dict(query=torch.zeros(2, 4, 21, 8)), "21 queries but only 20 keys"),
        (dict(query=torch.zeros(3, 4, 20, 8)), "batch"),
        (dict(query_start=1), "do not lie inside"),
        (dict(query_start=-1), "do not lie inside"),
        (dict(group_size=0), "group_size"),
        (dict(kv_layout="other"), "kv_layout"),
        (dict(cross=True), "causal=False"),
        (dict(alpha=torch.zeros(3)), "alpha must be one number or"),
        (dict(local_scale=torch.zeros(4, 1)), "local_scale must be one number or"),
        (dict(local_bias=torch.zeros(4, 63)), "local_bias must be"),
        (dict(activation="relu"), "activation must be one of relu2"),
        (dict(form="cuda"), "form must be one of torch"),
        (dict(form="triton"), "the triton form needs cuda"),
        (dict(conv_weight=torch.zeros(2, 4)), r"conv_weight must be \[4, taps\]"),
        (dict(causal=False), "odd number of taps"),
        (dict(causal=False, conv_weight=None, query_start=0), "bidirectional"),
        (dict(causal=False, conv_weight=None, query=torch.zeros(2, 4, 5, 8)), "5 queries and 20 keys"),
        (dict(key_mask=torch.ones(2, 20)), "key_mask must be bool"),
        (dict(key_mask=torch.ones(2, 19, dtype=torch.bool)), "key_mask"),
    ),
)
def test_arguments_that_do_not_fit_are_named(change, message):
    (query, key, value), options = make("causal", 20, dtype=torch.float32)
    call = {"query": query, "key": key, "value": value, **options, **change}
    with pytest.raises(InputError, match=message):
        ops.augmented_attention(**call)
