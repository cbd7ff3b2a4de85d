"""Capture: three front doors, one dialect, the same computation on the same parameters."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from linearize.passes.capture import CaptureError, capture, in_dialect, module_path, source_line, to_dialect
from linearize.passes.dialect import plain_attention
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.scaling = 0.3
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.register_buffer("visible", torch.ones(32, 32, dtype=torch.bool).tril(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        query, key, value = (
            f(x).view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        mask = self.visible[:t, :t]
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class Stack(nn.Module):
    """Two layers, the first of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in (*self.layers, self.layers[0]):
            x = x + layer(x)
        return x


class Traceable(nn.Module):
    """What `torch.fx.symbolic_trace` can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True)])
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks[0](x, x, x, need_weights=False)[0])


class Spy:
    """A dynamo backend that runs the captured graph and keeps it."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self.given: list[GraphModule] = []

    def __call__(self, gm: GraphModule, example_inputs: list) -> GraphModule:
        self.given.append(gm)
        self.graphs.append(to_dialect(gm, example_inputs))
        return self.graphs[-1]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def fused(gm: GraphModule) -> list[Node]:
    return gm.graph.find_nodes(op="call_function", target=SDPA)


def sdpa_line() -> str:
    lines, first = inspect.getsourcelines(Attention.forward)
    offset = next(i for i, line in enumerate(lines) if "F.scaled_dot_product_attention" in line)
    return f"test_capture.py:{first + offset}"


# --- the same computation


def test_exported_graph_equals_the_model_at_lengths_it_was_not_traced_at():
    model = Stack()
    gm = capture(model, (torch.randint(0, 10, (2, 6)),))
    assert in_dialect(gm)
    assert gm.meta["capture"].dynamic == {"ids": (0, 1)}
    for shape in ((2, 6), (3, 9), (1, 4)):
        ids = torch.randint(0, 10, shape)
        torch.testing.assert_close(gm(ids), model(ids), rtol=0, atol=0)


def test_exported_parameters_are_the_models_own():
    model = Stack()
    gm = capture(model, (torch.randint(0, 10, (2, 6)),))
    own = dict(model.named_parameters())
    assert dict(gm.named_parameters()).keys() == own.keys()
    assert all(parameter is own[name] for name, parameter in gm.named_parameters())
    gm(torch.randint(0, 10, (2, 5))).sum().backward()
    assert model.layers[1].query.weight.grad is not None


def test_symbolic_traced_graph_equals_the_model_and_keeps_its_parameters():
    model = Traceable()
    x = torch.randn(2, 5, 16)
    gm = to_dialect(torch.fx.symbolic_trace(model), (x,))
    assert in_dialect(gm) and len(fused(gm)) == 1
    own = dict(model.named_parameters())
    assert all(parameter is own[name] for name, parameter in gm.named_parameters())
    for shape in ((2, 5, 16), (3, 7, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_dynamo_graph_equals_the_model_forward_and_backward(dynamic):
    model, spy = Stack(), Spy()
    compiled = torch.compile(model, backend=spy, dynamic=dynamic)
    for shape in ((2, 6), (3, 9), (4, 7)):
        ids = torch.randint(0, 10, shape)
        model.zero_grad()
        expected = model(ids)
        expected.square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        actual = compiled(ids)
        actual.square().sum().backward()
        torch.testing.assert_close(actual, expected)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, gradient)
    assert len(spy.graphs) == (1 if dynamic else 3)
    assert all(in_dialect(gm) for gm in spy.graphs)


def test_dynamo_placeholders_keep_order_and_say_what_they_are():
    model, spy = Stack(), Spy()
    torch.compile(model, backend=spy, dynamic=True)(torch.randint(0, 10, (2, 6)))
    old = spy.given[0].graph.find_nodes(op="placeholder")
    new = spy.graphs[0].graph.find_nodes(op="placeholder")
    assert [n.target for n in old] == [n.target for n in new]
    leaves = {n.meta["leaf"].path: n.meta["leaf"] for n in new}
    for name, parameter in model.named_parameters():
        assert leaves[name].kind == "parameter" and leaves[name].value is parameter
    assert leaves["layers.0.visible"].kind == "buffer"
    assert leaves["ids"].kind == "input"


def test_a_float_attribute_is_a_constant_even_where_dynamo_makes_it_an_input():
    class Scaled(nn.Module):
        scaling = 0.3

        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2) * self.scaling).softmax(-1) @ x

    model, spy, x = Scaled(), Spy(), torch.randn(2, 5, 4)
    compiled = torch.compile(model, backend=spy, dynamic=True)
    compiled(x)
    assert 0.3 in spy.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)[0].args
    model.scaling = 0.7
    torch.testing.assert_close(compiled(x), model(x))  # the guard on the constant must see the change
    assert len(spy.graphs) == 2


