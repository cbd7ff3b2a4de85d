"""`torch.compile(model, backend=Backend(...))`: what it computes, with whose parameters, what it refuses."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
import torch.nn.functional as F
from linearize.passes import lower_attention
from linearize.passes.capture import capture
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linearize.backend.backend import Backend, linearize_backend
from linearize.errors import ConfigError, LinearizeError, RefusedError, VerificationError
from linearize.planning.config import LinearizeConfig

SMALL = {"mechanism": "augmented_paper", "group_size": 4, "conv_taps": 3, "inner": "eager"}


class Attention(nn.Module):
    """LLaMA-like: grouped heads, causal, a cache that grows by concatenation."""

    def __init__(self, break_graph: bool = False) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.k_proj, self.v_proj = nn.Linear(16, 8), nn.Linear(16, 8)
        self.break_graph = break_graph

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if self.break_graph:
            torch._dynamo.graph_break()
        b, t, _ = x.shape
        query = self.q_proj(x).view(b, t, 2, 8).transpose(1, 2)
        key = self.k_proj(x).view(b, t, 1, 8).transpose(1, 2)
        value = self.v_proj(x).view(b, t, 1, 8).transpose(1, 2)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        s = key.shape[2]
        mask = torch.ones(t, s, dtype=torch.bool).tril(s - t) if t > 1 else None
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, 16)), (key, value)


class Decoder(nn.Module):
    def __init__(self, break_graph: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.layers = nn.ModuleList([Attention(break_graph), Attention(break_graph)])

    def forward(self, ids: Tensor, pasts: list | None = None) -> tuple[Tensor, list]:
        x, new = self.embedding(ids), []
        for i, layer in enumerate(self.layers):
            y, past = layer(x, None if pasts is None else pasts[i])
            x = x + y
            new.append(past)
        return x, new


class NanoGPT(nn.Module):
    """Eager attention with a packed projection and a buffer mask, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        query, key, value = (h.view(b, t, 2, 8).transpose(1, 2) for h in self.c_attn(x).split(16, dim=2))
        weights = query @ key.transpose(-2, -1) * 8**-0.5
        weights = weights.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf")).softmax(-1)
        return self.c_proj((weights @ value).transpose(1, 2).contiguous().view(b, t, c))


class Encoder(nn.Module):
    """BERT-like: bidirectional, padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        query, key, value = (
            f(x).view(b, t, 2, 8).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        mask = attention_mask[:, None, None, :].bool()
        return (
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            .transpose(1, 2)
            .reshape(b, t, 16)
        )


class TwoAttentionsOneRefused(nn.Module):
    """The second site's weights are an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.leaking = NanoGPT(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.plain(x)
        q = self.leaking(x)
        weights = (q @ q.transpose(1, 2)).softmax(-1)
        return weights @ q, weights


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 10, (batch, length))


def randomise(backend: Backend) -> None:
    with torch.no_grad():
        for parameter in backend.parameters():
            parameter.normal_()


# --- softmax is the identity


@pytest.mark.parametrize(("inner", "dynamic"), [("eager", True), ("aot_eager", False)])
def test_softmax_is_the_identity_forward_and_backward(inner, dynamic):
    model = NanoGPT()
    compiled = torch.compile(model, backend=Backend(mechanism="softmax", inner=inner), dynamic=dynamic)
    for shape in ((2, 6, 16), (3, 9, 16)):
        x = torch.randn(shape, requires_grad=True)
        leaves = [x, *model.parameters()]
        expected, actual = model(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
        )


def test_softmax_reports_what_it_found():
    backend = Backend(mechanism="softmax", inner="eager")
    torch.compile(NanoGPT(), backend=backend)(torch.randn(2, 6, 16))
    (row,) = backend.report.rows
    assert (row.verdict, row.mask, row.becomes) == ("rewrite", "causal", "softmax, exact")
    assert not list(backend.parameters())


# --- the linear graph is the same rewrite as that of an exported graph


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_rewrite_equals_the_rewrite_of_the_exported_graph(dynamic):
    model = NanoGPT()
    backend = Backend(**SMALL)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    compiled(torch.randn(2, 6, 16))
    randomise(backend)
    (module,) = backend.modules().values()
    lowered = lower_attention(capture(model, (torch.randn(2, 6, 16),)), lambda site: module)
    for shape in ((2, 6, 16), (3, 9, 16), (2, 11, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), lowered(x))
        assert not torch.allclose(compiled(x), model(x), atol=1e-2)  # it is not softmax any more
    assert len(list(backend.parameters())) == 3


