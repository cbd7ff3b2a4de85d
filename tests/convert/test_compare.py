"""`lz.compare`: every line is what a user measures of a model converted so, and the model given stays."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from live_models import bart, bert, converted, llama, snapshot, tokens
from rich.console import Console
from torch import nn

import linearize as lz
from linearize.convert.compare import Comparison
from linearize.errors import ConfigError, InputError, InvalidModelError, RefusedError
from linearize.planning.config import LinearizeConfig

IDS = tokens(1, 300)[0]
LENGTHS = (64, 128)
SMALL = {"mechanism": "augmented", "options": {"window": 32, "salient": 16}}
HYBRID = {**SMALL, "keep_softmax": (0,)}
TAIL = {"mechanism": "softmax_window", "options": {"window": 60}}


def quick(model: nn.Module, configs: Any, **settings: Any) -> Comparison:
    return lz.compare(model, IDS, configs, **{"lengths": LENGTHS, "speed": False, **settings})


def perplexities(model: nn.Module) -> list[float | None]:
    found = lz.evaluate(model, IDS, lengths=LENGTHS, speed=False)
    return [row.model.perplexity for row in found.rows]


def of(comparison: Comparison, name: str) -> list[float | None]:
    return [figures.perplexity for figures in comparison.row(name).figures.values()]


@pytest.fixture(scope="module")
def found() -> Comparison:
    return lz.compare(llama(), IDS, [SMALL, HYBRID, TAIL], lengths=LENGTHS, decode_tokens=4)


@pytest.mark.slow
def test_every_line_is_what_a_model_converted_so_measures(found: Comparison) -> None:
    names = [row.name for row in found.rows]
    assert names[:2] == ["softmax, original", "augmented salient=16 window=32"]
    assert found.tokens == 252 and found.lengths == LENGTHS
    assert of(found, names[0]) == pytest.approx(perplexities(llama()), rel=1e-6)
    for row in found.rows[1:]:
        model = lz.linearize(llama(), config=row.config)
        assert of(found, row.name) == pytest.approx(perplexities(model), rel=1e-6), row.name
        measured = lz.evaluate(model, IDS, lengths=LENGTHS, decode_tokens=4).at(128).model
        assert row.figures[128].cache_bytes == measured.cache_bytes
        if not model._linearize.config.keep_softmax:  # type: ignore[union-attr]
            assert row.state_bytes == measured.cache_bytes
        first = row.figures[64]
        assert (first.decode_tokens_per_second or 0) > 0 < (first.forward_tokens_per_second or 0)


def test_beside_each_stands_the_widest_window_that_needs_no_more_bytes(found: Comparison) -> None:
    for row in found.rows:
        if row.baseline is None:
            continue
        plain = found.row(row.baseline)
        assert plain.config is not None and row.config is not None
        assert plain.config.keep_softmax == row.config.keep_softmax
        options, window = plain.config.options, plain.config.options["window"]
        assert (options["salient"], options["sinks"], plain.config.augments) == (0, 4, False)
        hybrid = ", softmax in 0" if plain.config.keep_softmax else ""
        assert plain.name == f"the last {window} tokens, the first 4{hybrid}"
        wider = lz.linearize(llama(), config=plain.config, options={**options, "window": window + 1})
        more = lz.evaluate(wider, IDS, lengths=(64,), decode_tokens=1).at(64).model.cache_bytes or 0
        assert (plain.figures[64].cache_bytes or 0) <= (row.figures[64].cache_bytes or 0) < more
        assert plain.state_bytes is not None and plain.state_bytes <= (row.state_bytes or 0)
    assert sum(row.baseline is not None for row in found.rows) == 3


def test_the_gap_that_is_closed_is_in_log_perplexity(found: Comparison) -> None:
    row = found.rows[1]
    ours, plain, original = (
        math.log(of(found, name)[1] or 0) for name in (row.name, row.baseline or "", found.rows[0].name)
    )
    wanted = 1 - (ours - original) / (plain - original) if plain > original else None
    assert found.closed(row, 128) == (None if wanted is None else pytest.approx(wanted))
    assert found.closed(found.rows[0], 128) is None


def test_it_prints_and_is_json(found: Comparison) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    text = console.export_text()
    for row in found.rows:
        assert f"{row.figures[128].perplexity:.2f}" in text and row.name in text
    data = json.loads(json.dumps(found.to_dict()))
    assert LinearizeConfig.from_dict(data["rows"][1]["config"]) == LinearizeConfig.from_dict(SMALL)


def test_the_model_stays_as_it_was_and_lends_its_weights() -> None:
    model = llama().train()
    before = snapshot(model)
    quick(model, [SMALL, {"mechanism": "relu"}], calibrate=[tokens(2, 40)])
    assert snapshot(model) == before
    for name, weight in llama().named_parameters():
        assert torch.equal(model.get_parameter(name), weight)


def test_with_batches_each_setting_is_calibrated_first() -> None:
    calm = {"mechanism": "augmented_paper", "group_size": 8}
    nothing = {"mechanism": "relu"}
    found = quick(llama(), [calm, nothing], calibrate=[tokens(2, 40)])
    model = lz.linearize(llama(), config=calm)
    lz.calibrate(model, [tokens(2, 40)])
    assert of(found, "augmented_paper group_size=8") == pytest.approx(perplexities(model), rel=1e-5)
    assert of(found, "relu") == pytest.approx(perplexities(lz.linearize(llama(), config=nothing)), rel=1e-6)


def test_of_a_converted_model_softmax_and_what_it_is_come_first() -> None:
    model = converted("llama")
    before = snapshot(model)
    found = quick(model, [SMALL])
    names = [row.name for row in found.rows]
    assert names[:2] == ["softmax, these weights", "augmented_paper group_size=4, as given"]
    assert of(found, names[0]) == pytest.approx(perplexities(llama()), rel=1e-5)
    assert of(found, names[1]) == pytest.approx(perplexities(model), rel=1e-6)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("build", "configs", "error", "match"),
    [
        (bert, [SMALL], InvalidModelError, "lz.evaluate|linearize.evaluate"),
        (bart, [SMALL], InvalidModelError, "encoder-decoder"),
        (llama, [], ConfigError, "one or more different"),
        (llama, [SMALL, dict(SMALL)], ConfigError, "one or more different"),
        (llama, [SMALL, {"mechanism": "linformer"}], RefusedError, "cannot carry causal"),
        (llama, [{"mechanism": "augmented", "window": 3}], ConfigError, "unknown config field"),
        (lambda: converted("llama", keep_softmax=(0,)), [SMALL], InvalidModelError, "layers.0"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_error(
    build: Any, configs: Any, error: type[Exception], match: str
) -> None:
    model = build()
    before = snapshot(model)
    with pytest.raises(error, match=match):
        quick(model, configs)
    assert snapshot(model) == before


def test_data_that_is_too_short_is_said() -> None:
    with pytest.raises(InputError, match="fewer than a window"):
        quick(llama(), [SMALL], lengths=(512,))