def test_keys_and_values_of_a_fused_attention_share_one_length():
    spy, tensors = Spy(), [torch.randn(2, 2, 5, 4) for _ in range(3)]
    for tensor in tensors[1:]:
        torch._dynamo.mark_dynamic(tensor, 2)
    torch.compile(F.scaled_dot_product_attention, backend=spy)(*tensors)
    key, value = (node.meta["val"].shape[2] for node in fused(spy.graphs[0])[0].args[1:3])
    assert isinstance(key, torch.SymInt) and key.node.expr == value.node.expr


# --- where a node is


def test_module_paths_agree_in_export_and_dynamo():
    model, spy = Stack(), Spy()
    ids = torch.randint(0, 10, (2, 6))
    torch.compile(model, backend=spy)(ids)
    for gm in (capture(model, (ids,)), spy.graphs[0]):
        assert [module_path(node)[-1] for node in fused(gm)] == [
            ("layers.0", "Attention"),
            ("layers.1", "Attention"),
            ("layers.0", "Attention"),
        ]
        assert [source_line(node) for node in fused(gm)] == [sdpa_line()] * 3
        calls = [list(node.meta["nn_module_stack"].values())[-1][0] for node in fused(gm)]
        assert calls == ["layers.0", "layers.1", "layers.0@1"]
    assert module_path(fused(capture(model, (ids,)))[0])[0] == ("", "Stack")


def test_module_path_of_a_symbolic_traced_graph():
    gm = to_dialect(torch.fx.symbolic_trace(Traceable()), (torch.randn(2, 5, 16),))
    assert module_path(fused(gm)[0])[-1] == ("blocks.0", "MultiheadAttention")
    assert module_path(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)[-1])[
        -1
    ] == (
        "linear",
        "Linear",
    )


def test_source_line_of_torchs_own_attention_is_the_call_in_the_model():
    gm = capture(Traceable(), (torch.randn(2, 5, 16),))
    _, first = inspect.getsourcelines(Traceable.forward)
    assert source_line(fused(gm)[0]) == f"test_capture.py:{first + 1}"


def test_source_line_prefers_the_file_of_the_model_to_a_shared_helper():
    node = Node(torch.fx.Graph(), "n", "call_function", SDPA, (), {})
    node.meta["stack_trace"] = (
        '  File "/x/models/a/modeling_a.py", line 7, in forward\n  File "/x/helper.py", line 3, in f'
    )
    node.meta["nn_module_stack"] = {"k": ("attn", "x.models.a.modeling_a.Attention")}
    assert source_line(node) == "modeling_a.py:7"
    node.meta["nn_module_stack"] = {}
    assert source_line(node) == "helper.py:3"
    assert source_line(Node(torch.fx.Graph(), "n", "call_function", SDPA, (), {})) == ""


def test_two_models_in_one_compiled_function_have_different_paths():
    a, b, spy = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)), Spy()

    def both(a: nn.Module, b: nn.Module, x: Tensor) -> Tensor:
        return a(x) + b(x)

    torch.compile(both, backend=spy)(a, b, torch.randn(2, 4))
    linears = spy.graphs[0].graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [module_path(node)[-1][0] for node in linears] == ["a.0", "b.0"]


# --- regions, checkpoints, functions


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gain = self.gain * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.attention(x)
        return y.float() * gain


def test_autocast_region_is_in_line_in_both_doors():
    model, spy, x = Regions(), Spy(), torch.randn(2, 6, 16)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend=spy)(x), expected, rtol=0, atol=0)
    gm = capture(model, (x,))
    torch.testing.assert_close(gm(x), expected, rtol=0, atol=0)
    assert len(fused(gm)) == len(fused(spy.graphs[0])) == 1


