"""Medusa heads: trained on a frozen model, kept in files, and only ever as good as a guess."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import converted, llama, tokens
from transformers import AutoTokenizer

from linearize import Medusa, MedusaHeads, PromptLookup, Tree, TreeSpeculation, train_heads
from linearize.common.text import text_tokens
from linearize.errors import CheckpointError, ConfigError, InputError, MissingExtraError
from linearize.generation.speculative import rates, training

GREEDY: dict[str, Any] = dict(max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None)
TREE = Tree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))


@pytest.fixture(scope="module")
def model() -> Any:
    return converted("llama")


@pytest.fixture(scope="module")
def said(model: Any) -> torch.Tensor:
    """What the model says after some beginnings: data on which a guess can be right."""
    return model.generate(tokens(24, 4), **{**GREEDY, "max_new_tokens": 60})


@pytest.fixture(scope="module")
def heads(model: Any, said: torch.Tensor) -> MedusaHeads:
    return train_heads(
        model, said, num_heads=3, context=32, epochs=12, batch_size=2, learning_rate=5e-2, targets="model"
    )


def test_training_makes_guesses_better_and_leaves_the_model_alone(
    model: Any, said: torch.Tensor, heads: MedusaHeads
) -> None:
    untouched = converted("llama").state_dict()
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name for name, _ in heads.named_parameters()} == {"weight", "bias"}
    assert heads.rates is not None and [len(row) for row in heads.rates] == [10, 10, 10]
    before = MedusaHeads(model, 3).acceptance(model, said)
    trained = heads.acceptance(model, said)
    for old, new in zip(before, trained, strict=True):
        assert new[0] > 1.5 * old[0] and sum(new) <= 1


def test_heads_learn_how_a_text_goes_on(model: Any) -> None:
    """Twelve tokens that follow each other in a circle: head k says which is k places on."""
    circle = torch.arange(20, 32)
    text = circle.repeat(40)
    heads = train_heads(
        model, text, num_heads=3, targets="text", context=30, epochs=12, batch_size=2, learning_rate=2e-2
    )
    with torch.no_grad():
        hidden = model(text[None, :30], use_cache=False, output_hidden_states=True).hidden_states[-1][0]
        guesses = heads(hidden[:-1], text[1:30]).argmax(-1)
    for head, said in enumerate(guesses):
        assert torch.equal(said, text[head + 2 : head + 31])


def test_rates_are_shares_of_the_places_where_decoding_would_come(
    model: Any, said: torch.Tensor, heads: MedusaHeads
) -> None:
    """By hand, place by place, on text the model wrote itself."""
    hits, tried = [[0] * 3 for _ in range(3)], [0] * 3
    for row in said[:4]:
        with torch.no_grad():
            out = model(row[None], use_cache=False, output_hidden_states=True)
            right = out.logits[0].argmax(-1).tolist()
            logits = heads(out.hidden_states[-1][0], torch.cat([row[1:], row[:1]]))
        for place in range(len(row) - 4):
            for head in range(3):
                if row[place + head + 1] != right[place + head]:
                    break  # not what the model wrote: the prompt
                best = logits[head, place].topk(3).indices.tolist()
                tried[head] += 1
                if right[place + head + 1] not in best:
                    break
                hits[head][best.index(right[place + head + 1])] += 1
    wanted = [[hit / all_ for hit in row] for row, all_ in zip(hits, tried, strict=True)]
    measured = heads.acceptance(model, said[:4], ranks=3)
    assert [pytest.approx(row) for row in measured] == wanted


def test_greedy_decoding_with_heads_is_greedy_decoding(model: Any, heads: MedusaHeads) -> None:
    ids = tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = dict(GREEDY, attention_mask=mask)
    wanted = model.generate(ids, **settings)
    for drafter in (Medusa(heads), Medusa(heads, TREE), [Medusa(heads), PromptLookup()]):
        speculation = TreeSpeculation(drafter)
        assert torch.equal(model.generate(ids, **settings, speculative=speculation), wanted)
        assert speculation.tokens == 120
    one = TreeSpeculation(Medusa(heads), TREE)
    model.generate(tokens(1, 4), **GREEDY, speculative=one)
    assert one.tokens_per_pass > 1.1


def test_heads_see_where_the_last_token_was_chosen(model: Any, heads: MedusaHeads) -> None:
    """What is proposed at each pass is what heads say of the sequence read at once."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watched(Medusa):
        def propose(self, ids: Any, hidden: Any) -> Any:
            seen.append((ids[0].clone(), hidden[0].clone()))
            return super().propose(ids, hidden)

    ids = tokens(1, 9)
    model.generate(ids, **GREEDY, speculative=TreeSpeculation(Watched(heads, TREE)))
    assert len(seen) > 10
    for row, hidden in seen:
        with torch.no_grad():
            out = model(row[None, :-1], use_cache=False, output_hidden_states=True)
        torch.testing.assert_close(hidden, out.hidden_states[-1][0, -1], atol=1e-4, rtol=1e-4)


