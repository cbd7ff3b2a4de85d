"""`Report`: every candidate, readable in a terminal, a program and a browser."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
import sympy
import torch
from linearize.passes.site import (
    KVKind,
    KVMap,
    Mask,
    MatchReport,
    Operand,
    Pattern,
    Reason,
    Refusal,
    Relayout,
    Site,
)
from torch import Tensor, fx, nn

from linearize.convert.inspect import inspect
from linearize.convert.linearize import linearize
from linearize.convert.report import CONVERTED, KEEP, REFUSED, REWRITE, Report, candidates
from linearize.errors import ConfigError, InputError, InvalidModelError


def relayout(heads: int) -> Relayout:
    """`[B, heads, T, 64]` as it is."""
    sizes = (sympy.Symbol("s27"), sympy.Integer(heads), sympy.Symbol("s53"), sympy.Integer(64))
    return Relayout(sizes, (0, 1, 2, 3), sizes, sizes, sizes)


@pytest.fixture
def match() -> MatchReport:
    """Three candidates by hand: two sites of one owner and, between them in the graph, a refusal."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    anchors = [graph.call_function(torch.softmax, (x, -1)) for _ in range(3)]
    graph.output(anchors[-1])
    operand, grouped = (Operand(x, relayout(heads)) for heads in (8, 2))

    def site(anchor: fx.Node, ordinal: int) -> Site:
        return Site(
            path="layers.0.attn",
            ordinal=ordinal,
            anchor=anchor,
            query=operand,
            key=grouped,
            value=grouped,
            output=anchor,
            restore=relayout(8),
            program=(),
            mask=Mask(Pattern.CAUSAL, padding=True),
            scale=0.125,
            softcap=None,
            sinks=False,
            kv_map=KVMap(KVKind.INTERLEAVED, 4),
            dropout=0.0,
            score_dtype="float32",
            body=(anchor,),
            spelling="matmul>mul>add>softmax>matmul",
            source="model.py:12",
        )

    refusal = Refusal(
        Reason.WEIGHTS_ESCAPE,
        "the weights <b>leave</b> & return",
        anchors[1],
        anchors[1],
        "value contraction",
        path="layers.<lambda>",
        source="model.py:40",
    )
    module = fx.GraphModule(torch.nn.Module(), graph)
    return MatchReport(module, (site(anchors[0], 0), site(anchors[2], 1)), (refusal,))


@pytest.fixture
def report(match: MatchReport) -> Report:
    return Report(
        "Toy",
        "augmented_paper",
        candidates(match, {}, {("layers.0.attn", 0): "augmented (group 64, 32 taps)"}),
    )


def test_every_candidate_is_a_row_in_graph_order(report: Report) -> None:
    assert [(row.path, row.ordinal, row.verdict) for row in report.rows] == [
        ("layers.0.attn", 0, REWRITE),
        ("layers.<lambda>", 0, REFUSED),
        ("layers.0.attn", 1, KEEP),
    ]
    assert len(report.sites) == 2 and len(report.refusals) == 1


def test_a_site_the_planner_refuses_is_a_refusal_with_its_shapes(match: MatchReport) -> None:
    refused = {("layers.0.attn", 1): ("bias-unsupported", "adds a learned bias")}
    row = Report("Toy", "augmented_paper", candidates(match, refused, {("layers.0.attn", 0): "x"})).rows[2]
    assert (row.verdict, row.reason, row.message) == (REFUSED, "bias-unsupported", "adds a learned bias")
    assert row.shapes["Hkv"] == 2


def test_text_shows_every_row_and_names_dynamic_sizes_by_axis(report: Report) -> None:
    text = report.to_text()
    assert "3 candidates, 1 rewrite, 1 keep, 1 refused (weights-escape)" in text
    for needle in (
        "layers.0.attn #1",
        "B,8/2,T,T,64",
        "model.py:12",
        "causal+padding",
        "0.125",
        "augmented (group 64, 32 taps)",
    ):
        assert needle in text
    assert "\x1b[" not in text


