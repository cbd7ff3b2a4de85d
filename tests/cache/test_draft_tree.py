"""Draft trees on a whole model: logits of every branch as if it were decoded, and nothing lost on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_models import converted, tokens
from torch import Tensor
from transformers import DynamicCache

from linearize.cache.draft_tree import accept, tree_logits
from linearize.errors import InputError

TREE = [-1, -1, 0, 0, 1, 2, 2, 5, 7]
BRANCHES = [[0], [1], [0, 2], [0, 3], [1, 4], [0, 2, 5], [0, 2, 6], [0, 2, 5, 7], [0, 2, 5, 7, 8]]


@pytest.fixture(scope="module")
def model() -> Any:
    return converted("llama")


def prompt(model: Any, ids: Tensor, mask: Tensor | None = None) -> DynamicCache:
    cache = DynamicCache()
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache


def again(model: Any, ids: Tensor) -> Tensor:
    """Logits of the last token of whole sequences."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("length", (1, 2, 3, 4, 5, 7, 8, 33))
def test_every_branch_has_the_logits_of_decoding_it(model: Any, length: int) -> None:
    ids, drafts = tokens(2, length), tokens(2, 9).flip(1)
    cache = prompt(model, ids)
    logits = tree_logits(model, cache, drafts, torch.tensor(TREE))
    assert cache.get_seq_length() == length
    for node, branch in enumerate(BRANCHES):
        wanted = again(model, torch.cat([ids, drafts[:, branch]], 1))
        torch.testing.assert_close(logits[:, node], wanted, atol=1e-4, rtol=1e-4)


def test_accepted_branches_go_on_as_if_they_had_been_decoded(model: Any) -> None:
    """Rows accept different branches of different lengths, from a left-padded prompt."""
    ids, drafts, following = tokens(2, 7), tokens(2, 9).flip(1), tokens(2, 12)[:, 9:]
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    cache = prompt(model, ids, mask)
    tree_logits(model, cache, drafts, torch.tensor(TREE))
    path = torch.tensor([[0, 2, 5], [1, 4, -1]])
    accept(cache, path)
    mask = torch.cat([mask, (path >= 0).long(), torch.ones(2, 3, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1)[:, -3:]
    with torch.no_grad():
        out = model(following, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    for row, (first, branch) in enumerate(((3, [0, 2, 5]), (0, [1, 4]))):
        whole = torch.cat([ids[row, first:], drafts[row, branch], following[row]])[None]
        with torch.no_grad():
            wanted = model(whole, use_cache=False).logits[0, -3:]
        torch.testing.assert_close(out[row], wanted, atol=1e-4, rtol=1e-4)


def test_greedy_decoding_by_trees_is_greedy_decoding(model: Any) -> None:
    """Whatever is drafted: only nodes that greedy decoding would have chosen are accepted."""
    ids = tokens(1, 9)
    wanted = model.generate(ids, max_new_tokens=25, do_sample=False, eos_token_id=None)[0, 9:].tolist()
    cache = prompt(model, ids[:, :-1])
    with torch.no_grad():
        chosen = model(ids[:, -1:], past_key_values=cache).logits[0, -1].argmax().item()
    made: list[int] = []
    steps = 0
    while len(made) < 25:
        # The right continuation, when step is even, beside a wrong one.
        right = wanted[len(made) + 1 : len(made) + 4] if steps % 2 == 0 else [0, 0, 0]
        draft = [chosen, *right, 1, 2]
        parents = [-1, *range(len(right)), 0, len(right) + 1]
        best = tree_logits(model, cache, torch.tensor([draft]), torch.tensor(parents))[0].argmax(-1).tolist()
        path = [0]
        while True:
            last = best[path[-1]]
            child = [n for n, p in enumerate(parents) if p == path[-1] and draft[n] == last]
            if not child:
                break
            path.append(child[0])
        made += [draft[node] for node in path]
        chosen = best[path[-1]]
        accept(cache, torch.tensor([path]))
        steps += 1
    assert made[:25] == wanted
    assert steps < 25


def test_what_cannot_hold_a_tree_is_refused_and_stays_as_it_was(model: Any) -> None:
    drafts, parents = tokens(2, 3), torch.tensor([-1, 0, 0])
    with pytest.raises(InputError, match="filled cache"):
        tree_logits(model, DynamicCache(), drafts, parents)
    cache = prompt(model, tokens(2, 5))
    before = [x.clone() for layer in cache.layers for x in layer.states.tensors()]
    for bad in (torch.tensor([1, 2, 0]), torch.tensor([-1, 0])):
        with pytest.raises(InputError, match="parent"):
            tree_logits(model, cache, drafts, bad)
    with pytest.raises(InputError, match="no draft tree"):
        accept(cache, torch.tensor([[0], [0]]))
    assert cache.get_seq_length() == 5 and cache.layers[0].tree is None
    after = [x for layer in cache.layers for x in layer.states.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