def test_untrained_heads_repeat_the_model(model: Any) -> None:
    ids = tokens(1, 9)
    with torch.no_grad():
        out = model(ids, use_cache=False, output_hidden_states=True)
        for heads in (MedusaHeads(model, 2), MedusaHeads(model, 2, sees_token=False, own_layers=True)):
            logits = heads(out.hidden_states[-1][0], ids[0])
            torch.testing.assert_close(logits, out.logits.expand(2, -1, -1), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in heads.parameters()) == 2 * (32 * 32 + 32 + 96 * 32)


def test_files_bring_the_same_heads_back(model: Any, heads: MedusaHeads, tmp_path: Path) -> None:
    heads.save(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "medusa_heads.json",
        "medusa_heads.safetensors",
    ]
    again = MedusaHeads.load(tmp_path / "new", model)
    assert again.rates == heads.rates
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), heads.parameters(), strict=True))
    with pytest.raises(
        InputError, match="hidden size 32 and 96 tokens, and this one has hidden size 32 and 64"
    ):
        MedusaHeads.load(tmp_path / "new", llama(vocab_size=64))
    with pytest.raises(InputError, match="train heads for it"):
        llama(vocab_size=64).generate(
            tokens(1, 5) % 64, **GREEDY, custom_generate=TreeSpeculation(Medusa(heads))
        )
    with pytest.raises(CheckpointError, match="train-heads"):
        MedusaHeads.load(tmp_path, model)
    about = tmp_path / "new" / "medusa_heads.json"
    record = json.loads(about.read_text())
    about.write_text(json.dumps({**record, "version": 2}))
    with pytest.raises(CheckpointError, match="newer"):
        MedusaHeads.load(tmp_path / "new", model)
    about.write_text(json.dumps({**record, "num_heads": 2}))
    with pytest.raises(CheckpointError, match="cannot be used"):
        MedusaHeads.load(tmp_path / "new", model)
    about.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be used"):
        MedusaHeads.load(tmp_path / "new", model)


