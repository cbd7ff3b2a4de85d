"""A refusal is short, says all that is missing, and what it advises is not refused in turn."""

from __future__ import annotations

import ast
import copy
import dataclasses
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from live_models import VOCAB, activations, tokens
from torch import Tensor, nn

from linearize.convert.inspect import inspect
from linearize.convert.linearize import linearize
from linearize.errors import RefusedError

SCALE = 8**-0.5


class Attention(nn.Module):
    """Causal attention; `change` makes of the scores [B, H, T, T] what a linear form cannot carry."""

    def __init__(self, change: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.qkv, self.change = nn.Linear(32, 96), change
        self.slopes = nn.Buffer(torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(4, 1, 1))
        self.table, self.sink = nn.Parameter(torch.randn(4, 32, 32)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        query, key, value = self.qkv(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT * SCALE
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (self.change or (lambda own, s: s))(self, scores).masked_fill(future, -torch.inf)
        return (self.weights(scores) @ value).transpose(1, 2).reshape(batch, length, size)

    def weights(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)


class Sinks(Attention):
    def weights(self, scores: Tensor) -> Tensor:
        column = self.sink.view(1, 4, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


class TopLeft(nn.Module):
    """Query i sees keys 0 to i of another, longer sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(32, 32), nn.Linear(32, 64)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        query = self.q(x).view(*x.shape[:2], 4, 8).transpose(1, 2)
        key, value = self.kv(y).view(*y.shape[:2], 2, 4, 8).permute(2, 0, 3, 1, 4)
        seen = torch.ones(x.shape[1], y.shape[1], dtype=torch.bool).tril()
        weights = (query @ key.mT * SCALE).masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).flatten(2)


class Cross(TopLeft):
    """Attention of its own, then to all of another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Attention()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.own(x)
        query = self.q(x).view(*x.shape[:2], 4, 8).transpose(1, 2)
        key, value = self.kv(y).view(*y.shape[:2], 2, 4, 8).permute(2, 0, 3, 1, 4)
        return ((query @ key.mT * SCALE).softmax(-1) @ value).transpose(1, 2).flatten(2)


def distances(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[-1]) - torch.arange(scores.shape[-2])[:, None]


def window(own: Any, scores: Tensor) -> Tensor:
    return scores.masked_fill(distances(scores) <= -4, -torch.inf)


def alibi(own: Any, scores: Tensor) -> Tensor:
    return scores + own.slopes * distances(scores)


def positions(own: Any, scores: Tensor) -> Tensor:
    """As Bloom writes it: the position of the key in place of the distance."""
    return scores + own.slopes * torch.arange(scores.shape[-1])


def rounded(own: Any, scores: Tensor) -> Tensor:
    """No ALiBi: far keys are all as far."""
    return scores + own.slopes * distances(scores).clamp(min=-6)


def table(own: Any, scores: Tensor) -> Tensor:
    return scores + own.table[:, : scores.shape[-2], : scores.shape[-1]]


def softcap(own: Any, scores: Tensor) -> Tensor:
    return 5 * torch.tanh(scores / 5)


@cache
def gpt_neo() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, window_size=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config).eval()


def mistral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, sliding_window=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config).eval()


def stack(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts)


X, Y = activations(2, 9), activations(2, 12)
PAPER = {"mechanism": "augmented_paper"}
"""It carries neither window nor softcap."""
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], set[str]]] = {
    # What is refused, on which inputs, by which settings, and what helps.
    "window": (lambda: Attention(window), X, PAPER, {"mechanism"}),
    "alibi": (lambda: Attention(alibi), X, {}, {"approximate"}),
    "bias": (lambda: Attention(table), X, {}, {"approximate"}),
    "softcap": (lambda: Attention(softcap), X, PAPER, {"approximate"}),
    "sinks-softcap": (lambda: Sinks(softcap), X, PAPER, {"approximate"}),
    "one-dropped-already": (
        lambda: Sinks(softcap), X, dict(approximate=("softcap",), **PAPER), {"approximate"},
    ),
    "another-in-each": (
        lambda: stack(Attention(table), Sinks()), X, {}, {"approximate"},
    ),
    "one-of-two": (
        lambda: stack(Attention(), Attention(alibi)), X, {}, {"approximate", "on_refusal"},
    ),
    "nothing-else": (
        lambda: Attention(alibi), X, dict(on_refusal="keep"), {"approximate"},
    ),
    "top-left": (TopLeft, (X, Y), {}, {"mechanism"}),
    "cross": (Cross, (X, Y), dict(mechanism="softmax_window"), {"on_refusal"}),
    "dispatched-window": (mistral, dict(input_ids=tokens(2, 9)), PAPER, {"approximate"}),
    "window-on-a-graph-dropped": (
        gpt_neo, dict(input_ids=tokens(2, 9)), dict(approximate=("window",), **PAPER), {"keep_softmax"},
    ),
}  # fmt: skip


