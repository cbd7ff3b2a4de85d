"""One token after a state of `augmented`, whose call is laid out once: whatever changes in between is seen.

The reference is the module in float64, which has no compiled form and lays out nothing.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linearize.kernels import cpu
from torch import Tensor

from linearize.mechanisms.spec import SiteSpec
from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "")
BATCH, HEADS, KV_HEADS, DIM = 2, 6, 2, 16
Tokens = tuple[Tensor, Tensor, Tensor]


def token(seed: int, length: int = 1) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(BATCH, heads, length, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return query, key, value


class Pair:
    """A module in float32, its twin in float64, and a state of each after some tokens."""

    def __init__(self) -> None:
        config = LinearizeConfig(options={"window": 40, "sinks": 2, "salient": 9}, conv_taps=4)
        spec = SiteSpec(HEADS, KV_HEADS, DIM, DIM, causal=True)
        self.ours: Any = build_attention(spec, config).eval()
        self.twin: Any = copy.deepcopy(self.ours).double()
        cpu_device = torch.device("cpu")
        self.state = self.ours.new_state(BATCH, dtype=torch.float32, device=cpu_device)
        self.wanted = self.twin.new_state(BATCH, dtype=torch.float64, device=cpu_device)
        self.feed(token(0, 150))

    def feed(self, tokens: Tokens, key_mask: Tensor | None = None) -> None:
        """The tokens into both, and the same output."""
        with torch.no_grad():
            out = self.ours.extend(*tokens, self.state, key_mask=key_mask)
            wanted = self.twin.extend(*(x.double() for x in tokens), self.wanted, key_mask=key_mask)
        torch.testing.assert_close(out, wanted.to(out.dtype), atol=2e-5, rtol=1e-4)

    def set(self, name: str, change: Callable[[Tensor], None]) -> None:
        for module in (self.ours, self.twin):
            with torch.no_grad():
                change(getattr(module, name))


@pytest.fixture
def pair() -> Pair:
    made = Pair()
    made.feed(token(1))
    assert made.state.parts[0].ready.call is not None
    return made


def test_blocks_pass_and_tokens_lie_anywhere(pair: Pair) -> None:
    for at in range(70):
        tokens = token(at)
        if at % 3 == 1:  # another stride
            tokens = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens)  # type: ignore[assignment]
        if at % 5 == 2:  # columns that are apart, which no compiled form reads
            tokens = tuple(x.mT.contiguous().expand(-1, -1, -1, 2).mT[:, :, :1] for x in tokens)  # type: ignore[assignment]
        pair.feed(tokens)
    pair.feed(token(99, 5))
    pair.feed(token(100))


def test_weights_that_change_are_those_of_the_next_token(pair: Pair) -> None:
    pair.set("conv_weight", lambda x: x.copy_(torch.linspace(-1, 1, x.numel()).view_as(x)))
    pair.feed(token(2))
    pair.set("tail_weight", lambda x: x.copy_(torch.linspace(-1, 1, x.numel()).view_as(x)))
    pair.feed(token(3))
    for module in (pair.ours, pair.twin):
        module.conv_weight.data = module.conv_weight.data.flip(1)
    pair.feed(token(4))
    for module in (pair.ours, pair.twin):
        module.tail_weight = torch.nn.Parameter(module.tail_weight.detach().flip(0))
    pair.feed(token(5))


@pytest.mark.parametrize(
    "twin_of",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: x.map(Tensor.clone)],
    ids=["copied", "pickled", "mapped"],
)
def test_a_copy_of_the_state_goes_its_own_way(pair: Pair, twin_of: Callable[[Any], Any]) -> None:
    before, before_wanted = twin_of(pair.state), twin_of(pair.wanted)
    pair.feed(token(2))
    after, after_wanted = pair.state, pair.wanted
    pair.state, pair.wanted = before, before_wanted
    pair.feed(token(3))
    pair.state, pair.wanted = after, after_wanted
    pair.feed(token(4))


def test_a_row_whose_token_does_not_count_changes_nothing(pair: Pair) -> None:
    for at, real in enumerate(([True, False], [False, False], [True, True], [False, True])):
        pair.feed(token(at), torch.tensor(real)[:, None])
    pair.state.clear()
    pair.wanted.clear()
    pair.feed(token(9))


def test_half_precision_and_single_take_turns(pair: Pair) -> None:
    for at in range(4):
        tokens = token(at)
        rounded = tuple(x.bfloat16() for x in tokens)
        with torch.no_grad():
            out = pair.ours.extend(*(rounded if at % 2 else tokens), pair.state)
            same = rounded if at % 2 else tokens
            wanted = pair.twin.extend(*(x.double() for x in same), pair.wanted)
        assert out.dtype == same[2].dtype
        torch.testing.assert_close(out.float(), wanted.float(), atol=1e-2 if at % 2 else 2e-5, rtol=1e-2)


def test_a_graph_made_of_it_has_the_operator_and_not_its_result(pair: Pair) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    pair.ours.requires_grad_(False)

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = pair.ours.extend(query, key, value, pair.state)
        return out

    with torch.no_grad():
        graph = make_fx(step)(*token(2))
        traced = torch.jit.trace(step, token(2), check_trace=False)
    assert "salient_extend" in graph.code and "salient_extend" in str(traced.graph)


def test_shapes_and_masks_that_do_not_fit_are_still_refused(pair: Pair) -> None:
    from linearize.errors import InputError

    query, key, value = token(2)
    with torch.no_grad():
        for wrong in (
            (query[:1], key[:1], value[:1]),
            (query, key, value[..., :8]),
            (query, key[:, :1], value),
        ):
            with pytest.raises(InputError):
                pair.ours.extend(*wrong, pair.state)
        with pytest.raises(InputError):
            pair.ours.extend(query, key, value, pair.state, key_mask=torch.ones(BATCH, 2, dtype=torch.bool))
    pair.feed(token(3))


def test_a_graph_of_a_bidirectional_site_has_the_operator_and_not_its_result() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    spec = SiteSpec(HEADS, KV_HEADS, DIM, DIM, causal=False)
    module = build_attention(spec, LinearizeConfig()).eval().requires_grad_(False)
    with torch.no_grad():
        graph = make_fx(lambda query, key, value: module(query, key, value))(*token(2, 20))
        torch.testing.assert_close(graph(*token(3, 20)), module(*token(3, 20)))
    assert "salient_both_ways" in graph.code
