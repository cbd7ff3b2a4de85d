"""`lz.evaluate` on decoders and encoder-decoders: every figure against a second, naive count of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import VOCAB, bart, bert, converted, gptj, llama, plain, tokens
from rich.console import Console
from torch import Tensor, nn

import linearize as lz
from linearize.errors import CheckpointError, ConfigError, InputError, InvalidModelError, MissingExtraError
from linearize.evaluation import Evaluation, Measurement

STREAM = tokens(1, 70)[0]


def quick(model: nn.Module, data: Any = STREAM, **settings: Any) -> Evaluation:
    return lz.evaluate(model, data, **{"lengths": (8, 16), "speed": False, **settings})


def same(a: Measurement, b: Measurement) -> bool:
    """Equal but for the rounding of sums in another order."""
    close = math.isclose(a.model.perplexity or 0, b.model.perplexity or 0, rel_tol=1e-5)
    return close and (a.length, a.tokens) == (b.length, b.tokens)


@torch.no_grad()
def naive(model: nn.Module, reference: nn.Module, length: int, positions: list[int]) -> tuple[float, ...]:
    """Perplexities, agreement and KL by running each token's own context alone."""
    losses, others, agreed, kls = [], [], [], []
    for position in positions:
        context = STREAM[position // length * length : position][None]
        p, q = (m(context, use_cache=False).logits[0, -1].log_softmax(-1) for m in (model, reference))
        losses.append(-p[STREAM[position]].item())
        others.append(-q[STREAM[position]].item())
        agreed.append(float(p.argmax() == q.argmax()))
        kls.append(torch.nn.functional.kl_div(p, q, log_target=True, reduction="sum").item())
    count = len(positions)
    return (
        math.exp(sum(losses) / count),
        math.exp(sum(others) / count),
        sum(agreed) / count,
        sum(kls) / count,
    )


@pytest.mark.parametrize("lengths", ((8, 16), (6, 16)))
def test_the_figures_are_what_running_every_context_alone_gives(lengths: tuple[int, ...]) -> None:
    """Lengths that divide each other and lengths that do not; the same tokens count at both."""
    model, reference = converted("llama").double(), llama().double()
    scored = [p for p in range(64) if p % lengths[0] and p % lengths[1]]
    evaluation = quick(model, reference=reference, lengths=lengths)
    assert [row.length for row in evaluation.rows] == list(lengths)
    for row in evaluation.rows:
        assert row.length is not None and row.reference is not None and row.tokens == len(scored)
        found = (row.model.perplexity, row.reference.perplexity, row.agreement, row.kl)
        assert found == pytest.approx(naive(model, reference, row.length, scored), rel=1e-9)
    first, second = evaluation.rows
    assert first.reference != second.reference, "more context changes what softmax predicts"


def test_a_model_rewritten_to_the_same_agrees_with_itself_everywhere() -> None:
    row = quick(converted("llama", mechanism="softmax"), reference=llama()).rows[0]
    assert row.agreement == 1 and row.kl == pytest.approx(0, abs=1e-6)
    assert row.reference is not None and row.model.perplexity == pytest.approx(row.reference.perplexity)


def test_without_a_reference_an_unconverted_model_is_measured_alone() -> None:
    row = quick(llama()).rows[0]
    assert row.reference is None and row.agreement is None and row.kl is None
    assert row.model.perplexity == pytest.approx(
        quick(converted("llama"), reference=llama()).rows[0].reference.perplexity  # type: ignore[union-attr]
    )


class Words:
    """A tokenizer: numbers between blanks."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def padded(ids: Tensor) -> dict[str, Tensor]:
    """On the left, with tokens that must not count."""
    return {
        "input_ids": torch.cat([torch.full((1, 5), 7), ids[None]], 1),
        "attention_mask": (torch.arange(len(ids) + 5) >= 5).long()[None],
    }


@pytest.mark.parametrize(
    "data",
    (
        STREAM.reshape(2, 35),
        [STREAM[:30], STREAM[30:]],
        [STREAM[:40].reshape(2, 20), STREAM[40:]],
        [STREAM.tolist()],
        " ".join(map(str, STREAM.tolist())),
        [" ".join(map(str, part.tolist())) for part in STREAM.split(50)],
        [padded(STREAM[:33]), {"input_ids": STREAM[33:].tolist()}],
        padded(STREAM),
    ),
    ids=("batch", "several", "batches", "lists", "text", "texts", "dicts", "dict"),
)
def test_the_same_tokens_in_any_form_give_the_same_figures(data: Any) -> None:
    model = llama()
    rows = quick(model, data, tokenizer=Words()).rows
    assert all(same(a, b) for a, b in zip(rows, quick(model).rows, strict=True))


def test_how_many_run_at_once_changes_nothing() -> None:
    model = llama()
    for count in (1, 24, 4096):
        rows = quick(model, batch_tokens=count).rows
        assert all(same(a, b) for a, b in zip(rows, quick(model).rows, strict=True))


def test_no_more_tokens_are_used_than_asked_for() -> None:
    model = llama()
    assert quick(model, max_tokens=40).rows == quick(model, STREAM[:40]).rows
    assert quick(model, max_tokens=40).rows[0].tokens == 28  # 32 of them, without those that begin a window


def test_lengths_default_to_those_that_data_and_model_have_room_for() -> None:
    model = llama(max_position_embeddings=600)
    evaluation = lz.evaluate(model, tokens(1, 700), speed=False)
    assert [row.length for row in evaluation.rows] == [128, 512]


def test_speed_and_memory_of_both_models() -> None:
    model, reference = converted("llama"), llama()
    evaluation = lz.evaluate(model, tokens(1, 64), reference=reference, lengths=(32, 64), decode_tokens=4)
    for row in evaluation.rows:
        assert row.reference is not None and row.length is not None
        for figures in (row.model, row.reference):
            assert figures.forward_tokens_per_second and figures.decode_tokens_per_second
        # keys and values, 2 layers, 2 heads, 8 features, 4 bytes
        assert row.reference.cache_bytes == 2 * 2 * 2 * 8 * 4 * row.length
    with torch.no_grad():
        cache = model(tokens(1, 9), use_cache=True).past_key_values
    held = sum(layer.states.nbytes for layer in cache.layers)
    assert [row.model.cache_bytes for row in evaluation.rows] == [held, held]


def test_both_models_are_left_as_they_were() -> None:
    model, reference = converted("llama").train(), llama().train()
    state = torch.get_rng_state()
    quick(model, reference=reference)
    assert all(m.training for m in (*model.modules(), *reference.modules()))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapted_model_is_measured_with_its_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = converted("llama")
    wanted = quick(model).rows
    adapted = peft.get_peft_model(model, lz.lora_config(model))
    assert all(same(a, b) for a, b in zip(quick(adapted).rows, wanted, strict=True))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    evaluation = quick(adapted)
    assert not same(evaluation.rows[0], wanted[0])
    with pytest.raises(InvalidModelError, match="merge"):
        evaluation.attach(adapted)


def test_dropout_is_off_in_both_models_while_they_are_measured() -> None:
    data = [labelled(2, 11)]
    quiet = lz.evaluate(bart(), data, reference=bart(), speed=False).rows
    assert lz.evaluate(bart().train(), data, reference=bart().train(), speed=False).rows == quiet


def broken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.get_input_embeddings().weight[int(STREAM[50])] = math.nan  # type: ignore[operator]
    return model


def test_nan_is_an_error_that_names_the_batch() -> None:
    with pytest.raises(
        InputError, match="the model's logits are NaN in the batch of tokens 48 to 63, length 16"
    ):
        quick(broken(llama()), lengths=(16,), batch_tokens=16)
    with pytest.raises(InputError, match="the reference's logits are NaN in the batch of tokens 48 to 63"):
        quick(llama(), reference=broken(llama()), lengths=(16,), batch_tokens=16)


@pytest.mark.parametrize(
    "data, settings, error, match",
    (
        ([], {}, InputError, "no token"),
        ("", {"tokenizer": Words()}, InputError, "no token"),
        (STREAM[:15], {}, InputError, "15 tokens, fewer than a window of 16"),
        (STREAM, {"lengths": None}, InputError, "room for 70 tokens, and the shortest window is 128"),
        (STREAM + VOCAB, {}, InputError, f"model has {VOCAB}: the tokenizer is another model's"),
        (-STREAM, {}, InputError, "the token -"),
        ("1 2 3", {}, InputError, "tokenizer="),
        (3, {}, InputError, "got int"),
        ([None], {}, InputError, "data is token ids"),
        ([{"input_ids": STREAM, "pixel_values": STREAM}], {}, InputError, "pixel_values"),
        ([{"x": STREAM}], {}, InputError, "input_ids"),
        (STREAM, {"reference": llama(vocab_size=VOCAB + 8)}, InputError, "another vocabulary"),
        (STREAM, {"reference": llama(vocab_size=20)}, InputError, "reference has 20"),
        (STREAM, {"reference": bert()}, InvalidModelError, "reference .BertModel. of the kind enc"),
        (STREAM, {"lengths": (1, 8)}, ConfigError, "2 or more"),
        (STREAM, {"lengths": ()}, ConfigError, "2 or more"),
        (STREAM, {"max_tokens": 0}, ConfigError, "max_tokens"),
        (STREAM, {"batch_tokens": 0}, ConfigError, "batch_tokens"),
        (STREAM, {"decode_tokens": 0}, ConfigError, "speed=False"),
    ),
)
def test_what_cannot_be_measured_is_refused(
    data: Any, settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        quick(llama(), data, **settings)


def test_a_length_beyond_what_a_model_can_take_is_refused() -> None:
    model = gptj()
    with pytest.raises(InputError, match="does not run on the batch of tokens 0 to 127, length 128"):
        lz.evaluate(model, tokens(1, 128), lengths=(128,), speed=False)


def test_a_module_that_says_nothing_about_itself_is_refused() -> None:
    with pytest.raises(InvalidModelError, match="transformers models, got PlainNet"):
        quick(plain())


# ---------------------------------------------------------------------------------- encoder-decoders


def labelled(batch: int, length: int) -> dict[str, Tensor]:
    labels = tokens(batch, length)
    labels[0, -3:] = -100
    return {"input_ids": tokens(batch, 20), "labels": labels}


@torch.no_grad()
def test_the_labels_of_an_encoder_decoder_are_scored() -> None:
    model, reference, batches = converted("bart"), bart(), [labelled(2, 11), labelled(3, 9)]
    (row,) = lz.evaluate(model, batches, reference=reference).rows
    real = [batch["labels"] != -100 for batch in batches]
    logits = [
        [m(**batch).logits[mask] for batch, mask in zip(batches, real, strict=True)]
        for m in (model, reference)
    ]
    p, q = (torch.cat(parts).log_softmax(-1) for parts in logits)
    targets = torch.cat([batch["labels"][mask] for batch, mask in zip(batches, real, strict=True)])
    assert row.length is None and row.tokens == 2 * 11 + 3 * 9 - 6 == len(targets)
    loss = torch.nn.functional.nll_loss
    assert row.reference is not None
    assert row.model.perplexity == pytest.approx(loss(p, targets).exp().item(), rel=1e-4)
    assert row.reference.perplexity == pytest.approx(loss(q, targets).exp().item(), rel=1e-4)
    assert row.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    assert row.kl == pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-3)
    assert row.model.forward_tokens_per_second and row.model.cache_bytes is None


def test_one_dict_is_one_batch() -> None:
    (row,) = lz.evaluate(bart(), labelled(2, 11), speed=False).rows
    assert row.tokens == 19


@pytest.mark.parametrize(
    "data, settings, error, match",
    (
        ([], {}, InputError, "no label"),
        ([{**labelled(1, 4), "labels": torch.full((1, 4), -100)}], {}, InputError, "no label"),
        ([{"input_ids": tokens(1, 4)}], {}, InputError, "batch 0 has none"),
        ([labelled(1, 4), {"input_ids": tokens(1, 4)}], {}, InputError, "batch 1 has none"),
        (tokens(2, 9), {}, InputError, "dicts of its keyword arguments"),
        ([{**labelled(1, 4), "labels": torch.full((1, 4), VOCAB)}], {}, InputError, f"the token {VOCAB}"),
        ([{**labelled(1, 4), "input_ids": torch.full((1, 4), VOCAB)}], {}, InputError, f"the token {VOCAB}"),
        (labelled(1, 4), {"lengths": (4, 8)}, ConfigError, "leave out lengths"),
    ),
)
def test_what_an_encoder_decoder_cannot_be_measured_on_is_refused(
    data: Any, settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        lz.evaluate(bart(), data, speed=False, **settings)


# --------------------------------------------------------------------------------------- the figures


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    data = tokens(1, 64)
    return lz.evaluate(
        converted("llama"), data, reference=llama(), lengths=(16, 64), decode_tokens=2, name="a|b [c]"
    )


def test_json_and_back(evaluation: Evaluation) -> None:
    assert Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation


@pytest.mark.parametrize(
    "change, match",
    (
        ({"version": 9}, "version 9"),
        ({"kind": "cat"}, "cat"),
        ({"rows": [{}]}, "no record"),
        ({"more": 1}, "no record"),
        ({"rows": 3}, "no record"),
    ),
)
def test_what_is_no_evaluation_is_refused(evaluation: Evaluation, change: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Evaluation.from_dict({**evaluation.to_dict(), **change})
    with pytest.raises(InputError, match="no record"):
        Evaluation.from_dict([])  # type: ignore[arg-type]


def test_the_table_has_a_line_for_each_model_and_length(evaluation: Evaluation) -> None:
    console = Console(record=True, width=250)
    console.print(evaluation)
    text = console.export_text()
    assert "a|b [c]" in text and "same tokens are scored at every length" in text and "float32 on cpu" in text
    lines = [line for line in text.splitlines() if "LlamaForCausalLM" in line]
    assert len(lines) == 4 and "original" in lines[0] and "augmented_paper" in lines[1]
    assert f"{evaluation.at(64).model.perplexity:.2f}" in lines[3]
    assert f"{evaluation.at(64).agreement:.1%}" in lines[3] and "%" not in lines[2]
    assert "cosine" not in text, "a column that would be empty is left out"


def test_a_row_is_found_by_its_length(evaluation: Evaluation) -> None:
    assert evaluation.at(64) is evaluation.rows[1]
    with pytest.raises(InputError, match=r"\[16, 64\]"):
        evaluation.at(32)


def test_the_plot_is_an_image_with_curves_of_both(evaluation: Evaluation, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    evaluation.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    evaluation.plot(tmp_path / "curves.svg")
    drawing = (tmp_path / "curves.svg").read_text()
    for label in (
        "perplexity",
        "forward pass, ms",
        "decoded token, ms",
        "cache, MB",
        "LlamaForCausalLM, softmax, original",
        "LlamaForCausalLM, augmented",
    ):
        assert f"<!-- {label}" in drawing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "curves.svg"]


def test_what_cannot_be_drawn_or_written_leaves_no_file(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="png, svg, pdf"):
        evaluation.plot(tmp_path / "curves.txt")
    single = quick(llama(), lengths=(8,))
    with pytest.raises(InputError, match="two lengths"):
        single.plot(tmp_path / "curves.png")
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(CheckpointError, match=r"curves\.png"):
        evaluation.plot(tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"linearize\[eval\]"):
        evaluation.plot(tmp_path / "other.png")
