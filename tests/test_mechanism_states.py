"""Every mechanism with a state: pieces, steps, rewinds, trees and commits equal its parallel form."""

from __future__ import annotations

import itertools

import pytest
import torch

from linearize import mechanisms
from linearize.attention import AttentionModule, SiteSpec, build_attention
from linearize.config import LinearizeConfig
from linearize.errors import InputError

STATELESS = {"softmax", "softmax_window"}
NAMED = [
    (name, augmentation)
    for name, mechanism in mechanisms.available().items()
    for augmentation in (False, True)
    if "causal" in mechanism.supports and name not in STATELESS
]


def build(name: str, augmentation: bool, kv_layout: str = "interleaved") -> AttentionModule:
    torch.manual_seed(0)
    spec = SiteSpec(4, 2, head_dim=8, value_dim=6, causal=True, scale=0.4, kv_layout=kv_layout)
    config = LinearizeConfig(mechanism=name, group_size=8, conv_taps=4, augmentation=augmentation)
    module = build_attention(spec, config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def tokens(length: int = 50) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 6)


@pytest.mark.parametrize("kv_layout", ("interleaved", "tiled"))
@pytest.mark.parametrize("name, augmentation", NAMED)
@torch.no_grad()
def test_state_form_equals_parallel_form(name, augmentation, kv_layout):
    module = build(name, augmentation, kv_layout)
    query, key, value = tokens()
    whole = module(query, key, value)
    state = module.new_state(2, dtype=torch.float32, device=query.device, max_rewind=6)
    size = state.nbytes
    for start, stop in itertools.pairwise((0, 20, 21, 22, 23, 30, 31, 40, 41, 50)):
        piece = [x[:, :, start:stop] for x in (query, key, value)]
        torch.testing.assert_close(
            module.extend(*piece, state), whole[:, :, start:stop], atol=1e-5, rtol=1e-5
        )
    state.rewind(6)
    assert state.length.tolist() == [44, 44] and state.nbytes == size

    # A chain of 4 tokens and, beside it, another that starts with the same one.
    branch = torch.tensor([44, 45, 46, 47, 49, 49])
    drafts = [x[:, :, branch] for x in (query, key, value)]
    out = module.tree(*drafts, state, torch.tensor([-1, 0, 1, 2, 0, 4]))
    torch.testing.assert_close(out[:, :, :4], whole[:, :, 44:48], atol=1e-5, rtol=1e-5)
    module.commit(*drafts[1:], state, torch.tensor([[0, 1, 2, 3], [0, 1, -1, -1]]))
    assert state.length.tolist() == [48, 46]
    state.rewind(torch.tensor([2, 0]))
    piece = [x[:, :, 46:] for x in (query, key, value)]
    torch.testing.assert_close(module.extend(*piece, state), whole[:, :, 46:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ("augmented", "performer", "yoso", "castling"))
@torch.no_grad()
def test_padded_tokens_change_nothing_and_give_nothing(name):
    module = build(name, True)
    query, key, value = tokens(20)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, :7] = False
    state = module.new_state(2, dtype=torch.float32, device=query.device)
    out = module.extend(query, key, value, state, key_mask=real)
    alone = module(*(x[:1, :, 7:] for x in (query, key, value)))
    torch.testing.assert_close(out[:1, :, 7:], alone, atol=1e-5, rtol=1e-5)
    assert state.length.tolist() == [13, 20]
    assert (out[0, :, :7] == 0).all()


@torch.no_grad()
def test_a_rewind_that_one_part_refuses_changes_no_part():
    module = build("castling", True)
    query, key, value = tokens()
    state = module.new_state(2, dtype=torch.float32, device=query.device, max_rewind=4)
    module.extend(query, key, value, state)
    with pytest.raises(InputError, match="max_rewind=4"):
        state.rewind(40)
    assert [part.length.tolist() for part in state.parts] == [[50, 50]] * 2


def test_what_has_no_constant_state_says_so():
    for name, causal in (("softmax", True), ("softmax_window", True), ("augmented", False)):
        spec = SiteSpec(4, 2, head_dim=8, value_dim=6, causal=causal)
        module = build_attention(spec, LinearizeConfig(mechanism=name))
        assert module.new_state(2, dtype=torch.float32, device=torch.device("cpu")) is None
