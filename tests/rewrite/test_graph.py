"""The graft: owners that do not dispatch run a graph of themselves; their children stay real."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from live_models import VOCAB, EagerAttention, activations, converted, plain, tokens
from torch import Tensor, nn

from linearize.convert.linearize import linearize
from linearize.errors import VerificationError
from linearize.mechanisms.module import AttentionModule


def routes(model: Any) -> set[str]:
    return {site.route for site in model._linearize.plan.sites}


def children(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if isinstance(child, AttentionModule)]


class TwoAttentions(nn.Module):
    """Two attentions in one forward, as differential attention has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 96), nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        total = x
        for projection in (self.first, self.second):
            query, key, value = projection(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            weights = (query @ key.mT * 8**-0.5).softmax(-1)
            total = total + (weights @ value).transpose(1, 2).reshape(batch, length, 32)
        return total


class WithLengths(nn.Module):
    """Bidirectional attention with a key mask, a dict argument and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, extra: dict[str, Tensor], double: bool = False) -> dict[str, Tensor]:
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.mT * 8**-0.5
        scores = scores.masked_fill(~extra["keep"][:, None, None, :], float("-inf"))
        out = self.out((scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, 32))
        return {"out": out * 2 if double else out}


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = WithLengths()

    def forward(self, x: Tensor, keep: Tensor, double: bool = False) -> Tensor:
        return self.inner(x, {"keep": keep}, double=double)["out"]


def test_children_are_called_as_they_are_at_call_time() -> None:
    model: Any = converted("plain")
    x = activations()
    before = model(x)
    owner = model.blocks[0]
    calls: list[str] = []
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "drop"):
        getattr(owner, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    assert torch.equal(model(x), before)
    assert sorted(calls) == ["drop", "k_proj", "o_proj", "q_proj", "v_proj"]
    owner.q_proj = nn.Sequential(owner.q_proj, nn.Tanh())
    assert not torch.equal(model(x), before)


def test_changed_weights_are_the_ones_used() -> None:
    model: Any = converted("plain")
    x = activations()
    before = model(x)
    with torch.no_grad():
        model.blocks[1].v_proj.weight.mul_(2)
    assert not torch.equal(model(x), before)
    model.blocks[1].v_proj.weight = nn.Parameter(model.blocks[1].v_proj.weight / 2)
    torch.testing.assert_close(model(x), before)


def test_copies_do_not_share_graphs_or_weights() -> None:
    model: Any = converted("plain")
    model(activations())
    twin = copy.deepcopy(model)
    assert model.blocks[0]._linearize_owner.graphs and not twin.blocks[0]._linearize_owner.graphs
    twin.blocks[0].q_proj.weight.data.zero_()
    assert not torch.equal(twin(activations()), model(activations()))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 32, 33])
def test_every_length_works_and_the_past_does_not_see_the_future(length: int) -> None:
    model = converted("plain")
    x = activations(2, 33)
    torch.testing.assert_close(model(x[:, :length]), model(x)[:, :length], atol=1e-5, rtol=1e-4)
    assert model(x[:1, :length]).shape == (1, length, 32)


def test_two_attentions_in_one_forward_get_a_module_each() -> None:
    torch.manual_seed(0)
    model = linearize(TwoAttentions().eval(), activations(), mechanism="augmented_paper", group_size=4)
    assert children(model) == ["linear_attention", "linear_attention_1"] and routes(model) == {"graph"}
    x = activations(3, 9)
    before = model(x)
    with torch.no_grad():
        model.linear_attention_1.alpha.fill_(2.0)  # type: ignore[union-attr, operator]
    assert not torch.equal(model(x), before)


def test_padding_and_flags_reach_a_grafted_owner() -> None:
    torch.manual_seed(0)
    keep = torch.ones(2, 11, dtype=torch.bool)
    keep[0, -4:] = False
    model = linearize(
        Outer().eval(), {"x": activations(2, 11), "keep": keep}, mechanism="augmented_paper", group_size=4
    )
    x = activations(2, 11)
    padded = model(x, keep)
    torch.testing.assert_close(padded[:1, :-4], model(x[:1, :-4], keep[:1, :-4]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(x, keep, double=True), 2 * padded)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_torch_transformer_encoder_is_rewritten_and_not_bypassed(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=batch_first)
    original = nn.TransformerEncoder(layer, 2).eval()
    exact = linearize(copy.deepcopy(original), activations(), mechanism="softmax")
    x = activations(3, 9)
    with torch.no_grad():  # where PyTorch would take its fused path
        torch.testing.assert_close(exact(x), original(x), atol=1e-5, rtol=1e-4)
        model = linearize(copy.deepcopy(original), activations(), mechanism="augmented_paper")
        assert (model(x) - original(x)).abs().max() > 1e-3


def test_a_multihead_attention_without_weights_is_rewritten() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]  # the weights are computed, averaged, and thrown away

    torch.manual_seed(0)
    model = linearize(Model().eval(), activations(), mechanism="softmax")
    plain_one = Model().eval()
    plain_one.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(activations(3, 8)), plain_one(activations(3, 8)), atol=1e-5, rtol=1e-4)


def test_an_owner_whose_graph_cannot_be_made_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no graph today")

    monkeypatch.setattr("linearize.rewrite.graph.calls.trace", fail)
    model = plain()
    with pytest.raises(VerificationError, match="blocks.0.*no graph today"):
        linearize(model, activations())
    assert type(model.blocks[0]) is EagerAttention and not children(model.blocks[0])


# --- heads and a batch of one


class Merged(nn.Module):
    """Attention on one axis of batch and heads, with a bias of its own for each, as Bloom has it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.slopes = nn.Linear(32, 96), nn.Buffer(torch.tensor([0.5, 0.25, 0.125, 0.0625]))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        query, key, value = (part.reshape(batch * 4, length, 8) for part in parts)
        positions = torch.arange(length)[None, None, :].expand(batch, 1, -1)
        bias = (self.slopes[None, :, None, None] * positions[:, None]).reshape(batch * 4, 1, length)
        scores = torch.baddbmm(bias, query, key.mT, alpha=8**-0.5).view(batch, 4, length, length)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1).view(batch * 4, length, length)
        return torch.bmm(weights, value).view(batch, 4, length, 8).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("mechanism", ("softmax", "softmax_window"))
