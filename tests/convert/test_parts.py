"""`lz.measure_parts`: each line is what a model with these parts measures, its parameters included."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from live_models import bert, converted, llama, snapshot, tokens, wake
from rich.console import Console
from torch import nn

import linearize as lz
from linearize.convert.parts import stages
from linearize.errors import InputError, InvalidModelError
from linearize.evaluation.card import card
from linearize.evaluation.parts import Parts
from linearize.planning.config import LinearizeConfig
from linearize.planning.state import state_of

IDS = tokens(1, 300)[0]
LENGTHS = (64, 128)
SIZES = {"window": 32, "salient": 16}


def measured(model: nn.Module) -> list[float | None]:
    return [row.model.perplexity for row in lz.evaluate(model, IDS, lengths=LENGTHS, speed=False).rows]


def without_attention(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "o_proj"):
            nn.init.zeros_(module.o_proj.weight)  # type: ignore[arg-type]
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Its convolution holds values, as after calibration."""
    return wake(lz.linearize(llama(), mechanism="augmented", options=SIZES, conv_taps=4))


@pytest.fixture(scope="module")
def parts(model: nn.Module) -> Parts:
    return lz.measure_parts(model, IDS, lengths=LENGTHS, name="a text")


def test_every_line_is_what_such_a_model_measures(parts: Parts, model: nn.Module) -> None:
    assert [row.name for row in parts.rows] == [
        "softmax, these weights",
        "the last 48 tokens, the first 4",
        "+ salient tokens",
        "+ linear part",
        "+ convolution",
        "no attention",
    ]
    simple: Any = {"window": 48, "sinks": 4, "salient": 0, "tail": False}
    of = {"mechanism": "augmented", "augmentation": False}
    with_tail = lz.linearize(llama(), options=SIZES, **of)
    with_tail.load_state_dict({n: x for n, x in model.state_dict().items() if "conv_weight" not in n})
    for row, wanted in zip(
        parts.rows,
        (
            llama(),
            lz.linearize(llama(), options=simple, **of),
            lz.linearize(llama(), options=SIZES | {"tail": False}, **of),
            with_tail,
            model,
            without_attention(llama()),
        ),
        strict=True,
    ):
        assert row.perplexity == pytest.approx(measured(wanted), rel=1e-5), row.name
    sizes = [row.state_bytes for row in parts.rows]
    assert sizes[0] is None and sizes[5] is None and sizes[1] == sizes[2] == sizes[3] == sizes[4]
    assert parts.lengths == LENGTHS and parts.tokens == 252


def test_a_reference_is_the_first_line() -> None:
    found = lz.measure_parts(converted("llama"), IDS, reference=llama(), lengths=(64,))
    assert found.rows[0].name == "original"
    assert found.rows[0].perplexity == pytest.approx(measured(llama())[:1], rel=1e-3)


def test_a_part_that_is_trained_keeps_what_it_learned() -> None:
    """`softmax_window` names no parts: it stands as a whole before its convolution, with its parameters."""
    model = lz.linearize(llama(), mechanism="softmax_window", augmentation=True, options={"window": 24})
    wake(model)
    found = lz.measure_parts(model, IDS, lengths=(64,))
    assert [row.name for row in found.rows][2:] == ["softmax_window", "+ convolution", "no attention"]
    bare = lz.linearize(llama(), mechanism="softmax_window", augmentation=False, options={"window": 24})
    bare.load_state_dict({n: x for n, x in model.state_dict().items() if n in bare.state_dict()})
    for row, wanted in zip(found.rows[2:4], (bare, model), strict=True):
        alone = lz.evaluate(wanted, IDS, lengths=(64,), speed=False).rows[0].model.perplexity
        assert row.perplexity == pytest.approx((alone,), rel=1e-6)
    assert found.rows[2].perplexity != found.rows[3].perplexity


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["+ salient tokens", "+ convolution"]),
        ({"augmentation": False}, ["+ salient tokens"]),
        ({"options": {"salient": 0}}, ["+ convolution"]),
        ({"options": {"salient": 0}, "augmentation": False}, ["+ linear part"]),
        ({"options": {"salient": 0, "tail": False}, "augmentation": False}, ["augmented"]),
    ],
)
def test_parts_that_a_model_lacks_have_no_line_and_the_last_is_the_model(settings: Any, names: Any) -> None:
    config = LinearizeConfig(mechanism="augmented", **settings)
    found = list(stages(config))
    # Parts of a mechanism come in its order; there may be more of them than these.
    assert [name for name, _ in found if name in names] == names
    assert found[-1][1] == config


def test_the_model_stays_as_it_was(model: nn.Module) -> None:
    before, wanted = snapshot(model), measured(model)
    lz.measure_parts(model, IDS, lengths=(64,))
    assert snapshot(model) == before and measured(model) == wanted


def test_the_card_shows_them_while_the_weights_are_those(parts: Parts, model: Any) -> None:
    parts.attach(model)
    lz.evaluate(model, IDS, lengths=(64,), speed=False, name="a text").attach(model)
    parts.attach(model)
    assert len(state_of(model).measured) == 2
    text = card(model)
    assert "What each part gives, on a text" in text and "Not measured" not in text
    for row in parts.rows:
        assert f"| {row.name} | {row.perplexity[0]:.2f} |" in text
    assert Parts.from_dict(json.loads(json.dumps(parts.to_dict()))) == parts
    assert Parts.from_dict({**parts.to_dict(), "version": 9}) is None
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    assert "What each part gives" not in card(model)
    with pytest.raises(InputError, match="have changed"):
        parts.attach(model)
    with torch.no_grad():
        model.lm_head.weight[0] -= 1


def test_it_prints(parts: Parts) -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(dataclasses.replace(parts))
    assert f"{parts.rows[1].perplexity[1]:.2f}" in console.export_text()


@pytest.mark.parametrize(
    ("build", "match"), [(llama, "not converted"), (lambda: lz.linearize(bert()), "encoder")]
)
def test_what_has_no_parts_is_refused(build: Any, match: str) -> None:
    with pytest.raises(InvalidModelError, match=match):
        lz.measure_parts(build(), IDS, lengths=(64,))
