"""Trees where layers keep keys and values: models as they came, hybrids, and small models that draft."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from live_models import converted, llama, tokens, wake
from torch import Tensor
from transformers import DynamicCache

from linearize import DraftModel, TreeSpeculation
from linearize.cache.draft_tree import accept, tree_logits
from linearize.convert.linearize import linearize
from linearize.errors import ConfigError, InputError
from linearize.generation.speculative import merge

TREE = [-1, -1, 0, 0, 1, 2, 2, 5, 7]
BRANCHES = [[0], [1], [0, 2], [0, 3], [1, 4], [0, 2, 5], [0, 2, 6], [0, 2, 5, 7], [0, 2, 5, 7, 8]]
GREEDY: dict[str, Any] = dict(max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)


def hybrid() -> Any:
    return wake(
        linearize(llama(num_hidden_layers=3), mechanism="augmented_paper", group_size=4, keep_softmax=(1,))
    )


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2
    )
    return transformers.GPT2LMHeadModel(config).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "hybrid": hybrid,
    "sdpa": llama,
    "eager": lambda: llama(attn_implementation="eager"),
    "gpt2": gpt2,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def prompt(model: Any, ids: Tensor, mask: Tensor | None = None) -> DynamicCache:
    cache = DynamicCache()
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache


def after(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def contents(cache: Any) -> list[Tensor]:
    return [
        x.clone()
        for layer in cache.layers
        for x in (layer.states.tensors() if hasattr(layer, "states") else (layer.keys, layer.values))
    ]


def test_every_branch_has_the_logits_of_decoding_it(model: Any) -> None:
    ids, drafts = tokens(2, 7), tokens(2, 9).flip(1)
    cache = prompt(model, ids)
    before = contents(cache)
    logits = tree_logits(model, cache, drafts, torch.tensor(TREE))
    for node, branch in enumerate(BRANCHES):
        wanted = after(model, torch.cat([ids, drafts[:, branch]], 1))[:, -1]
        torch.testing.assert_close(logits[:, node], wanted, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 7
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache), strict=True))


def test_rows_accept_different_branches_and_go_on(model: Any) -> None:
    ids, drafts, following = tokens(2, 7), tokens(2, 9).flip(1), tokens(2, 11)[:, 9:]
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    cache = prompt(model, ids, mask)
    tree_logits(model, cache, drafts, torch.tensor(TREE), mask)
    path = torch.tensor([[0, 2, 5], [1, 4, -1]])
    accept(cache, path)
    mask = torch.cat([mask, (path >= 0).long()], 1)
    out = tree_logits(model, cache, following, torch.tensor([-1, 0]), mask)
    for row, (first, branch) in enumerate(((3, [0, 2, 5]), (0, [1, 4]))):
        whole = torch.cat([ids[row, first:], drafts[row, branch], following[row]])[None]
        torch.testing.assert_close(out[row], after(model, whole)[0, -2:], atol=1e-4, rtol=1e-4)


def test_a_padded_batch_decodes_greedily_token_for_token(model: Any) -> None:
    """With a drafter that is sometimes right: the model itself drafts for the rows."""
    ids = tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[2, :1] = 0
    settings = dict(GREEDY, attention_mask=mask)
    wanted = model.generate(ids, **settings)
    speculation = TreeSpeculation(DraftModel(converted("llama"), depth=2, branches=3))
    assert torch.equal(model.generate(ids, **settings, custom_generate=speculation), wanted)
    speculation = TreeSpeculation(DraftModel(model, depth=4, branches=2))
    assert torch.equal(model.generate(ids, **settings, custom_generate=speculation), wanted)
    assert speculation.tokens == 90 and speculation.passes == 6  # 29 after the prompt's pass, 5 in each
    assert speculation.tokens_per_pass == 29 / 6


@pytest.mark.parametrize("name", ("llama", "hybrid"))
def test_a_draft_model_stays_in_step(name: str) -> None:
    """A copy of the model drafts what the model says, so all is accepted, whatever its layers hold."""
    model = converted("llama") if name == "llama" else hybrid()
    ids = tokens(1, 9)
    speculation = TreeSpeculation(DraftModel(model, depth=3))
    for _ in range(2):  # the second call starts anew
        out = model.generate(ids, **GREEDY, speculative=speculation)
        assert torch.equal(out, model.generate(ids, **GREEDY))
        assert speculation.passes == 8 and speculation.stats.drafted == 24
        assert speculation.stats.accepted == 21 and speculation.acceptance == 21 / 24


def test_a_draft_model_with_another_vocabulary_is_refused() -> None:
    speculation = TreeSpeculation(DraftModel(llama(vocab_size=64)))
    with pytest.raises(InputError, match="64 tokens and the model 96"):
        llama().generate(tokens(1, 5), **GREEDY, custom_generate=speculation)
    with pytest.raises(ConfigError, match="at least 1"):
        DraftModel(llama(), depth=0)


def test_caches_that_cannot_hold_a_tree_are_refused_and_stay_as_they_were() -> None:
    model = llama()
    drafts, parents = tokens(1, 3), torch.tensor([-1, 0, 0])
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(tokens(1, 5), past_key_values=cache)
    before = contents(cache)
    with pytest.raises(InputError, match="layer 0, a StaticLayer"):
        tree_logits(model, cache, drafts, parents)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache), strict=True))
    cache = prompt(model, tokens(1, 5))
    with pytest.raises(InputError, match="parent"):
        tree_logits(model, cache, drafts, torch.tensor([1, 0, 0]))
    with pytest.raises(InputError, match="no draft tree"):
        accept(cache, torch.tensor([[0]]))
    assert cache.get_seq_length() == 5
    torch.manual_seed(0)
    settings = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    window: Any = transformers.MistralForCausalLM(
        transformers.MistralConfig(vocab_size=96, sliding_window=4, num_key_value_heads=2, **settings)
    ).eval()
    with pytest.raises(InputError, match="DynamicSlidingWindowLayer"):
        window.generate(tokens(1, 9), **GREEDY, custom_generate=TreeSpeculation(DraftModel(model, depth=2)))


def test_a_draft_model_keeps_in_step_with_rows_that_advance_unevenly(model: Any) -> None:
    """Row 0 has a second drafter, which knows six tokens; row 1 goes by its draft model alone, in step."""
    ids = tokens(2, 9)
    wanted = model.generate(ids, **GREEDY)

    class Knows:
        needs_hidden = False

        def start(self, model: Any) -> None:
            pass

        def propose(self, ids: Sequence[Tensor], hidden: Tensor | None) -> list[Any]:
            return [merge([wanted[0, len(ids[0]) :][:6].tolist()]), ([], [])]

    speculation = TreeSpeculation([DraftModel(model, depth=2), Knows()])
    assert torch.equal(model.generate(ids, **GREEDY, custom_generate=speculation), wanted)
    assert speculation.passes == 10  # 29 tokens by threes
    assert speculation.stats.scored == 15  # and row 0 by sevens: 5 passes
