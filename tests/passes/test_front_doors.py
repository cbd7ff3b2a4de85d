"""One model through every front door gives one site table: export, a dynamo backend call, symbolic_trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs_of import canonical_calls, compare
from linearize.passes import CaptureError, MatchReport, capture, find_attention, raise_attention
from spellings import REGISTRY, Net
from torch import Tensor
from torch.fx import GraphModule

pytestmark = pytest.mark.xdist_group("spellings")

NAMES = (
    "llama_eager",
    "sdpa_causal_and_padding",
    "mha_key_padding",
    "gqa_tiled_repeat",
    "softcap_before_mask",
    "t5_bucket_bias",
    "causal_and_padding_by_index",
    "sink_last",
    "packed_unbind",
    "mla",
    "cross_attention",
    "shared_owner_called_twice",
    "weights_returned",
    "talking_heads_before_softmax",
)


def table(report: MatchReport) -> list[tuple]:
    """What the matcher says, without node names: rows of sites, then of refusals."""
    sites = []
    for site in report.sites:
        sizes = [site.shapes[name] for name in ("H", "Hkv", "D", "Dv")]
        scale = None if site.scale is None else round(site.scale, 6)
        said = (site.mask.label, site.mask.top_left, scale, site.softcap, site.sinks, site.dropout)
        heads = (site.kv_map.kind.value, site.kv_map.groups, *sizes)
        sites.append((site.path, site.ordinal, site.owner_type, site.spelling, *said, *heads))
    return sites + [(refusal.path, refusal.reason.value) for refusal in report.refusals]


def through_export(net: Net, inputs: dict[str, Tensor]) -> tuple[MatchReport, Callable]:
    graph = capture(net, tuple(inputs.values()))
    return find_attention(graph), raise_attention(graph)


def through_symbolic_trace(net: Net, inputs: dict[str, Tensor]) -> tuple[MatchReport, Callable]:
    graph = torch.fx.symbolic_trace(net)
    examples = tuple(inputs.values())
    return find_attention(graph, examples), raise_attention(graph, examples)


def through_dynamo(net: Net, inputs: dict[str, Tensor]) -> tuple[MatchReport, Callable]:
    """Called inside a backend, as a compiler engineer would."""
    reports = []

    def backend(graph: GraphModule, examples: list[Tensor]) -> Callable:
        reports.append(find_attention(graph, examples))
        raised = raise_attention(graph, examples)
        assert canonical_calls(raised) == len(reports[-1].sites)
        return raised

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=backend, dynamic=True)
    compiled(*inputs.values())
    (report,) = reports
    return report, compiled


DOORS = {
    "dynamo": through_dynamo,
    "symbolic_trace": through_symbolic_trace,
}


QUICK = NAMES[::2]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_every_front_door_gives_the_same_site_table(name: str) -> None:
    """And from every door the raised graph is the model, gradients included, at an untraced size."""
    entry = REGISTRY[name]
    net = entry.model().double()
    inputs = entry.example(*entry.lengths[0], torch.float64)
    expected, raised = through_export(net, inputs)
    tables = {"export": table(expected)}
    assert tables["export"]
    limit = 1e-5 if any(site.score_dtype == "float32" for site in expected.sites) else 1e-10
    compare(net, raised, entry.example(*entry.lengths[1], torch.float64), limit)
    for door, enter in DOORS.items():
        if door == "symbolic_trace" and not entry.fx:
            continue
        report, raised = enter(net, inputs)
        tables[door] = table(report)
        compare(net, raised, entry.example(*entry.lengths[1], torch.float64), limit)
    for door, rows in tables.items():
        assert rows == tables["export"], door


@pytest.mark.parametrize("name", ["llama_eager", "causal_in_place_fill", "sdpa_enable_gqa"])
def test_a_static_graph_gives_the_same_site_table(name: str) -> None:
    entry = REGISTRY[name]
    net, inputs = entry.model(), tuple(entry.example(*entry.lengths[0]).values())
    tables = [table(find_attention(capture(net, inputs, dynamic=dynamic))) for dynamic in (True, False)]
    assert tables[0] == tables[1] != []


def test_a_traced_graph_without_examples_says_what_is_missing() -> None:
    graph = torch.fx.symbolic_trace(REGISTRY["matmul_transpose"].model())
    with pytest.raises(CaptureError, match="example_inputs"):
        find_attention(graph)


def test_the_given_graphs_are_not_changed() -> None:
    """Neither a traced graph nor a captured one."""
    entry = REGISTRY["packed_unbind"]
    net, inputs = entry.model(), tuple(entry.example(*entry.lengths[0]).values())
    for graph in (torch.fx.symbolic_trace(net), capture(net, inputs)):
        code, nodes = graph.code, len(graph.graph.nodes)
        raise_attention(graph, inputs)
        assert (graph.code, len(graph.graph.nodes)) == (code, nodes)
