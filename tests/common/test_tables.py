"""Results print as tables, in text and in notebooks, and say of layers that are alike one thing."""

from __future__ import annotations

import io
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import linearize as lz
from linearize.common.progress import bar, shows, steps
from linearize.common.tables import Grid, alike, as_html

IDS = torch.randint(3, 60, (4, 64), generator=torch.Generator().manual_seed(0))


def tiny(layers: int = 3) -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=layers)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()


def test_layers_that_are_alike_are_one_row() -> None:
    rows = [(f"model.layers.{i}.self_attn", "global" if i % 6 == 5 else "window", "x") for i in range(12)]
    rows += [("visual.attn", "window", "x"), ("blocks.3", "window", "x"), ("blocks.3 #1", "window", "x")]
    assert alike(rows) == [
        ["model.layers.0-4,6-10.self_attn", "window", "x"],
        ["model.layers.5,11.self_attn", "global", "x"],
        ["visual.attn", "window", "x"],
        ["blocks.3", "window", "x"],
        ["blocks.3 #1", "window", "x"],
    ]


class _Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_a_piece_of_a_page_and_escaped() -> None:
    page = _Page(as_html([Grid(("<b>", "c"), [("</table><script>", "2")]), "a & <i>"]))
    assert set(page.tags) == {"div", "table", "thead", "tbody", "tr", "th", "td", "p"}
    assert "</table><script>" in page.text and "a & <i>" in page.text


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[Any, str]]:
    """Results of every kind that is cheap, with a word that each must say."""
    model, converted = tiny(), lz.linearize(tiny())
    return {
        "inspect": (lz.inspect(model), "model.layers.0-2.self_attn"),
        "calibrate": (lz.calibrate(lz.linearize(tiny()), IDS), "linear_attention"),
        "plan": (lz.plan(model, IDS, budget=1), "kept softmax"),
        "evaluate": (lz.evaluate(model, IDS, lengths=16, speed=False), "perplexity"),
        "compare": (lz.compare(model, IDS, "local", lengths=16, speed=False), "gap closed"),
        "parts": (lz.measure_parts(converted, IDS, lengths=16), "no attention"),
        "transfer": (lz.transfer(lz.linearize(tiny()), IDS, max_steps=1, context=32), "loss before"),
    }


@pytest.mark.parametrize("name", ["inspect", "calibrate", "plan", "evaluate", "compare", "parts", "transfer"])
def test_every_result_prints_as_a_table_and_in_notebooks(
    name: str, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # no cell is broken over lines
    result, word = results[name]
    said, page = str(result), _Page(result._repr_html_())
    assert word in said and len(said.splitlines()) > 3
    assert word in page.text and "table" in page.tags and not {"style", "script", "html"} & set(page.tags)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_on_terminals_alone_and_gone_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, there in ((io.StringIO(), False), (_Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert shows(None) is there and shows(True) and not shows(False)
        with steps("linearize", 2, None) as step, bar("calibrate", 10, None, "tokens") as tick:
            step("searching")
            tick(20)
        assert ("searching" in stream.getvalue(), "calibrate" in stream.getvalue()) == (there, there)
    assert stream.getvalue().rstrip(" \r").endswith("\r") or stream.getvalue().endswith("\r")


def test_conversion_and_calibration_show_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream := _Terminal())
    model = lz.linearize(tiny(1), calibrate=IDS)
    lz.evaluate(model, IDS, lengths=16, speed=False)
    for word in ("linearize: searching", "linearize: proving", "calibrate", "evaluate"):
        assert word in stream.getvalue(), word
    monkeypatch.setattr(sys, "stderr", quiet := _Terminal())
    lz.calibrate(lz.linearize(tiny(1), progress=False), IDS, progress=False)
    assert not quiet.getvalue()
