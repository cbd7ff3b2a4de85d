"""The passes as calls: find, raise, lower. Each takes a graph, gives a new one, and changes nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from .anchors import Refused, find_anchors
from .capture import source_line, to_dialect
from .flex import expand_flex, find_flex
from .fused import FUSED, read_fused
from .graphs import clone, prune
from .inplace import functionalise
from .lower import lower_site
from .mask import MaskReader
from .match import find_lookalikes, walk
from .raise_ import raise_site
from .site import MatchReport, Reason, Refusal, Site
from .steps import SCORE_STEPS, StepRule
from .verify import find_owner, number_sites, verify
from .walk import Rules, Walk


def find_attention(
    graph_module: GraphModule,
    example_inputs: Sequence[Any] | None = None,
    *,
    score_steps: Sequence[StepRule] = SCORE_STEPS,
) -> MatchReport:
    """Every attention candidate of a graph from any front door, proved or refused; the graph is not changed.

    example_inputs: the positional inputs, needed for a graph that is not ATen yet
    (`torch.fx.symbolic_trace`).
    score_steps: the table of spellings; add rules of your own with `(*SCORE_STEPS, StepRule(...))`.
    Raises CaptureError if the graph cannot be brought to pre-dispatch ATen.
    """
    return _analyse(graph_module, example_inputs, score_steps)


def _analyse(
    graph_module: GraphModule, example_inputs: Sequence[Any] | None, score_steps: Sequence[StepRule]
) -> MatchReport:
    """The report over a graph in the dialect with private writes and understood flex nodes spelled out.

    A flex node that the walk cannot explain once spelled out is put back and refused as itself.
    """
    base = clone(functionalise(to_dialect(graph_module, example_inputs)))
    prune(base.graph)
    names = [node.name for node in find_flex(base.graph)]
    refused: dict[str, Refused] = {}
    while True:
        work = clone(base) if names else base
        spelled: dict[Node, str] = {}
        for node in find_flex(work.graph):
            if node.name not in refused:
                try:
                    name = node.name
                    spelled[expand_flex(node)] = name
                except Refused as reason:
                    refused[node.name] = reason
        report = _match(work, score_steps)
        failed = {spelled[r.anchor]: r for r in report.refusals if r.anchor in spelled}
        if not failed:
            break
        refused.update({name: Refused(Reason.FLEX, r.node, r.message, "flex") for name, r in failed.items()})
    left = [_refusal(refused[node.name], node, node) for node in find_flex(work.graph)]
    return MatchReport(work, report.sites, (*report.refusals, *left))


def _refusal(refused: Refused, anchor: Node, culprit: Node | None = None) -> Refusal:
    path, _, _ = find_owner([anchor])
    return Refusal(
        refused.reason,
        refused.message,
        culprit or refused.node,
        anchor,
        refused.reached,
        path,
        source=source_line(anchor),
    )


def _match(graph_module: GraphModule, score_steps: Sequence[StepRule]) -> MatchReport:
    masks, rules = MaskReader(graph_module.graph), Rules.of(score_steps)
    sites: list[Site] = []
    refusals: list[Refusal] = []

    def attempt(anchor: Node, read: Callable[[], Walk]) -> None:
        try:
            sites.append(verify(read(), masks))
        except Refused as refused:
            refusals.append(_refusal(refused, anchor))

    anchors = {anchor.node: anchor for anchor in find_anchors(graph_module.graph)}
    for node in graph_module.graph.nodes:
        if node.target is FUSED:
            attempt(node, partial(read_fused, node))
        elif node in anchors:
            attempt(node, partial(walk, anchors[node], rules))
    for node in find_lookalikes(graph_module.graph, rules):
        message = "the scores go through a sigmoid, not a softmax"
        refusals.append(_refusal(Refused(Reason.NOT_ATTENTION, node, message, "softmax"), node))
    return MatchReport(graph_module, number_sites(sites), tuple(refusals))


def raise_attention(
    graph_module: GraphModule,
    example_inputs: Sequence[Any] | None = None,
    *,
    score_steps: Sequence[StepRule] = SCORE_STEPS,
) -> GraphModule:
    """A graph in which every proved site is one exact `linearize::attention` call; refused sites are
    untouched.

    Outputs and gradients equal the original's within the dtype's tolerance. Arguments as `find_attention`.
    """
    report = _analyse(graph_module, example_inputs, score_steps)
    for site in report.sites:
        raise_site(report.graph_module, site)
    return finish(
        report.graph_module, {"pass": "raise", "sites": len(report.sites), "refusals": len(report.refusals)}
    )


def lower_attention(
    graph_module: GraphModule,
    factory: Callable[[Site], nn.Module | None],
    example_inputs: Sequence[Any] | None = None,
    *,
    score_steps: Sequence[StepRule] = SCORE_STEPS,
) -> GraphModule:
    """A graph in which each proved site calls `factory(site)`; where that is None the site stays as it is.

    The module is added as `attention_<n>` and called as `module(query, key, value, key_mask=...,
    query_start=...)` on canonical layout, see `lower.lower_site`.
    """
    report = _analyse(graph_module, example_inputs, score_steps)
    lowered = report.graph_module
    count = 0
    for site in report.sites:
        module = factory(site)
        if module is not None:
            lower_site(lowered, site, module, f"attention_{count}")
            count += 1
    return finish(lowered, {"pass": "lower", "sites": count, "refusals": len(report.refusals)})


def finish(graph_module: GraphModule, record: dict[str, Any]) -> GraphModule:
    """Check the rewritten graph and append `record` to its history (`gm.meta["history"]`)."""
    graph_module.graph.lint()
    graph_module.recompile()
    graph_module.meta["history"] = (*graph_module.meta.get("history", ()), record)
    return graph_module
