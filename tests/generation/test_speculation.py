"""Speculation is lossless: what comes out is greedy decoding, whatever was drafted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from live_models import converted, tokens
from torch import Tensor
from transformers import GenerationConfig

from linearize.convert.linearize import linearize
from linearize.demo.load import load_demo
from linearize.errors import ConfigError, InputError
from linearize.generation.speculative import PromptLookup, TreeSpeculation, Typical, merge
from linearize.generation.speculative.drafter import Draft

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


def test_speculative_is_a_setting_of_generate(model: Any) -> None:
    """Beside a generation config, several end tokens, a custom criterion, a streamer and an output class."""
    ids = tokens(1, 9)
    free = model.generate(ids, **GREEDY, eos_token_id=None)[0]

    class Streamer:
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.got += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    class Long:
        def __call__(self, ids: Tensor, scores: Any) -> Tensor:
            return torch.tensor([ids.shape[1] >= 35])

    for settings in (
        dict(eos_token_id=None, max_new_tokens=1),
        dict(eos_token_id=[int(free[30]), int(free[25])]),
        dict(eos_token_id=None, stopping_criteria=[Long()]),
    ):
        config = GenerationConfig(**{**GREEDY, "return_dict_in_generate": True})
        wanted = model.generate(ids, generation_config=config, **settings)
        streamer, speculation = Streamer(), TreeSpeculation(Oracle([free.tolist()]))
        out = model.generate(
            ids, generation_config=config, **settings, streamer=streamer, speculative=speculation
        )
        assert torch.equal(out.sequences, wanted.sequences)
        assert streamer.got == wanted.sequences[0].tolist() and streamer.ended
        assert out.past_key_values.get_seq_length() == wanted.past_key_values.get_seq_length()
        more = [
            model.generate(x.sequences, past_key_values=x.past_key_values, **GREEDY, eos_token_id=None)
            for x in (out, wanted)
        ]
        assert torch.equal(*more)
    with pytest.raises(InputError, match="stands alone"):
        model.generate(ids, speculative=speculation, custom_generate=speculation)


@pytest.mark.parametrize("warp", ({}, dict(temperature=0.7, top_k=20), dict(top_p=0.8, min_new_tokens=3)))
def test_sampling_with_the_seed_of_plain_sampling_is_the_same_text(model: Any, warp: dict[str, Any]) -> None:
    ids = tokens(1, 9)
    settings = dict(GREEDY, do_sample=True, eos_token_id=None, **warp)
    for seed in (1, 2):
        torch.manual_seed(seed)
        wanted = model.generate(ids, **settings)
        state = torch.get_rng_state()
        for drafter, most in ((Oracle(wanted.tolist()), 19), (PromptLookup(), 39)):
            torch.manual_seed(seed)
            speculation = TreeSpeculation(drafter)
            assert torch.equal(model.generate(ids, **settings, speculative=speculation), wanted)
            assert torch.equal(torch.get_rng_state(), state)
            assert speculation.passes <= most


def test_sampling_has_the_distribution_of_the_model(model: Any) -> None:
    """Chi-square of the first three sampled tokens of many sequences, with the likeliest of them drafted."""
    ids, count = tokens(1, 7), 1500
    warp = dict(do_sample=True, top_k=2, temperature=2.0, pad_token_id=0, eos_token_id=None)
    wanted: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for path, chance in wanted.items():
            with torch.no_grad():
                logits = model(torch.tensor([ids[0].tolist() + list(path)]), use_cache=False).logits[0, -1]
            values, tokens_ = (logits / 2.0).topk(2)
            for p, token in zip(values.softmax(0).tolist(), tokens_.tolist(), strict=True):
                longer[(*path, token)] = chance * p
        wanted = longer

    class Drafts:
        needs_hidden = False

        def start(self, model: Any) -> None:
            pass

        def propose(self, ids: Sequence[Tensor], hidden: Tensor | None) -> list[Draft]:
            said = [tuple(row[7:].tolist()) for row in ids]
            return [merge([p[len(s) :] for p in sorted(wanted) if p[: len(s)] == s][:3]) for s in said]

    torch.manual_seed(0)
    speculation = TreeSpeculation(Drafts())
    out = model.generate(ids, **warp, max_new_tokens=3, num_return_sequences=count, speculative=speculation)
    assert speculation.stats.accepted > count / 2
    counts = Counter(tuple(row) for row in out[:, 7:].tolist())
    assert set(counts) <= set(wanted)
    statistic = sum((counts[k] - count * p) ** 2 / (count * p) for k, p in wanted.items())
    assert statistic < 24.3  # chi-square, 7 degrees of freedom: one in a thousand is above


def test_text_stops_at_strings() -> None:
    """Of the demo decoder, whose tokenizer knows strings."""
    original, tokenizer = load_demo()
    demo: Any = linearize(original)
    ids = torch.tensor([tokenizer.encode("import os\n\n\ndef main(")])
    settings: dict[str, Any] = {**GREEDY, "max_new_tokens": 24, "eos_token_id": None, "tokenizer": tokenizer}
    free = demo.generate(ids, **settings)[0]
    string = tokenizer.decode(free[ids.shape[1] + 6 : ids.shape[1] + 8])
    wanted = demo.generate(ids, **settings, stop_strings=[string])
    speculation = TreeSpeculation(Oracle([free.tolist()]))
    assert wanted.shape[1] < len(free)
    assert torch.equal(demo.generate(ids, **settings, stop_strings=[string], speculative=speculation), wanted)
    with pytest.raises(InputError, match="need their tokenizer"):
        demo.generate(ids, **GREEDY, stop_strings=[string], speculative=speculation)


def test_typical_acceptance_is_another_text_in_fewer_passes(model: Any) -> None:
    """Every drafted token is kept when the rule is lax, whatever the model would have said."""
    ids = tokens(1, 9)
    said = [*ids[0].tolist(), *range(3, 60)]
    settings = dict(GREEDY, eos_token_id=None, repetition_penalty=1.1)
    speculation = TreeSpeculation(Oracle([said]), acceptance=Typical(epsilon=1e-9, delta=1e-9))
    out = model.generate(ids, **settings, speculative=speculation)
    assert out.shape == (1, 49) and speculation.passes < 20
    strict = TreeSpeculation(Oracle([said]), acceptance=Typical(epsilon=1.0, delta=1e9))
    assert torch.equal(model.generate(ids, **settings, speculative=strict), model.generate(ids, **settings))


def test_drafts_that_are_none_are_refused(model: Any) -> None:
    class Wrong:
        needs_hidden = False

        def __init__(self, *draft: Any) -> None:
            self.draft = list(draft)

        def start(self, model: Any) -> None:
            pass

        def propose(self, ids: Sequence[Tensor], hidden: Tensor | None) -> list[Draft]:
            return self.draft

    for draft, message in (
        (([3, 4], [1, -1]), "after its parent"),
        (([3, 4], [-1, 1]), "after its parent"),
        (([3, 96], [-1, 0]), "vocabulary"),
        (([3, 4], [-1]), "as many parents"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(
                tokens(1, 5), **GREEDY, eos_token_id=None, speculative=TreeSpeculation(Wrong(draft))
            )
    with pytest.raises(InputError, match="1 drafts for 2"):
        model.generate(
            tokens(2, 5), **GREEDY, eos_token_id=None, speculative=TreeSpeculation(Wrong(([], [])))
        )


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
