"""The order of the passes is data; a pass without what it needs is refused; nothing is half applied."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from graphs_of import graph_of
from linearize.passes import (
    PIPELINE,
    Change,
    Pass,
    PassError,
    Pipeline,
    Site,
    Work,
    find_attention,
    lower_attention,
    raise_attention,
    run_passes,
)
from spellings import REGISTRY
from torch import nn
from torch.fx import GraphModule

pytestmark = pytest.mark.xdist_group("spellings")

ORDER = ["dialect", "functionalise", "prune", "flex", "match", "verify", "raise", "lower"]


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    """A captured model of two attentions."""
    return graph_of(REGISTRY["two_layers"]).graph


def picture(graph: GraphModule) -> tuple[object, ...]:
    """Everything about a graph that a pass could change."""
    nodes = [(node, node.name, node.args, node.kwargs, dict(node.meta)) for node in graph.graph.nodes]
    return graph.code, nodes, [name for name, _ in graph.named_modules()], dict(graph.meta)


def without(*names: str) -> Pipeline:
    return Pipeline(one for one in PIPELINE if one.name not in names)


def breaks(work: Work) -> int:
    """A pass that has rewritten the graph when it fails."""
    assert work.graph is not None
    output = work.graph.graph.output_node()
    output.args = ((),)
    work.graph.graph.eliminate_dead_code()
    raise RuntimeError("out of ideas")


def test_the_order_of_the_passes_is_data_and_prints() -> None:
    """One line a pass: its place, its name, what it needs and gives, and what it does."""
    assert [one.name for one in PIPELINE] == ORDER
    lines = str(PIPELINE).splitlines()
    for number, (line, one) in enumerate(zip(lines, PIPELINE, strict=True), start=1):
        assert line.startswith(f"{number}. {one.name}")
        assert all(field in line for field in (*one.needs, *one.gives)) and line.endswith(one.does)
        assert one.does.endswith(".") and one.does.count(". ") == 0, "one sentence"
    with pytest.raises(FrozenInstanceError):
        PIPELINE[0].name = "first"  # type: ignore[misc]


def test_a_run_leads_up_to_one_of_the_last_passes() -> None:
    for name in ("verify", "raise", "lower"):
        leads = [one.name for one in PIPELINE.to(name)]
        assert leads == [
            *(one for one in ORDER if one not in ("verify", "raise", "lower")),
            *(["verify"] if name == "verify" else ["verify", name]),
        ]
    with pytest.raises(KeyError, match="no pass 'fuse'.*dialect"):
        PIPELINE.to("fuse")


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        (without("dialect"), "'functionalise' needs graph"),
        (without("match").to("verify"), "'verify' needs candidates"),
        (without("verify").to("raise"), "'raise' needs sites"),
        (PIPELINE.to("lower"), "'lower' needs factory"),
        ((*PIPELINE.to("raise"), PIPELINE[-1]), "'lower' needs sites and factory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pass_whose_need_is_missing_is_refused(graph: GraphModule, passes: Pipeline, told: str) -> None:
    """The message names the pass and what it lacks, and the graph stays as it was."""
    before = picture(graph)
    with pytest.raises(PassError, match=told):
        run_passes(passes, Work(graph))
    assert picture(graph) == before


def test_a_rewrite_makes_what_was_known_of_the_graph_unknown(graph: GraphModule) -> None:
    """Sites name nodes: after a pass that gives a new graph the sites of the old one are not used again."""
    again = (*PIPELINE.to("verify"), PIPELINE[2], PIPELINE[-2])
    with pytest.raises(PassError, match="'raise' needs sites"):
        run_passes(again, Work(graph))


def test_a_pass_can_only_name_what_passes_know() -> None:
    with pytest.raises(PassError, match="masks, which Work does not have"):
        Pass("read", ("masks",), ("graph",), "Reads.", "masks", breaks)


def test_a_failing_pass_leaves_the_graph_as_it_was(graph: GraphModule) -> None:
    """Also where it had rewritten half of it, and so does what is known about the graph."""
    before = picture(graph)
    work = Work(graph)
    run_passes(PIPELINE.to("verify"), work)
    known, code = dict(vars(work)), picture(work.graph)  # type: ignore[arg-type]
    fails = Pass("break", ("graph",), ("graph",), "Breaks.", "nodes broken", breaks)
    with pytest.raises(RuntimeError, match="out of ideas") as error:
        run_passes((*PIPELINE.to("verify"), fails), work)
    assert error.value.__notes__ == ["in the graph pass 'break'"]
    assert vars(work) == known and picture(work.graph) == code  # type: ignore[arg-type]
    assert picture(graph) == before


def test_a_factory_that_fails_at_the_second_site_leaves_no_trace_of_the_first(graph: GraphModule) -> None:
    before = picture(graph)
    seen: list[Site] = []

    def factory(site: Site) -> nn.Module:
        seen.append(site)
        if len(seen) == 2:
            raise ValueError("no module for this site")
        return nn.Identity()

    with pytest.raises(ValueError, match="no module for this site"):
        lower_attention(graph, factory)
    assert len(seen) == 2 and picture(graph) == before


def test_each_pass_leaves_its_record_in_order(graph: GraphModule) -> None:
    """The history grows by one record a pass, over every run a graph has been through."""
    found = find_attention(graph).graph_module.meta["history"]
    assert [change.name for change in found] == ORDER[:6]
    assert str(found[-1]) == "verify: 2 sites"
    raised = raise_attention(graph)
    assert raised.meta["history"][:6] == found
    assert raised.meta["history"][6:] == (Change("raise", 2, "sites replaced"),)
    again = raise_attention(raised).meta["history"]
    assert [change.name for change in again] == [*ORDER[:7], *ORDER[:7]]
    assert again[-1].count == 0
    assert "history" not in graph.meta
