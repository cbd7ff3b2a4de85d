"""`lz.recall`: what counts as right is what `generate` writes, and answers stand where the table says."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from live_models import bert, converted, llama, snapshot, tokens
from rich.console import Console
from torch import nn

import linearize as lz
from linearize.errors import ConfigError, InputError, InvalidModelError
from linearize.evaluation import recall as module


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return lz.load_demo()[1]


@pytest.fixture(scope="module")
def asked(tokenizer: Any) -> list[Any]:
    words = module._Words(tokenizer)
    return [
        (task, item)
        for task in module.TASKS
        for item in module._contexts(task, words, 700, (0.1, 0.5, 0.9), random.Random("a"))
    ]


@pytest.mark.parametrize("build", [llama, lambda: converted("llama")])
def test_an_answer_is_right_when_generate_writes_it(build: Any) -> None:
    """Seven questions of different lengths after one context; of the last one the answer is wrong."""
    model = build()
    context = tokens(1, 30)
    questions = [tokens(1, 2 + n % 3)[0].tolist() for n in range(7)]
    answers, likelihoods = [], []
    for number, question in enumerate(questions):
        ids = torch.cat([context, torch.tensor([question])], 1)
        count = 1 + number % 2
        out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        if number == 6:
            out = (out + 1) % 96
        answers.append(out.tolist())
        with torch.no_grad():
            logits = model(torch.cat([ids, out[None]], 1), use_cache=False).logits[0, -count - 1 : -1]
        likelihoods.append(float(logits.log_softmax(-1).gather(1, out[:, None]).mean()))
    with torch.no_grad():
        found = list(module._answers(model, module._Asked(context[0], [0] * 7, questions, answers)))
    assert [right for right, _ in found] == [True] * 6 + [False]
    assert [likelihood for _, likelihood in found] == pytest.approx(likelihoods, abs=1e-4)


def test_the_answer_stands_at_its_depth_once_and_the_question_is_not_in_the_context(
    asked: list[Any], tokenizer: Any
) -> None:
    passkeys = [item for task, item in asked if task == "passkey"]
    assert [item.places for item in passkeys] == [[0], [1], [2]]
    for item, depth in zip(passkeys, (0.1, 0.5, 0.9), strict=True):
        total = len(item.context) + len(item.questions[0]) + len(item.answers[0])
        assert 660 < total <= 700
        text, key = tokenizer.decode(item.context), tokenizer.decode(item.answers[0]).strip()
        assert text.count(key) == 2 and "What is" not in text
        assert text.index(f"The pass key is {key}.") / len(text) == pytest.approx(depth, abs=0.05)
    assert len({tuple(item.answers[0]) for item in passkeys}) == 3


def test_all_facts_are_asked_and_counted_at_the_nearest_depth(asked: list[Any], tokenizer: Any) -> None:
    ((_, item),) = [pair for pair in asked if pair[0] == "fact"]
    text = tokenizer.decode(item.context)
    assert 600 < len(item.context) <= 700 and len(item.questions) > 8
    for place, question, answer in zip(item.places, item.questions, item.answers, strict=True):
        fact = tokenizer.decode([*question, *answer]).strip()
        assert text.count(fact) == 1
        share = text.index(fact) / len(text)
        others = sorted((0.1, 0.5, 0.9), key=lambda depth: abs(depth - share))
        assert abs((0.1, 0.5, 0.9)[place] - share) <= abs(others[0] - share) + 0.05
    assert set(item.places) == {0, 1, 2}


def test_depths_closer_than_facts_are_all_answered(tokenizer: Any) -> None:
    words = module._Words(tokenizer)
    depths = tuple(i / 30 for i in range(31))
    (item,) = module._contexts("fact", words, 700, depths, random.Random("a"))
    assert set(item.places) == set(range(31))


def test_the_same_seed_asks_the_same_of_every_model(tokenizer: Any) -> None:
    model, _ = lz.load_demo()
    before = snapshot(model)
    settings: Any = dict(length=400, depths=(0.2, 0.8), trials=2)
    found = lz.recall(model, tokenizer, model, **settings)
    assert found.to_dict() == lz.recall(model, tokenizer, model, **settings).to_dict()
    assert snapshot(model) == before
    assert [(row.task, row.depth) for row in found.rows] == [(t, d) for t in module.TASKS for d in (0.2, 0.8)]
    for row in found.rows:
        assert row.reference == row.model and row.questions >= 2 and 0 <= row.model.right <= 1
    assert lz.recall(model, tokenizer, **settings, seed=1).rows != found.rows
    assert found.accuracy("fact") == found.accuracy("fact", reference=True)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    assert f"{found.rows[0].model.likelihood:.2f}" in console.export_text()
    assert json.loads(json.dumps(found.to_dict()))["length"] == 400


def test_accuracy_counts_questions() -> None:
    rows = (
        module.Depth("fact", 0.1, 3, module.Answers(1.0, 0.0)),
        module.Depth("fact", 0.9, 1, module.Answers(0.0, -1.0)),
        module.Depth("passkey", 0.5, 1, module.Answers(0.0, -1.0)),
    )
    found = module.Recall(400, "a", None, rows)
    assert found.accuracy("fact") == 0.75 and found.accuracy("passkey") == 0
    with pytest.raises(InputError, match="of a reference"):
        found.accuracy("fact", reference=True)


@pytest.mark.parametrize(
    ("build", "settings", "error", "match"),
    [
        (bert, {}, InvalidModelError, "asks decoders"),
        (lambda: nn.Linear(2, 2), {}, InvalidModelError, "transformers"),
        (llama, {"length": 100}, ConfigError, "length must be 256"),
        (llama, {"length": 512}, InputError, "room for 128 tokens"),
        (lambda: llama(max_position_embeddings=512), {"length": 300}, InputError, "tokenizer is another"),
        (llama, {"trials": 0}, ConfigError, "trials"),
        (llama, {"depths": (1.5,)}, ConfigError, "depths"),
        (llama, {"depths": ()}, ConfigError, "depths"),
        (llama, {"tasks": ("poem",)}, ConfigError, "passkey, fact"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    build: Any, settings: Any, error: type[Exception], match: str, tokenizer: Any
) -> None:
    with pytest.raises(error, match=match):
        lz.recall(build(), tokenizer, **settings)
