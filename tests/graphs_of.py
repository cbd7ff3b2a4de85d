"""Exported graphs of the spellings, each made once per process: capture is what the matcher tests cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from linearize.passes import MatchReport, find_attention
from spellings import ACCEPTED, Net, Spelling
from torch import Tensor
from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Traced:
    net: Net
    graph: GraphModule
    dtype: torch.dtype


def graph_of(entry: Spelling, dtype: torch.dtype | None = None) -> Traced:
    """The spelling's model and its graph; float64 unless the spelling cannot be."""
    return _traced(entry, dtype or (torch.float64 if entry.double else torch.float32))


def report_of(entry: Spelling, dtype: torch.dtype | None = None) -> MatchReport:
    """What the matcher says about `graph_of`, asked once."""
    return _reported(graph_of(entry, dtype))


# Of one spelling and dtype alone: a cache holds `f(x)` and `f(x, None)` to be different calls.
@cache
def _traced(entry: Spelling, dtype: torch.dtype) -> Traced:
    net = entry.model().to(dtype)
    return Traced(net, entry.export(net, dtype), dtype)


@cache
def _reported(traced: Traced) -> MatchReport:
    return find_attention(traced.graph)


def named(entries: Iterable[Spelling]) -> list:
    """pytest parameters with the spellings' names as ids."""
    return [pytest.param(entry, id=entry.name) for entry in entries]


def accepted() -> list:
    return named(ACCEPTED)


def refused_rightly(entry: Spelling, report: MatchReport) -> None:
    """A refusal for every candidate that is no site, and only reasons that are right for it."""
    assert report.sites or report.refusals or entry.may_be_silent, "a candidate is missing from the report"
    for refusal in report.refusals:
        assert refusal.reason.value in entry.reasons, (
            refusal.reason.value,
            str(refusal.node),
            refusal.message,
        )
        assert refusal.message and refusal.reached
        assert refusal.node.graph is report.graph_module.graph, (
            "the culprit is not a node of the reported graph"
        )
        assert refusal.anchor.graph is report.graph_module.graph
        if entry.culprit:
            assert entry.culprit in f"{refusal.node.name} {refusal.node.target}"


ANCHORS = (
    "aten.softmax.",
    "aten._softmax.",
    "aten._safe_softmax.",
    "aten.special_softmax.",
    "aten.scaled_dot_product",
)


def is_candidate(node: Node) -> bool:
    """By name alone: a softmax, a fused or a flex node."""
    name = str(node.target)
    return node.op == "call_function" and (name.startswith(ANCHORS) or name == "flex_attention")


def fused_or_softmax(graph: GraphModule) -> int:
    return sum(is_candidate(node) for node in graph.graph.nodes)


def canonical_calls(graph: GraphModule) -> int:
    return sum(str(node.target).startswith("linearize.attention") for node in graph.graph.nodes)


def tolerance(report: MatchReport, dtype: torch.dtype) -> float:
    """1e-10 where everything ran in float64, 1e-5 where float32 takes part, 2e-2 for bfloat16."""
    if dtype == torch.bfloat16:
        return 2e-2
    single = dtype == torch.float32 or any(site.score_dtype == "float32" for site in report.sites)
    return 1e-5 if single else 1e-10


def gradients(module: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The first output, and d(sum of its squares) by every floating input and parameter, by name."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items() if x.is_floating_point()}
    torch.manual_seed(3)  # for dropout
    output = module(*{**inputs, **leaves}.values())
    output = output[0] if isinstance(output, tuple) else output
    parameters = {
        name.removeprefix("_orig_mod."): p for name, p in module.named_parameters()
    }  # torch.compile
    named_leaves = {**leaves, **parameters}
    found = torch.autograd.grad(output.square().sum(), list(named_leaves.values()), allow_unused=True)
    return output, {name: g for name, g in zip(named_leaves, found, strict=True) if g is not None}


def compare(
    model: torch.nn.Module,
    graph: GraphModule,
    inputs: dict[str, Tensor],
    limit: float,
    with_gradients: bool = True,
) -> None:
    """`graph` gives the output and the gradients of `model`; errors are relative to the largest entry."""
    if not with_gradients:
        with torch.no_grad():
            _close("output", graph(*inputs.values()), model(*inputs.values()), limit)
        return
    output, expected = gradients(graph, inputs), gradients(model, inputs)
    _close("output", output[0], expected[0], limit)
    used = {name for name, g in expected[1].items() if g.abs().max() > 0}
    assert used <= set(output[1]), f"no gradient reaches {sorted(used - set(output[1]))}"
    # Softmax does not see a bias of the keys: its gradient is zero, and what is computed is the rounding of
    # terms as large as the others, different on every processor.
    least = 0.01 * max((float(g.abs().max()) for g in expected[1].values()), default=0.0)
    for name, gradient in expected[1].items():
        if name in output[1]:
            _close(f"gradient of {name}", output[1][name], gradient, limit, least)


def _close(what: str, actual: Tensor, expected: Tensor, limit: float, least: float = 0.0) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(max(1.0, least))
    assert error <= limit, f"{what}: {float(error):.1e} > {limit:.0e}"
