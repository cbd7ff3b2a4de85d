"""The passes as calls: find, raise, lower. Each takes a graph, gives a new one, and changes nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from .capture import source_line, to_dialect
from .graphs import clone
from .fused import FUSED, read_fused
from .inplace import functionalise
from .lower import lower_site
from .mask import MaskReader
from .match import Refused, Walk, find_anchors, walk
from .raise_ import raise_site
from .site import MatchReport, Refusal, Site
from .steps import SCORE_STEPS, Row
from .verify import find_owner, number_sites, verify


def find_attention(
    graph_module: GraphModule, example_inputs: Sequence[Any] | None = None, *, score_steps: Sequence[Row] = SCORE_STEPS
) -> MatchReport:
    """Every attention candidate of a graph from any front door, proved or refused; the graph is not changed.

    example_inputs: the positional inputs, needed for a graph that is not ATen yet (`torch.fx.symbolic_trace`).
    score_steps: the table of spellings; add rows of your own with `(*SCORE_STEPS, Row(...))`.
    Raises CaptureError if the graph cannot be brought to pre-dispatch ATen.
    """
    return _match(functionalise(to_dialect(graph_module, example_inputs)), score_steps)


def _match(graph_module: GraphModule, score_steps: Sequence[Row]) -> MatchReport:
    masks = MaskReader()
    sites: list[Site] = []
    refusals: list[Refusal] = []
    order = {node: position for position, node in enumerate(graph_module.graph.nodes)}

    def attempt(anchor: Node, read: Callable[[], Walk]) -> None:
        try:
            sites.append(verify(read(), masks))
        except Refused as refused:
            path, _, _ = find_owner([anchor])
            refusals.append(
                Refusal(refused.reason, refused.message, refused.node, anchor, refused.reached, path, source=source_line(anchor))
            )

    for node in graph_module.graph.nodes:
        if node.target is FUSED:
            attempt(node, lambda node=node: read_fused(node))  # type: ignore[misc]
    for anchor in find_anchors(graph_module.graph):
        attempt(anchor.node, lambda anchor=anchor: walk(anchor, score_steps))  # type: ignore[misc]
    sites.sort(key=lambda site: order[site.anchor])
    refusals.sort(key=lambda refusal: order[refusal.anchor])
    return MatchReport(graph_module, number_sites(sites), tuple(refusals))


def raise_attention(
    graph_module: GraphModule, example_inputs: Sequence[Any] | None = None, *, score_steps: Sequence[Row] = SCORE_STEPS
) -> GraphModule:
    """A graph in which every proved site is one exact `linearize::attention` call; refused sites are untouched.

    Outputs and gradients equal the original's within the dtype's tolerance. Arguments as `find_attention`.
    """
    raised = clone(functionalise(to_dialect(graph_module, example_inputs)))
    report = _match(raised, score_steps)
    for site in report.sites:
        raise_site(raised, site)
    return finish(raised, {"pass": "raise", "sites": len(report.sites), "refusals": len(report.refusals)})


def lower_attention(
    graph_module: GraphModule,
    factory: Callable[[Site], nn.Module | None],
    example_inputs: Sequence[Any] | None = None,
    *,
    score_steps: Sequence[Row] = SCORE_STEPS,
) -> GraphModule:
    """A graph in which each proved site calls `factory(site)`; where that is None the site stays as it is.

    The module is added as `attention_<n>` and called as `module(query, key, value, key_mask=..., query_start=...)`
    on canonical layout, see `lower.lower_site`.
    """
    lowered = clone(functionalise(to_dialect(graph_module, example_inputs)))
    report = _match(lowered, score_steps)
    count = 0
    for site in report.sites:
        module = factory(site)
        if module is not None:
            lower_site(lowered, site, module, f"attention_{count}")
            count += 1
    return finish(lowered, {"pass": "lower", "sites": count, "refusals": len(report.refusals)})


def finish(graph_module: GraphModule, record: dict[str, Any]) -> GraphModule:
    """Drop what became unused, check the graph, and append `record` to its history (`gm.meta["history"]`)."""
    graph_module.graph.eliminate_dead_code(is_impure_node=_has_effect)
    graph_module.graph.lint()
    graph_module.recompile()
    graph_module.meta["history"] = (*graph_module.meta.get("history", ()), record)
    return graph_module


def _has_effect(node: Node) -> bool:
    """Fused attention and dropout count as impure for fx; only writes and asserts must stay."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return True
    asserts = "assert" in str(node.target) or "sym_constrain" in str(node.target)
    return asserts or node.target is torch._assert
