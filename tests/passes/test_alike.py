"""Blocks that are alike are traced twice; what is said of the others is what tracing each of them says."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from linearize.passes import MatchReport, capture, find_attention
from linearize.passes.alike import find_alike, unknown
from torch import Tensor, nn

DEPTH = 4


class Block(nn.Module):
    """Attention with a number, a config and what a test adds; `mask(block, hidden)` says what is seen."""

    def __init__(self, number: int, mask: Callable[[Any, Tensor], Tensor | None], config: Any = None) -> None:
        super().__init__()
        self.number, self.mask, self.config = number, mask, config
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.scale = 0.5

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT * self.scale
        seen = self.mask(self, x) if seen is None else seen
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Blocks one after the other; `between(self, x)` happens before each and gives what it is called with."""

    def __init__(self, mask: Any, between: Any = None, edit: Any = None, config: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(i, mask, config) for i in range(DEPTH))
        self.between, self.config = between, config
        if edit is not None:
            edit(self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(*(self.between(self, x) if self.between is not None else (x,)))
        return x


class Told(Stack):
    """Each block is called with its mask: the last one with a narrower one."""

    def forward(self, x: Tensor) -> Tensor:
        wide, narrow = causal(None, x), windowed(None, x, 3)
        for block in self.blocks:
            x = block(x, wide if block.number < DEPTH - 1 else narrow)
        return x


def steps(x: Tensor) -> tuple[Tensor, Tensor]:
    places = torch.arange(x.shape[1], device=x.device)
    return places[:, None], places[None, :]


def causal(block: Any, x: Tensor) -> Tensor:
    i, j = steps(x)
    return j <= i


def windowed(block: Any, x: Tensor, width: int) -> Tensor:
    i, j = steps(x)
    return (j <= i) & (j > i - width)


def facts(report: MatchReport) -> list[Any]:
    sites = [
        (s.path, s.ordinal, s.call, s.owner_type, s.mask, s.scale, s.softcap, s.spelling, s.source, s.kv_map)
        + (len(s.program), s.dropout, s.causal, s.cross, s.shapes["H"], s.shapes["D"])
        for s in report.sites
    ]
    return sites + [(r.path, r.reason, r.message) for r in report.refusals]


def both(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[MatchReport | None, MatchReport]:
    with torch.no_grad():
        return find_alike(model, args, kwargs), find_attention(capture(model.eval(), args, kwargs))


X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


def test_of_blocks_that_are_alike_two_are_traced() -> None:
    found, wanted = both(Stack(causal), X)
    assert found is not None and facts(found) == facts(wanted) and len(found.sites) == DEPTH
    softmax = [n for n in found.graph_module.graph.nodes if "softmax" in str(n.target)]
    assert len(softmax) == 2


def by_number(block: Any, x: Tensor) -> Tensor:
    return causal(block, x) if block.number < 3 else windowed(block, x, 3)


def by_default(block: Any, x: Tensor) -> Tensor:
    return windowed(block, x, 3) if getattr(block, "wide", None) is None else causal(block, x)


def by_dict(block: Any, x: Tensor) -> Tensor:
    return windowed(block, x, 2 + vars(block)["number"])


def by_config(block: Any, x: Tensor) -> Tensor:
    return windowed(block, x, block.config.width)


def by_buffer(block: Any, x: Tensor) -> Tensor:
    return block.table[: x.shape[1], : x.shape[1]]


def by_hidden(block: Any, x: Tensor) -> Tensor:
    return (x[..., 0] > 0)[:, None, None, :]


def by_constant(block: Any, x: Tensor) -> Tensor:
    i, j = steps(x)
    return (j <= i) & (j > i - block.limits["width"][0])


def with_tables(blocks: Any) -> None:
    for block in blocks:
        full = torch.ones(9, 9, dtype=torch.bool).tril()
        block.register_buffer("table", full.triu(-2) if block.number == 3 else full)


def with_frozen_tables(blocks: Any) -> None:
    for block in blocks:
        full = torch.ones(9, 9, dtype=torch.bool).tril()
        block.table = nn.Parameter(full.triu(-2) if block.number == 3 else full, requires_grad=False)


def with_limits(blocks: Any) -> None:
    for block in blocks:
        block.limits = {"width": [4 if block.number < 3 else 2]}


def with_scales(blocks: Any) -> None:
    for block in blocks:
        block.scale = nn.Parameter(torch.tensor(0.5 if block.number < 3 else 0.25), requires_grad=False)


def with_one_hook(blocks: Any) -> None:
    blocks[3].register_forward_pre_hook(lambda block, args: (args[0].flip(1),))


def with_one_forward(blocks: Any) -> None:
    block = blocks[3]
    block.forward = lambda x: x + block.out(x)


def config_moves_on(stack: Any, x: Tensor) -> tuple[Tensor]:
    stack.config.width = stack.config.width + 1
    return (x,)


DIFFERENT: dict[str, Callable[[], nn.Module]] = {
    "a number that is read": lambda: Stack(by_number),
    "a number read from the dict": lambda: Stack(by_dict),
    "an attribute that one lacks": lambda: Stack(by_default, edit=lambda b: setattr(b[3], "wide", True)),
    "a flag": lambda: Stack(by_default, edit=lambda b: [setattr(x, "wide", x.number > 2 or None) for x in b]),
    "a scale": lambda: Stack(causal, edit=lambda b: setattr(b[3], "scale", 0.25)),
    "a scale that is a frozen parameter": lambda: Stack(causal, edit=with_scales),
    "a mask in a buffer": lambda: Stack(by_buffer, edit=with_tables),
    "a mask in a frozen parameter": lambda: Stack(by_buffer, edit=with_frozen_tables),
    "a list in a dict": lambda: Stack(by_constant, edit=with_limits),
    "a config that changes on the way": lambda: Stack(
        by_config, config_moves_on, config=SimpleNamespace(width=1)
    ),
    "a config each": lambda: Stack(
        by_config, edit=lambda b: [setattr(x, "config", SimpleNamespace(width=2 + (x.number > 2))) for x in b]
    ),
    "another function": lambda: Stack(causal, edit=lambda b: setattr(b[3], "mask", by_hidden)),
    "a hook": lambda: Stack(causal, edit=with_one_hook),
    "another forward": lambda: Stack(causal, edit=with_one_forward),
    "a mask that it is called with": lambda: Told(causal),
    "a mask from the hidden states": lambda: Stack(by_hidden),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_between_blocks_is_seen(name: str) -> None:
    # A config that changes counts from where the last trace left it, so each trace has a model of its own.
    with torch.no_grad():
        found = find_alike(DIFFERENT[name]().eval(), (X,))
    if found is not None:
        assert facts(found) == facts(find_attention(capture(DIFFERENT[name]().eval(), (X,))))


def test_a_number_that_nobody_reads_makes_no_difference() -> None:
    found, _ = both(Stack(causal), X)
    assert found is not None
    assert [s.path for s in found.sites] == [f"blocks.{i}" for i in range(DEPTH)]


def test_two_kinds_of_blocks_are_two_traces_each() -> None:
    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=6, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config)
    ids = torch.randint(3, 40, (2, 9))
    seen = torch.ones_like(ids)
    seen[0, :3] = 0
    found, wanted = both(model, input_ids=ids, attention_mask=seen, use_cache=False)
    assert found is not None and facts(found) == facts(wanted)
    assert {site.mask.label for site in found.sites} == {"causal+padding", "window(6)+padding"}
    assert len(found.graph_module.graph.find_nodes(op="call_function", target=unknown)) == 8 - 4 + 2


def test_the_model_is_as_it_was() -> None:
    model = Stack(causal).eval()
    before = [(name, id(part), type(part), dict(vars(part))) for name, part in model.named_modules()]
    assert find_alike(model, (X,)) is not None
    after = [(name, id(part), type(part), dict(vars(part))) for name, part in model.named_modules()]
    assert before == after and all(type(p) is nn.Parameter for p in model.parameters())