def advice(message: str) -> list[dict[str, Any]]:
    """The settings that a refusal names."""
    found = re.findall(r"(approximate|keep_softmax|on_refusal|mechanism)=(\([^)]*\)|'\w+')", message)
    return [{name: ast.literal_eval(value)} for name, value in found]


@pytest.mark.parametrize("name", CASES)
def test_the_advice_of_a_refusal_works(name):
    make, inputs, settings, helps = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    with pytest.raises(RefusedError) as refused:
        linearize(copy.deepcopy(model), inputs, **settings)
    message = str(refused.value)
    assert len(message) <= 600
    assert {key for change in advice(message) for key in change} == helps
    assert message.endswith(refused.value.advice) and len(refused.value.advice) > 10
    if "keep_softmax" not in helps:  # which a conversion says after it was tried
        shown = inspect(model, inputs, settings)
        assert shown.advice == refused.value.advice and shown.advice in " ".join(shown.to_text(300).split())
    for change in advice(message):
        linearize(copy.deepcopy(model), inputs, **{**settings, **change})


def test_a_refusal_of_many_layers_is_short():
    torch.manual_seed(0)
    model = stack(*(Attention(f) for f in (alibi, table, softcap) for _ in range(4))).eval()
    with pytest.raises(RefusedError) as refused:
        linearize(model, X, **PAPER)
    message = str(refused.value)
    assert "12 attention site(s)" in message and "and 3 more [" in message and len(message) <= 600


def test_a_softcap_is_carried():
    """The capped attention while all tokens fit, and another without the cap."""
    torch.manual_seed(0)
    model = Attention(softcap).eval()
    ours = linearize(copy.deepcopy(model), X)
    with torch.no_grad():
        torch.testing.assert_close(ours(30 * X), model(30 * X), rtol=1e-5, atol=1e-5)
        ours.linear_attention.spec = dataclasses.replace(ours.linear_attention.spec, softcap=None)
        assert (ours(30 * X) - model(30 * X)).abs().max() > 0.1


@pytest.mark.parametrize(
    "change, name",
    ((alibi, "alibi"), (positions, "alibi"), (rounded, "bias"), (table, "bias")),
)
def test_alibi_has_a_name_of_its_own(change, name):
    torch.manual_seed(0)
    with pytest.raises(RefusedError, match=f"cannot carry {name}"):
        linearize(Attention(change).eval(), X)
    torch.manual_seed(0)
    model = linearize(Attention(change).eval(), X, approximate=(name,), mechanism="softmax_window")
    torch.manual_seed(0)
    plain = Attention().eval()
    with torch.no_grad():
        torch.testing.assert_close(model(X), plain(X), rtol=0, atol=1e-5)


def test_a_bias_that_may_be_dropped_may_be_alibi():
    linearize(Attention(alibi).eval(), X, approximate=("bias",))