def test_markup_in_a_module_name_is_shown_not_interpreted(match: MatchReport) -> None:
    found = candidates(match, {}, {("layers.0.attn", 0): "[bold]x[/bold]"})
    hostile = Report("[red]Toy[/red]", "augmented_paper", found)
    text = hostile.to_text()
    assert "[bold]x[/bold]" in text and "[red]Toy[/red]" in text


def test_json_holds_every_field(report: Report) -> None:
    data = json.loads(report.to_json())
    assert data["version"] == 1 and data["model"] == "Toy"
    assert data["rows"][0]["shapes"] == {
        "B": "s27",
        "H": 8,
        "Hkv": 2,
        "T": "s53",
        "S": "s53",
        "D": 64,
        "Dv": 64,
    }
    assert data["rows"][1]["reason"] == "weights-escape"


class TwoHeads(nn.Module):
    """One owner, two attentions: the second returns its weights, which forbids rewriting it."""

    def __init__(self, leak: bool) -> None:
        super().__init__()
        self.inner = Both(leak)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.inner(x)


class Both(nn.Module):
    def __init__(self, leak: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)
        self.leak = leak

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = self.proj(x).unflatten(-1, (2, 8)).transpose(1, 2)
        first = nn.functional.scaled_dot_product_attention(q, q, q)
        weights = (q @ q.mT * 0.5).softmax(-1)
        return (first + weights @ q, weights) if self.leak else (first + weights @ q,)


def test_inspect_shows_what_linearize_would_do_and_changes_nothing() -> None:
    model = TwoHeads(leak=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = inspect(model, torch.randn(2, 9, 16))
    assert [(row.path, row.ordinal, row.verdict) for row in report.rows] == [
        ("inner", 0, REWRITE),
        ("inner", 1, REWRITE),
    ]
    assert [row.becomes for row in report.rows] == ["augmented"] * 2
    assert report.rows[1].scale == 0.5 and report.rows[1].source.startswith("test_report.py:")
    kept = inspect(model, torch.randn(2, 9, 16), {"keep_softmax": ["inner"]})
    assert {row.verdict for row in kept.rows} == {KEEP}
    after = model.state_dict()
    assert model.training and all(torch.equal(before[name], after[name]) for name in before)


def test_a_module_with_one_refused_attention_is_refused_as_a_whole() -> None:
    report = inspect(TwoHeads(leak=True), torch.randn(2, 9, 16))
    assert [(row.verdict, row.reason) for row in report.rows] == [
        (REFUSED, "owner"),
        (REFUSED, "weights-escape"),
    ]


def test_a_converted_model_is_reported_from_its_plan() -> None:
    model = TwoHeads(leak=False).eval()
    linearize(model, torch.randn(2, 9, 16), mechanism="augmented_paper", group_size=4)
    report = inspect(model)
    assert [(row.path, row.ordinal, row.verdict) for row in report.rows] == [
        ("inner", 0, CONVERTED),
        ("inner", 1, CONVERTED),
    ]
    assert report.rows[0].shapes["D"] == 8


def test_what_is_no_model_or_cannot_run_is_one_clear_error() -> None:
    with pytest.raises(InvalidModelError, match="nn.Module"):
        inspect(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        inspect(TwoHeads(leak=False))
    with pytest.raises(InputError):
        inspect(TwoHeads(leak=False), torch.randn(2, 9, 3))
    with pytest.raises(ConfigError):
        inspect(TwoHeads(leak=False), torch.randn(2, 9, 16), {"group": 4})


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html_is_one_self_contained_escaped_page(report: Report) -> None:
    page = _Page()
    page.feed(report.to_html())
    assert page.tags.count("tr") == 4 and not page.links and "script" not in page.tags
    assert "b" not in page.tags and "lambda" not in page.tags
    assert any("the weights <b>leave</b> & return" in text for text in page.text)
