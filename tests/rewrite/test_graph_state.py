"""Eager-only decoders keep a state of constant size too: what they generate is what recomputing gives."""

from __future__ import annotations

import copy
import logging
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from live_models import VOCAB, gptj, recompute, refuse_states, tokens, wake
from torch import Tensor, nn
from transformers import DynamicCache

from linearize.cache.draft_tree import accept, tree_logits
from linearize.convert.linearize import linearize

GREEDY: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, disable_compile=True)
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    use_cache=True,
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj": ("gptj", dict(rotary_dim=4)),
    "falcon": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),  # caches expanded heads
    "bloom": ("bloom", {}),  # merges batch and heads, adds ALiBi
    "mpt": ("mpt", dict(expansion_ratio=2, max_seq_len=64)),  # asks its cache for its length
    "xglm": ("xglm", dict(ffn_dim=48)),
    "gpt_neox_japanese": ("gpt_neox_japanese", dict(intermediate_multiple_size=2)),
    "codegen": ("codegen", dict(rotary_dim=4)),
}
QUICK = ["gptj", "falcon", "mpt"]
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@cache
def made(name: str) -> nn.Module:
    model_type, more = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **more})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    biased = name in ("bloom", "mpt")
    return wake(
        linearize(model, mechanism="augmented_paper", group_size=4, approximate=("bias",) if biased else ())
    )


@pytest.fixture(params=EVERY)
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def layers_of(cache: Any) -> set[str]:
    return {type(layer).__name__ for layer in cache.layers}


def test_batches_with_left_padding_generate_what_each_row_generates_alone(model: Any) -> None:
    prompt, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :5] = 0
    out = model.generate(prompt, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert {site.route for site in model._linearize.plan.sites} == {"graph"}
    assert layers_of(out.past_key_values) == {"StateLayer"}
    for row, keep in enumerate(mask.bool()):
        alone = recompute(model, prompt[row : row + 1, keep], 8)
        assert torch.equal(out.sequences[row, 11:], alone[0, keep.sum() :])


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole_and_can_be_taken_back(model: Any) -> None:
    text, store = tokens(2, 14), DynamicCache(config=model.config)
    store_of = lambda piece: model(piece, past_key_values=store, use_cache=True).logits  # noqa: E731
    with torch.no_grad():
        whole = model(text, use_cache=False).logits
        pieces = [store_of(piece) for piece in text.split([5, 1, 4, 3, 1], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-4, rtol=1e-4)
        store.crop(-1)
        torch.testing.assert_close(store_of(text[:, -1:]), whole[:, -1:], atol=1e-4, rtol=1e-4)


def test_speculation_by_transformers_equals_greedy(model: Any) -> None:
    prompt = tokens(1, 8).repeat(1, 2)
    wanted = model.generate(prompt, **GREEDY)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY), wanted)


def test_the_state_does_not_grow_and_steps_make_no_graphs() -> None:
    model: Any = made("gptj")
    sizes, graphs = [], []
    for steps in (3, 30):
        settings = {**GREEDY, "max_new_tokens": steps, "return_dict_in_generate": True}
        out = model.generate(tokens(2, 9), **settings)
        sizes.append(sum(layer.states.nbytes for layer in out.past_key_values.layers))
        variants = model.transformer.h[0].attn._linearize_owner.graphs
        graphs.append(sum(len(known) for known in variants.values()))
    assert sizes[0] == sizes[1] and graphs[0] == graphs[1]


def test_masks_as_wide_as_something_else_are_told_apart() -> None:
    """Falcon's rotary tables are 8 wide: at the eighth token so is the mask."""
    model: Any = copy.deepcopy(made("falcon"))
    text, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        store = DynamicCache(config=model.config)
        parts = []
        for start, stop in ((0, 7), (7, 8), (8, 9)):
            inputs = dict(attention_mask=mask[:, :stop], position_ids=positions[:, start:stop])
            parts.append(model(text[:, start:stop], past_key_values=store, use_cache=True, **inputs).logits)
        whole = model(text, attention_mask=mask, position_ids=positions, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-4, rtol=1e-4)


def test_draft_trees_run_on_a_grafted_decoder() -> None:
    model: Any = made("gptj")
    text, drafts = tokens(2, 7), tokens(2, 3)
    parents = torch.tensor([-1, 0, -1])
    with torch.no_grad():
        store = DynamicCache(config=model.config)
        model(text, past_key_values=store, use_cache=True)
        logits = tree_logits(model, store, drafts, parents)
        for branch in ([0, 1], [2]):
            alone = model(torch.cat([text, drafts[:, branch]], 1), use_cache=False).logits[:, 7:]
            torch.testing.assert_close(logits[:, branch], alone, atol=1e-4, rtol=1e-4)
        accept(store, torch.tensor([[0, 1]]).expand(2, 2))
        step = model(text[:, :1], past_key_values=store, use_cache=True).logits
        whole = model(torch.cat([text, drafts[:, :2], text[:, :1]], 1), use_cache=False).logits
    torch.testing.assert_close(step[:, 0], whole[:, -1], atol=1e-4, rtol=1e-4)


def test_a_decoder_whose_graph_shows_no_state_keeps_keys_and_values_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_states(monkeypatch)
    with caplog.at_level(logging.WARNING, "linearize"):
        model: Any = wake(linearize(gptj(), mechanism="augmented_paper", group_size=4))
    assert "no state today; its cache keeps keys and values" in caplog.text
    out = model.generate(tokens(2, 9), return_dict_in_generate=True, **GREEDY)
    assert layers_of(out.past_key_values) == {"DynamicLayer"}
    assert torch.equal(out.sequences, recompute(model, tokens(2, 9), 8))


def test_a_call_that_needs_gradients_keeps_keys_and_values() -> None:
    model: Any = made("gptj")
    out = model(tokens(2, 9), use_cache=True)
    assert layers_of(out.past_key_values) == {"DynamicLayer"}
    out.logits.sum().backward()
    assert any(isinstance(p.grad, Tensor) and p.grad.any() for p in model.parameters())
    model.zero_grad()