def test_padding_reaches_the_attention_module():
    model, backend = Encoder(), Backend(**SMALL)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(1, 7, 16)
    compiled(x, torch.ones(1, 7, dtype=torch.long))
    randomise(backend)
    padded = torch.cat([torch.randn(1, 3, 16), x], 1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    torch.testing.assert_close(compiled(padded, mask)[:, 3:], compiled(x, torch.ones(1, 7, dtype=torch.long)))


# --- training


@pytest.mark.parametrize(("inner", "dynamic"), [("eager", False), ("aot_eager", True)])
def test_gradients_reach_the_new_parameters_and_the_models(inner, dynamic):
    model, backend = Decoder(), Backend(**{**SMALL, "inner": inner})
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    compiled(ids(2, 6))
    names = sorted(name for name, _ in backend.named_parameters())
    parts = ("alpha", "conv_weight", "local_scale")
    assert names == [f"layers.{i}.linear_attention.{part}" for i in range(2) for part in parts]
    before = [p.detach().clone() for p in backend.parameters()]
    optimizer = torch.optim.SGD([*model.parameters(), *backend.parameters()], lr=0.1)
    loss = compiled(ids(2, 9))[0].square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backend.parameters())
    assert model.layers[0].q_proj.weight.grad is not None
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, backend.parameters(), strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_new_shape_reuses_the_parameters(dynamic):
    backend = Backend(**SMALL)
    compiled = torch.compile(Decoder(), backend=backend, dynamic=dynamic)
    compiled(ids(2, 6))
    first = [id(p) for p in backend.parameters()]
    for length in (9, 7, 13):
        compiled(ids(3, length))
    assert [id(p) for p in backend.parameters()] == first


def test_gradient_checkpointing_trains_the_new_parameters():
    layer, backend = NanoGPT(), Backend(**{**SMALL, "inner": "aot_eager"})
    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend=backend)
    compiled(torch.randn(2, 6, 16)).square().sum().backward()
    assert len(list(backend.parameters())) == 3
    assert all(p.grad is not None for p in backend.parameters())


@pytest.mark.slow
def test_inductor_compiles_the_rewritten_graph():
    x = torch.randn(2, 6, 16)
    outputs, gradients, model = [], [], NanoGPT()
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        backend = Backend(**{**SMALL, "inner": inner})
        outputs.append(torch.compile(model, backend=backend)(x))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad for p in backend.parameters()])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


# --- whose parameters


def test_layers_that_share_one_compiled_graph_after_a_break_have_their_own_parameters():
    model, backend = Decoder(break_graph=True), Backend(**SMALL)
    compiled = torch.compile(model, backend=backend)
    tokens = ids(2, 6)
    compiled(tokens)
    assert len(backend.modules()) == 2  # one graph, two layers
    randomise(backend)
    unbroken = Decoder()
    unbroken.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    whole = Backend(**SMALL)
    reference = torch.compile(unbroken, backend=whole)
    reference(tokens)
    with torch.no_grad():
        for p, q in zip(whole.parameters(), backend.parameters(), strict=True):
            p.copy_(q)
    expected = reference(tokens)[0]
    torch.testing.assert_close(compiled(tokens)[0], expected)


def test_an_owner_is_known_again_when_dynamo_starts_a_graph_elsewhere():
    whole, broken, tokens = Decoder(), Decoder(break_graph=True), ids(2, 6)
    backend = Backend(**SMALL)
    compiled = torch.compile(whole, backend=backend)
    compiled(tokens)
    randomise(backend)
    expected = compiled(tokens)[0]
    torch.compile(broken, backend=Backend(**SMALL))(
        tokens
    )  # from here on dynamo compiles the layers by themselves
    torch.testing.assert_close(compiled(tokens)[0], expected)
    assert len(backend.modules()) == 2


def test_layers_that_tie_a_weight_have_their_own_parameters():
    model, backend = Decoder(break_graph=True), Backend(**SMALL)
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    torch.compile(model, backend=backend)(ids(2, 6))
    assert len(backend.modules()) == 2


