"""What only resembles attention is refused: with the right code, at the right node, the graph untouched."""

from __future__ import annotations

import pytest
from graphs_of import canonical_calls, fused_or_softmax, graph_of, named, refused_rightly, report_of
from linearize.passes import raise_attention
from spellings import EITHER, REFUSED, REGISTRY, Spelling
from torch.fx import Graph, GraphModule

pytestmark = pytest.mark.xdist_group("spellings")


def operators(graph: GraphModule) -> list:
    """Targets in order, without dead nodes (copies of a graph drop them)."""
    twin = Graph()
    twin.output(twin.graph_copy(graph.graph, {}))
    twin.eliminate_dead_code()
    return [node.target for node in twin.nodes if node.op != "output"]


@pytest.mark.parametrize("entry", named(REFUSED))
def test_decoy_is_refused_with_its_reason(entry: Spelling) -> None:
    report = report_of(entry)
    assert not report.sites, [site.spelling for site in report.sites]
    refused_rightly(entry, report)


@pytest.mark.parametrize("entry", named(REFUSED))
def test_refused_graph_is_untouched(entry: Spelling) -> None:
    """Raise leaves the same live operators in the same order, and the graph it was given as it was."""
    graph = graph_of(entry).graph
    code = graph.code
    raised = raise_attention(graph)
    assert graph.code == code
    assert canonical_calls(raised) == 0
    assert operators(raised) == operators(graph)


@pytest.mark.parametrize("entry", named([*REFUSED, *EITHER]))
def test_every_candidate_is_in_the_report(entry: Spelling) -> None:
    """One row per softmax or fused node, no node twice."""
    graph = graph_of(entry).graph
    report = report_of(entry)
    anchors = [row.anchor for row in (*report.sites, *report.refusals)]
    assert len(anchors) == len(set(anchors))
    assert len(anchors) >= fused_or_softmax(graph)


def test_one_refused_site_leaves_its_neighbours_alone() -> None:
    """RealFormer: the layer whose scores escape keeps its softmax, the other one may be raised."""
    graph = graph_of(REGISTRY["realformer"]).graph
    report = report_of(REGISTRY["realformer"])
    assert [refusal.reason.value for refusal in report.refusals][:1] == ["weights-escape"]
    assert len(report.sites) + len(report.refusals) == 2
    assert fused_or_softmax(raise_attention(graph)) == len(report.refusals)


@pytest.mark.parametrize(
    ("name", "culprit"),
    [
        ("squared_scores", "pow"),
        ("talking_heads_before_softmax", "linear"),
        ("talking_heads_after_softmax", "linear"),
        ("softmax_over_queries", "matmul_1"),
        ("key_buffer_overwritten_between", "add_"),
        ("moe_router", "linear"),
    ],
)
def test_refusal_names_the_culprit(name: str, culprit: str) -> None:
    """The node of a refusal is the one a reader has to look at."""
    (refusal,) = report_of(REGISTRY[name]).refusals
    assert culprit in f"{refusal.node.name} {refusal.node.target}", refusal.message
    assert refusal.path == "attn"
    assert ".py:" in refusal.source