def test_no_grad_region_of_a_compiled_model_still_stops_gradients():
    model, x = Regions(), torch.randn(2, 6, 16)
    torch.compile(model, backend=Spy())(x).sum().backward()
    assert model.gain.grad is None and model.attention.query.weight.grad is not None


def test_checkpointed_attention_comes_in_line_and_is_tagged_for_recomputation():
    attention, spy = Attention(), Spy()
    x = torch.randn(2, 6, 16, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return checkpoint(attention, x, use_reentrant=False) * 2

    expected = torch.autograd.grad(run(x).square().sum(), x)
    torch.testing.assert_close(
        torch.autograd.grad(torch.compile(run, backend=spy)(x).square().sum(), x), expected
    )
    gm = spy.graphs[0]
    assert len(fused(gm)) == 1 and "recompute" in fused(gm)[0].meta
    assert "recompute" not in gm.graph.output_node().all_input_nodes[0].meta


class Sevenfold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 7


@pytest.mark.parametrize("dynamic", [False, True])
def test_autograd_function_keeps_its_own_backward(dynamic):
    x = torch.randn(3, 4, requires_grad=True)
    torch.compile(Sevenfold.apply, backend=Spy(), dynamic=dynamic)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 7.0))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "both"])
def test_fused_inference_layer_is_spelled_out(norm_first, mask):
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, batch_first=True, norm_first=norm_first, activation="gelu"
    ).eval()
    x, spy = torch.randn(2, 5, 16), Spy()
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    keywords = {}
    if mask in ("causal", "both"):
        keywords["src_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if mask in ("padding", "both"):
        keywords["src_key_padding_mask"] = padding
    with torch.no_grad():
        actual, expected = torch.compile(layer, backend=spy)(x, **keywords), layer(x, **keywords)
    fast = [n for n in spy.given[0].graph.nodes if n.target is torch._transformer_encoder_layer_fwd]
    assert len(fast) == 1, "the fast path was not taken: this test checks nothing"
    assert len(fused(spy.graphs[0])) == 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_fast_path_switch_is_restored_when_capture_fails():
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no")

    for before in (True, False):
        torch.backends.mha.set_fastpath_enabled(before)
        try:
            with pytest.raises(CaptureError):
                capture(Fails(), (torch.randn(2),))
            assert torch.backends.mha.get_fastpath_enabled() is before
            with plain_attention():
                assert not torch.backends.mha.get_fastpath_enabled()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


# --- sizes and errors


def test_a_length_that_the_model_fixes_is_reported():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table

    info = capture(Positions(), (torch.randn(2, 6, 16),)).meta["capture"]
    assert info.dynamic == {"x": (0,)} and info.specialised == {"x": (1,)}


def test_static_capture_has_no_symbols():
    gm = capture(Stack(), (torch.randint(0, 10, (2, 6)),), dynamic=False)
    assert gm.meta["capture"].dynamic == {}
    assert not any(isinstance(s, torch.SymInt) for n in fused(gm) for s in n.meta["val"].shape)


def test_heads_and_features_stay_numbers_for_a_module_without_parameters():
    class Bare(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value)

    shape = fused(capture(Bare(), tuple(torch.randn(2, 3, 6, 8) for _ in range(3))))[0].meta["val"].shape
    assert [isinstance(size, int) for size in shape] == [False, True, False, True]


def test_a_graph_in_the_dialect_comes_back_as_it_is():
    gm = capture(Stack(), (torch.randint(0, 10, (2, 6)),))
    assert to_dialect(gm) is gm and capture(gm) is gm


@pytest.mark.parametrize(
    ("obj", "args", "words"),
    [
        (types.SimpleNamespace(), (), "SimpleNamespace"),
        (Stack(), (), "do not fit Stack.forward"),
        (Stack(), (torch.randn(2, 6),), "could not capture Stack"),
    ],
)
def test_what_cannot_be_captured_is_one_clear_error(obj, args, words):
    with pytest.raises(CaptureError, match=words):
        capture(obj, args)


def test_a_symbolic_traced_graph_without_inputs_says_what_to_pass():
    with pytest.raises(CaptureError, match="example_inputs"):
        to_dialect(torch.fx.symbolic_trace(Traceable()))