def test_two_models_of_one_class_do_not_share_parameters():
    backend = Backend(**SMALL)
    a, b = NanoGPT(), NanoGPT()
    x = torch.randn(2, 6, 16)
    torch.compile(a, backend=backend)(x), torch.compile(b, backend=backend)(x)
    assert len(backend.modules()) == 2


def test_parameters_survive_replacing_the_models_weights():
    model, backend = NanoGPT(), Backend(**SMALL)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 6, 16)
    compiled(x)
    first = [id(p) for p in backend.parameters()]
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    torch._dynamo.reset()  # its graphs keep the old weights alive
    gc.collect()
    compiled(x)
    assert [id(p) for p in backend.parameters()] == first


def test_state_dict_round_trip_before_the_first_call():
    model, backend, x = NanoGPT(), Backend(**SMALL), torch.randn(2, 6, 16)
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    randomise(backend)
    expected = compiled(x)
    torch._dynamo.reset()
    other = Backend(**SMALL)
    other.load_state_dict(backend.state_dict())
    assert other.state_dict().keys() == backend.state_dict().keys()
    torch.testing.assert_close(torch.compile(model, backend=other)(x), expected, rtol=0, atol=0)


# --- decoding with a cache


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_cached_decoding_equals_the_whole_sequence(dynamic):
    model, backend, tokens = Decoder(), Backend(**SMALL), ids(2, 12)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        compiled(tokens[:, :5])
        randomise(backend)
        whole, _ = compiled(tokens)
        out, past = compiled(tokens[:, :5])
        pieces = [out]
        for start, stop in ((5, 8), (8, 9), (9, 10), (10, 12)):
            out, past = compiled(tokens[:, start:stop], past)
            pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    assert len(backend.modules()) == 2


WINDOWED = {**SMALL, "mechanism": "augmented", "options": {"window": 6, "sinks": 2, "salient": 0}}


@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
def test_augmented_without_salient_tokens_decodes_as_the_whole_sequence(dynamic):
    model, backend, tokens = Decoder(), Backend(**WINDOWED), ids(2, 90)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        compiled(tokens[:, :5])
        randomise(backend)
        whole, _ = compiled(tokens)
        out, past = compiled(tokens[:, :40] if dynamic else tokens[:, :86])
        pieces = [out]
        # A mask of fixed sizes this large is not read as causal.
        several = ((40, 70), (70, 86)) if dynamic else ()
        for start, stop in (*several, (86, 87), (87, 88), (88, 89), (89, 90)):
            out, past = compiled(tokens[:, start:stop], past)
            pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    exact, _ = model(tokens)
    assert not torch.allclose(exact, whole, atol=1e-2)


def test_augmented_trains_and_decodes_while_it_sees_all_tokens_and_not_one_longer():
    options = {"window": 6, "sinks": 2, "salient": 4, "tail": False}
    model, backend = Decoder(), Backend(**{**WINDOWED, "options": options})
    compiled, tokens = torch.compile(model, backend=backend), ids(2, 20)
    out, _ = compiled(tokens)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backend.parameters())
    with torch.no_grad():
        whole, _ = model(tokens)  # the convolution is zero still
        out, past = compiled(tokens[:, :9])
        for at in range(9, 13):
            torch.testing.assert_close(out[:, -1], whole[:, at - 1], rtol=1e-5, atol=1e-5)
            out, past = compiled(tokens[:, at : at + 1], past)
        torch.testing.assert_close(out[:, -1], whole[:, 12], rtol=1e-5, atol=1e-5)
        with pytest.raises(Exception, match="tokens are chosen by the queries of all of them"):
            compiled(tokens[:, 13:14], past)


def test_one_query_of_real_cross_attention_is_not_taken_for_decoding():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.kv_proj = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            query = self.q_proj(x).unflatten(-1, (2, 8)).transpose(1, 2)
            key = self.kv_proj(memory).unflatten(-1, (2, 8)).transpose(1, 2)
            return F.scaled_dot_product_attention(query, key, key)

    backend = Backend(**SMALL)
    compiled = torch.compile(Cross(), backend=backend, dynamic=False)
    compiled(torch.randn(2, 1, 16), torch.randn(2, 7, 16))
    compiled(torch.randn(2, 3, 16), torch.randn(2, 7, 16))
    (module,) = backend.modules().values()
    assert module.spec.cross and not module.spec.causal