@pytest.mark.parametrize("copied", (True, False))
def test_one_sequence_is_told_from_heads_in_a_copy_too(copied, mechanism):
    """A copy has no graph yet that was traced for several sequences."""
    torch.manual_seed(0)
    original = Merged().eval()
    model = linearize(copy.deepcopy(original), activations(2, 9), mechanism=mechanism, approximate=("alibi",))
    model = copy.deepcopy(model) if copied else model
    if mechanism != "softmax":
        original.slopes.zero_()  # what was dropped
    for batch, length in ((1, 9), (1, 12), (3, 7)):
        x = activations(batch, length)
        with torch.no_grad():
            torch.testing.assert_close(model(x), original(x), rtol=0, atol=2e-6)


def test_a_mask_cut_out_of_a_buffer_by_the_length_of_the_cache_generates_exactly() -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=48, window_size=4,
        attention_types=[[["local"], 1]], max_position_embeddings=32, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    original = transformers.GPTNeoForCausalLM(config).eval()
    model = linearize(copy.deepcopy(original), mechanism="softmax")
    how: dict[str, Any] = dict(max_new_tokens=3, do_sample=False, eos_token_id=None)
    for prompt in (tokens(2, 9), tokens(1, 1)):
        wanted = original.generate(prompt, **how)
        for cached in (True, False):
            assert torch.equal(model.generate(prompt, use_cache=cached, **how), wanted)
