"""Speculation is lossless: what comes out is greedy decoding, whatever was drafted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from live_models import converted, tokens
from torch import Tensor

from linearize.errors import ConfigError, InputError
from linearize.speculative import PromptLookup, TreeSpeculation, merge
from linearize.speculative.drafter import Draft

GREEDY: dict[str, Any] = dict(max_new_tokens=40, do_sample=False, pad_token_id=0)


@pytest.fixture(scope="module")
def model() -> Any:
    return converted("llama")


class Oracle:
    """Knows the right continuations; tells them beside wrong ones, or only wrong ones every other time."""

    needs_hidden = False

    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences, self.calls = sequences, 0

    def start(self, model: Any) -> None:
        self.calls = 0

    def propose(self, ids: Sequence[Tensor], hidden: Tensor | None) -> list[Draft]:
        assert hidden is None
        self.calls += 1
        right = [s[len(row) : len(row) + 5] for s, row in zip(self.sequences, ids, strict=True)]
        return [merge([[1, 2, 3], r, [4]] if self.calls % 2 else [[1, 2], [3]]) for r in right]


def test_greedy_decoding_token_for_token_in_fewer_passes(model: Any) -> None:
    ids = tokens(1, 9)
    wanted = model.generate(ids, **GREEDY, eos_token_id=None)
    speculation = TreeSpeculation(Oracle(wanted.tolist()))
    out = model.generate(ids, **GREEDY, eos_token_id=None, custom_generate=speculation)
    assert torch.equal(out, wanted)
    assert speculation.tokens == 40 and speculation.passes < 20


def test_a_left_padded_batch_and_an_end_token(model: Any) -> None:
    ids = tokens(3, 12)
    ids[:, 6:] = ids[:, :6]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    free = model.generate(ids, attention_mask=mask, **GREEDY, eos_token_id=None)
    settings = dict(GREEDY, attention_mask=mask, eos_token_id=int(free[1, 20]))
    wanted = model.generate(ids, **settings)
    out = model.generate(ids, **settings, custom_generate=TreeSpeculation(PromptLookup()))
    assert torch.equal(out, wanted)


def test_logits_processors_see_the_branch_they_are_on(model: Any) -> None:
    ids = tokens(1, 12)
    settings = dict(GREEDY, eos_token_id=None, repetition_penalty=1.7, no_repeat_ngram_size=3)
    wanted = model.generate(ids, **settings)
    speculation = TreeSpeculation(Oracle(wanted.tolist()))
    out = model.generate(ids, **settings, custom_generate=speculation, return_dict_in_generate=True)
    assert torch.equal(out.sequences, wanted)
    assert out.past_key_values.get_seq_length() == wanted.shape[1] - 1  # as after plain decoding


def test_what_it_does_not_do_is_refused(model: Any) -> None:
    speculation = TreeSpeculation(PromptLookup())
    with pytest.raises(InputError, match="beam"):
        model.generate(tokens(1, 5), num_beams=2, custom_generate=speculation)
    with pytest.raises(InputError, match="empty cache"):
        model.generate(tokens(1, 5), use_cache=False, do_sample=False, custom_generate=speculation)
    with pytest.raises(ConfigError, match="at least 1"):
        PromptLookup(depth=0)


def test_lookup_drafts_what_followed_before_and_shares_beginnings() -> None:
    ids = torch.tensor([7, 1, 2, 3, 9, 1, 2, 3, 4, 5, 0, 1, 2])
    assert PromptLookup(ngram=2, depth=3).lookup(ids) == ([3, 4, 5, 9, 1], [-1, 0, 1, 0, 3])
    assert PromptLookup(ngram=2, depth=2, branches=1).lookup(ids) == ([3, 4], [-1, 0])
    assert PromptLookup().lookup(torch.tensor([1, 2, 3])) == ([], [])
    assert merge([[1, 2], [1, 3], [1, 2, 4]]) == ([1, 2, 3, 4], [-1, 0, 0, 1])