def test_an_owner_is_never_linear_in_one_graph_and_softmax_in_another():
    class Changing(NanoGPT):
        leak = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.leak:
                return super().forward(x)
            q, k, v = self.c_attn(x).split(16, dim=2)
            weights = (q @ k.transpose(1, 2)).softmax(-1)
            return weights @ v + weights.sum()

    model = Changing()
    compiled = torch.compile(model, backend=Backend(**SMALL))
    compiled(torch.randn(2, 6, 16))
    model.leak = True
    with pytest.raises(Exception, match="rewritten in an earlier graph") as caught:
        compiled(torch.randn(2, 6, 16))
    assert isinstance(caught.value, RefusedError) or "RefusedError" in str(caught.value)


# --- what is refused, kept, wrong


class Masked(nn.Module):
    """Causal attention with an optional window, scale, mask in a buffer and documents."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.window, self.scale = None, 8**-0.5
        self.register_buffer("keep", torch.ones(64, 64, dtype=torch.bool).tril())

    def forward(self, x: Tensor, documents: Tensor | None = None, pad: Tensor | None = None) -> Tensor:
        b, t, _ = x.shape
        query, key, value = self.qkv(x).view(b, t, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.keep[:t, :t][None, None]
        if self.window is not None:
            mask = mask & ~mask.tril(-self.window)
        if documents is not None:
            mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
        if pad is not None:
            mask = mask & pad[:, None, None, :]
        scores = (query @ key.mT * self.scale).masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2).reshape(b, t, 16)


def _window(model: Masked) -> None:
    model.window = 3


def _scale(model: Masked) -> None:
    model.scale = 2.0


def _buffer(model: Masked) -> None:
    model.keep &= ~model.keep.tril(-3)


@pytest.mark.parametrize("change", [_window, _scale, _buffer])
def test_a_graph_that_means_something_else_than_the_first_is_refused(change):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Masked().eval()
    backend = Backend({"mechanism": "softmax_window", "options": {"window": 64}}, inner="eager")
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 10, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
        change(model)
        with pytest.raises(VerificationError, match="not what the module in its place was made for"):
            compiled(x)


def test_the_first_inputs_of_a_graph_decide_whether_its_mask_was_read_rightly():
    torch.manual_seed(0)
    model = Masked().eval()
    x, pad = torch.randn(2, 10, 16), torch.ones(2, 10, dtype=torch.bool)
    pad[0, 6:] = False
    documents = (torch.arange(10) >= 6).long().expand(2, -1)
    for given, real in ((dict(pad=pad), pad), (dict(documents=documents), torch.ones_like(pad))):
        torch._dynamo.reset()
        backend = Backend({"mechanism": "softmax_window", "options": {"window": 64}}, inner="eager")
        compiled = torch.compile(model, backend=backend)
        with torch.no_grad():
            try:
                found = compiled(x, **given)
            except LinearizeError:
                continue
            torch.testing.assert_close(found[real], model(x, **given)[real], atol=1e-5, rtol=1e-4)


def test_what_cannot_be_rewritten_stays_softmax_and_is_reported(caplog):
    model, backend = TwoAttentionsOneRefused(), Backend(**SMALL)
    compiled = torch.compile(model, backend=backend)
    with caplog.at_level(logging.WARNING, logger="linearize.backend.backend"):
        compiled(torch.randn(2, 6, 16))
    verdicts = {row.path: (row.verdict, row.reason) for row in backend.report.rows}
    assert verdicts["plain"] == ("rewrite", "")
    assert verdicts[""] == ("refused", "weights-escape")
    assert "left as softmax" in caplog.text


def test_on_refusal_error_stops_the_compilation():
    backend = Backend(
        LinearizeConfig(mechanism="augmented_paper", group_size=4, on_refusal="error"), inner="eager"
    )
    with pytest.raises(Exception, match="cannot be rewritten"):
        torch.compile(TwoAttentionsOneRefused(), backend=backend)(torch.randn(2, 6, 16))


def test_keep_softmax_leaves_a_layer_alone():
    model, backend = Decoder(), Backend(keep_softmax=(1,), **SMALL)
    torch.compile(model, backend=backend)(ids(2, 6))
    assert list(backend.modules()) == ["layers.0.linear_attention"]
    assert [row.verdict for row in backend.report.rows] == ["rewrite", "keep"]


def test_a_layer_has_its_own_options():
    model, backend = (
        Decoder(),
        Backend(
            options={"window": 0, "sinks": 1, "salient": 0}, layer_options={1: {"sinks": 64}}, inner="eager"
        ),
    )
    x = ids(2, 40)
    hidden = model.embedding(x) + model.layers[0](model.embedding(x))[0]
    exact = (hidden + model.layers[1](hidden)[0], model(x)[0])
    torch.testing.assert_close(exact[0], exact[1])
    found = torch.compile(model, backend=backend)(x)[0]
    assert (found - exact[1]).abs().max() > 1e-3, "the first layer forgets"
    alike = torch.compile(
        model, backend=Backend(options={"sinks": 64}, layer_options={0: {"window": 64}}, inner="eager")
    )
    torch.testing.assert_close(alike(x)[0], exact[1])


class Padded(Attention):
    """Every query sees every key that is real; the others have the smallest number added."""

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        b, t, _ = x.shape
        query = self.q_proj(x).view(b, t, 2, 8).transpose(1, 2)
        key, value = (p(x).view(b, t, 1, 8).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        added = (~real)[:, None, None].to(x.dtype) * torch.finfo(x.dtype).min
        weights = (query @ key.expand(-1, 2, -1, -1).mT * 8**-0.5 + added).softmax(-1)
        return self.o_proj((weights @ value.expand(-1, 2, -1, -1)).transpose(1, 2).reshape(b, t, 16))


def test_an_added_mask_hides_the_keys_that_it_hid():
    model, x, real = Padded(), torch.randn(2, 12, 16), torch.ones(2, 12, dtype=torch.bool)
    real[1, 8:] = False
    backend = Backend(options={"window": 64}, inner="eager")
    found, wanted = torch.compile(model, backend=backend)(x, real), model(x, real)
    assert [row.verdict for row in backend.report.rows] == ["rewrite"]
    torch.testing.assert_close(found[real], wanted[real])


def test_a_graph_without_attention_is_compiled_as_it_is():
    backend = Backend(**SMALL)
    x = torch.randn(2, 4)
    model = nn.Linear(4, 4)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert backend.report.rows == () and backend.notes == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"group_sise": 4}, "group_size"),
        ({"mechanism": "nothing"}, "augmented_paper"),
        ({"inner": "nothing"}, "no dynamo backend"),
        ({"inner": "linearize"}, "inner="),
    ],
)
def test_wrong_options_are_config_errors(settings, words):
    with pytest.raises(ConfigError, match=words):
        Backend(**settings)


# --- the registered name


def test_options_hold_the_backend_and_its_parameters():
    options = {"group_size": 4, "conv_taps": 3, "inner": "eager"}
    compiled = torch.compile(NanoGPT(), backend=linearize_backend, options=options)
    for length in (6, 9):
        compiled(torch.randn(2, length, 16)).square().sum().backward()
    assert options["backend"].report.summary.endswith("1 candidate, 1 rewrite")
    assert all(p.grad is not None for p in options["backend"].parameters())
    assert len(options["backend"].modules()) == 1


def test_without_options_the_new_parameters_are_constants():
    backend = Backend(trainable=False, **SMALL)
    torch.compile(NanoGPT(), backend=backend)(torch.randn(2, 6, 16)).sum().backward()
    assert all(not p.requires_grad for p in backend.parameters())


def test_unknown_options_and_modes_are_errors():
    x = torch.randn(2, 6, 16)
    with pytest.raises(Exception, match="group_size"):
        torch.compile(NanoGPT(), backend=linearize_backend, options={"group_sise": 4})(x)
    with pytest.raises(Exception, match="has no mode"):
        torch.compile(NanoGPT(), backend=linearize_backend, mode="max-autotune")(x)


def test_the_installed_entry_point_is_this_backend():
    from importlib.metadata import entry_points

    found = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "linearize"]
    if not found:
        pytest.skip("the package is not installed, only on the path")
    assert found[0].load() is linearize_backend
    compiled = torch.compile(
        NanoGPT(), backend="linearize", options={"mechanism": "softmax", "inner": "eager"}
    )
    compiled(torch.randn(2, 6, 16))
