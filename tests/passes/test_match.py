"""The matcher says of every spelling what it is: how many sites, where, with which mask, heads and scale."""

from __future__ import annotations

import pytest
import torch
from graphs_of import accepted, graph_of, named, refused_rightly, report_of
from linearize.passes import Site, find_attention
from spellings import EITHER, REGISTRY, Spelling

pytestmark = pytest.mark.xdist_group("spellings")


def check_facts(entry: Spelling, sites: tuple[Site, ...]) -> None:
    """Every fact that a record states, and the shapes it gives."""
    facts = entry.facts
    assert facts is not None
    assert [site.path for site in sites] == list(facts.paths)
    ordinals: dict[str, int] = {}
    for site in sites:
        assert site.ordinal == ordinals.get(site.path, 0)
        ordinals[site.path] = site.ordinal + 1
        assert site.mask.label in (facts.label or facts.mask).split("|")
        assert site.mask.top_left == facts.top_left
        if facts.scale == "tensor":
            assert site.scale is None or site.scale == pytest.approx(8**-0.5)  # a constant tensor may be read
        else:
            assert site.scale == pytest.approx(facts.scale / facts.operand_scale)
        assert site.softcap == (None if facts.softcap is None else pytest.approx(facts.softcap))
        assert site.sinks == facts.sinks
        assert (site.kv_map.kind.value, site.kv_map.groups) == facts.kv
        assert site.dropout == pytest.approx(facts.dropout)
        sizes = site.shapes
        assert (sizes["H"], sizes["Hkv"], sizes["D"], sizes["Dv"]) == (
            facts.heads,
            facts.kv_heads,
            facts.dim,
            facts.value_dim,
        )
        if entry.dynamic_length:
            assert isinstance(sizes["T"], str) and isinstance(sizes["S"], str), (
                "a dynamic length was read as fixed"
            )
            assert facts.cross in (None, site.cross)
        assert site.source and site.spelling and site.owner_type


@pytest.mark.parametrize("entry", accepted())
def test_site_record_states_the_facts(entry: Spelling) -> None:
    graph = graph_of(entry).graph
    before = graph.code
    report = report_of(entry)
    assert not report.refusals, [(r.reason.value, str(r.node), r.message) for r in report.refusals]
    check_facts(entry, report.sites)
    assert graph.code == before, "finding changed the graph"


@pytest.mark.parametrize("entry", named(EITHER))
def test_hard_spelling_is_understood_or_refused_with_its_reason(entry: Spelling) -> None:
    report = report_of(entry)
    if report.sites:
        check_facts(entry, report.sites)
    refused_rightly(entry, report)


def test_user_rule_makes_a_refused_spelling_match() -> None:
    """A square of the scores is unknown until the user says how to read it (here: wrongly, as nothing)."""
    from linearize.passes import SCORE_STEPS, StepRule

    entry = REGISTRY["squared_scores"]
    graph = graph_of(entry).graph
    assert not find_attention(graph).sites
    aten = torch.ops.aten
    ignored = StepRule((aten.pow.Tensor_Scalar,), (0,), lambda node, scores: [])
    report = find_attention(graph, score_steps=(*SCORE_STEPS, ignored))
    assert len(report.sites) == 1