def test_a_save_that_fails_leaves_the_old_heads(
    model: Any, heads: MedusaHeads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MedusaHeads(model, 2).save(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CheckpointError, match="no space left"):
        heads.save(tmp_path)
    monkeypatch.undo()
    assert MedusaHeads.load(tmp_path, model).num_heads == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_heads_learn_on_what_the_model_writes(
    model: Any, said: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[torch.Tensor] = []
    real = rates.hidden_states
    for user in (training, rates):
        monkeypatch.setattr(user, "hidden_states", lambda model, ids: read.append(ids[0]) or real(model, ids))
    model.generation_config.eos_token_id = end = int(said[0, 20])
    try:
        train_heads(model, said[:8], num_heads=1, context=24, epochs=1)
    finally:
        model.generation_config.eos_token_id = 2
    first = 6 + int((said[0, 6:] == end).nonzero()[0])
    assert len(read) == 16 and len(read[0]) == first + 1 < 24 and read[0][-1] == end
    starts = [piece[None, :6] for text in said[:8] for piece in text.split(24)[:2]]
    settings = {**GREEDY, "max_new_tokens": 18, "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    for row, start in zip(read, starts, strict=True):
        assert torch.equal(row, model.generate(start, **settings)[0, : len(row)])


def test_training_goes_on_from_a_checkpoint(model: Any, said: torch.Tensor, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(
        num_heads=1, context=32, batch_size=8, output_dir=tmp_path, targets="model"
    )
    train_heads(model, said, epochs=1, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    train_heads(model, said, epochs=2, resume=True, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-12"]


def test_what_cannot_be_trained_or_drafted_is_said(
    model: Any, heads: MedusaHeads, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="tokenizer"):
        train_heads(model, ["some text"])
    with pytest.raises(InputError, match="token ids"):
        train_heads(model, torch.rand(3, 40))
    with pytest.raises(InputError, match="more text"):
        train_heads(model, tokens(1, 3))
    with pytest.raises(InputError, match="too few"):
        train_heads(model, tokens(1, 30), targets="text")
    with pytest.raises(InputError, match="no text has 512 tokens"):
        train_heads(model, tokens(1, 30))
    with pytest.raises(ConfigError, match="targets"):
        train_heads(model, tokens(1, 30), targets="words")
    with pytest.raises(ConfigError, match="output_dir"):
        train_heads(model, tokens(1, 30), resume=True)
    with pytest.raises(ConfigError, match="4 deep and there are 3 heads"):
        Medusa(heads, Tree(((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0))))
    with pytest.raises(ConfigError, match="measure the heads"):
        Medusa(MedusaHeads(model, 2))
    with pytest.raises(ConfigError, match="at least one head"):
        MedusaHeads(model, 0)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"linearize\[train\]"):
        train_heads(model, tokens(4, 60))


def test_the_command_trains_heads_that_generate_uses(run: Any, folder: Path, tmp_path: Path) -> None:
    """A row of shares for each head, on stdout; the model's folder holds the heads, and nothing else new."""
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(3):
        (texts / f"{i}.py").write_text("\n".join(f"def f{j}(x): return x + {j * i}" for j in range(60)))
    (texts / "picture.bin").write_bytes(b"\xff\xfe\x00")
    settings = ("--data", texts, "--num-heads", 2, "--context", 32, "--max-tokens", 1500)
    result = run("train-heads", model, *settings, "--epochs", 8, "--learning-rate", 2e-2)
    assert result.code == 0, result.err
    assert sum(line.count("head 1") + line.count("head 2") for line in result.out.splitlines()) == 2
    assert "2 heads written to" in result.out
    new = {path.name for path in model.iterdir()} - {path.name for path in folder.iterdir()}
    assert new == {"medusa_heads.json", "medusa_heads.safetensors"}
    said = run("generate", model, "--prompt", "def f", "--max-new-tokens", 20)
    drafted = run("generate", model, "--prompt", "def f", "--max-new-tokens", 20, "--speculative", "medusa")
    assert drafted.code == 0 and drafted.out == said.out
    for arguments, message in (
        (("train-heads", model, "--data", tmp_path / "none"), "cannot read the text"),
        (("train-heads", "demo", "--data", texts), "--out DIR"),
        (("train-heads", model, "--data", texts, "--targets", "words"), "targets"),
    ):
        result = run(*arguments)
        assert result.code == 1 and message in result.err.splitlines()[-1]


def test_text_is_taken_from_many_files(folder: Path, tmp_path: Path) -> None:
    """Parts of twenty of thirty files, none of them whole, the same for the same seed."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"value{i} = " * 60)
    taken = text_tokens([tmp_path], tokenizer, 320, 16, 0)
    assert [len(ids) for ids in taken] == [16] * 20
    assert len({tuple(ids.sort().values.tolist()) for ids in taken}) == 20
    again = text_tokens([tmp_path], tokenizer, 320, 16, 0)
    assert all(torch.equal(a, b) for a, b in zip(taken, again, strict=True))
    other = text_tokens([tmp_path], tokenizer, 320, 16, 1)
    assert any(not torch.equal(a, b) for a, b in zip(taken, other, strict=True))
