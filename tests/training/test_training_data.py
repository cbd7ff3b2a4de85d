"""Training data: what a user may give, what becomes of it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_models import VOCAB, bert, llama, plain, t5, tokens
from torch import Tensor

from linearize.errors import ConfigError, InputError
from linearize.training.data import Collate, TrainingData, training_data


class Letters:
    """A tokenizer: letters are ids from 3 on, 2 ends a text, `[1 ... 2]` is how an encoder wants it."""

    eos_token_id: int | None = 2

    def __init__(self, special: bool = False) -> None:
        self.special = special

    def __call__(self, text: str, max_length: int | None = None, **_: Any) -> dict[str, list[int]]:
        ids = [ord(letter) - ord("a") + 3 for letter in text]
        if self.special:
            ids = [1, *ids[: None if max_length is None else max_length - 2], 2]
        return {"input_ids": ids}


def blocks(rows: TrainingData) -> list[list[int]]:
    assert all(set(row) == {"input_ids"} for row in rows)
    return [row["input_ids"].tolist() for row in rows]


def test_texts_are_joined_with_end_tokens_and_cut_into_blocks() -> None:
    model = llama()
    rows = training_data(model, ["abc", "de", "fgh"], Letters(), context=4)
    assert blocks(rows) == [[3, 4, 5, 2], [6, 7, 2, 8]], "what is left of the last block is dropped"
    assert rows.tokens == 8
    short = training_data(model, "ab", Letters(), context=4)
    assert blocks(short) == [[3, 4, 2]], "unless it is all there is"
    endless = Letters()
    endless.eos_token_id = None
    assert blocks(training_data(model, ["abc", "d"], endless, context=4)) == [[3, 4, 5, 6]]


def test_ids_of_any_form_are_the_same_blocks() -> None:
    model, ids = llama(), tokens(1, 24)[0]
    wanted = [block.tolist() for block in ids.split(8)]
    batches = [ids.view(2, 12)[:, :4], ids.view(3, 8)[1:]]
    forms = (ids, ids.view(2, 12), [ids[:5], ids[5:]], iter([ids[:20], ids[20:]]), ids.tolist(), ids.int())
    for form in forms:
        assert blocks(training_data(model, form, context=8)) == wanted
    pieces = [ids[:4], ids[12:16], ids[8:16], ids[16:]]
    assert blocks(training_data(model, batches, context=24)) == [torch.cat(pieces).tolist()]
    rows = training_data(model, ids, context=8)
    assert training_data(model, rows, context=4) is rows


def test_an_encoder_reads_each_text_by_itself() -> None:
    rows = training_data(bert(), ["abc", "abcdefgh"], Letters(special=True), context=6)
    assert [row["input_ids"].tolist() for row in rows] == [[1, 3, 4, 5, 2], [1, 3, 4, 5, 6, 2]]
    batch = Collate.of(bert())(rows.rows)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert [len(row["input_ids"]) for row in training_data(bert(), tokens(2, 9), context=6)] == [6, 6]


def test_dicts_are_taken_apart_into_examples() -> None:
    ids, labels = tokens(3, 7), tokens(3, 5)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    rows = training_data(t5(), [batch, {name: value[:1] for name, value in batch.items()}])
    assert len(rows) == 4 and torch.equal(rows[1]["labels"], labels[1])
    assert rows.tokens == 7 + 4 + 7 + 7, "padding is no token"
    single = training_data(llama(), [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9, 10]}])
    assert len(single) == 2 and single[1]["input_ids"].tolist() == [8, 9, 10]
    assert len(training_data(plain(), {"x": torch.zeros(2, 4, 32)})) == 2


def test_rows_of_unequal_length_are_filled_up_where_nothing_counts() -> None:
    pairs = [
        {"input_ids": tokens(1, 5)[0], "attention_mask": torch.ones(5).long(), "labels": tokens(1, 3)[0]},
        {"input_ids": tokens(1, 3)[0], "attention_mask": torch.ones(3).long(), "labels": tokens(1, 4)[0]},
    ]
    batch = Collate(pad_token_id=9)(pairs)
    assert batch["input_ids"][1, 3:].tolist() == [9, 9]
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0, 0]
    assert batch["labels"][0].tolist()[3:] == [-100]
    plain_rows = [{"input_ids": tokens(1, 5)[0]}, {"input_ids": tokens(1, 3)[0]}]
    assert Collate(0)(plain_rows)["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    states = [{"x": torch.ones(2, 4)}, {"x": torch.ones(3, 4)}]
    assert Collate(0)(states)["x"].sum(-1).tolist() == [[4, 4, 0], [4, 4, 4]]


def test_rows_can_be_limited_and_held_out() -> None:
    rows = training_data(llama(), tokens(10, 8), context=8)
    assert [len(rows.first(n)) for n in (None, 80, 79, 24, 1)] == [10, 10, 9, 3, 1]
    training, held_out = rows.split(0.2)
    assert blocks(training) + blocks(held_out) == blocks(rows) and len(held_out) == 2
    assert [len(part) for part in rows.split(0.01)] == [9, 1]
    alone = rows.first(1)
    assert [blocks(part) for part in alone.split(0.5)] == [blocks(alone)] * 2


def wrong(ids: Tensor) -> dict[str, Any]:
    return {"input_ids": ids}


@pytest.mark.parametrize(
    "data, match",
    (
        ([], "0 token"),
        ("", "0 token|1 token"),
        (torch.tensor([5]), "1 token.*give more"),
        (tokens(1, 8)[0].float() + 0.5, "ids"),
        (tokens(2, 8) + VOCAB, rf"the id \d+, but the model's vocabulary has {VOCAB}.*another tokenizer"),
        (torch.tensor([4, -1, 5]), f"the id -1, but the model's vocabulary has {VOCAB}"),
        ({"input_ids": tokens(1, 8), "labels": tokens(1, 8) + VOCAB}, "labels have the id"),
        ({"input_ids": tokens(2, 8), "labels": tokens(1, 8)}, r"same first axis.*labels \[1, 8\]"),
        ({"input_ids": tokens(2, 8).float()}, "input_ids must be integers, got torch.float32"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "empty"),
        ({"input_ids": "text"}, "tensors or lists"),
        ([{"input_ids": tokens(1, 8)}, tokens(1, 8)], "mixes"),
        (5, "got int"),
        (None, "got NoneType"),
    ),
)
def test_what_is_no_data_is_refused_in_one_sentence(data: Any, match: str) -> None:
    with pytest.raises(InputError, match=match):
        training_data(llama(), data, Letters())


def test_what_does_not_fit_the_model_or_each_other_is_refused() -> None:
    with pytest.raises(InputError, match="give tokenizer="):
        training_data(llama(), ["some text"])
    with pytest.raises(InputError, match="learns from pairs"):
        training_data(t5(), tokens(2, 8))
    with pytest.raises(ConfigError, match="context must be 2 tokens or more, got 1"):
        training_data(llama(), tokens(2, 8), context=1)
    with pytest.raises(InputError, match="different inputs"):
        Collate(0)([{"input_ids": tokens(1, 3)[0]}, {"x": torch.ones(3)}])
    with pytest.raises(InputError, match="more than its length"):
        Collate(0)([{"x": torch.ones(2, 4)}, {"x": torch.ones(2, 5)}])
