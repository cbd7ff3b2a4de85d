"""The passes over a graph, in their order, and the calls that run them: find, raise, lower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node

from .anchors import Refused, find_anchors
from .capture import in_dialect, source_line, to_dialect
from .flex import expand_flex, find_flex
from .fused import FUSED, read_fused
from .graphs import clone, prune
from .inplace import functionalise
from .lower import lower_site
from .mask import MaskReader
from .match import find_lookalikes, walk
from .pipeline import Candidate, Pass, Pipeline, SiteFactory, Work, run_passes
from .raise_ import raise_site
from .site import MatchReport, Reason, Refusal, Site
from .steps import SCORE_STEPS, StepRule
from .verify import find_owner, number_sites, verify
from .walk import Rules

# --- the passes ---------------------------------------------------------------------------------------------


def _bring_to_dialect(work: Work) -> int:
    work.graph = clone(to_dialect(work.source, work.example_inputs))
    return 0 if in_dialect(work.source) else len(work.graph.graph.nodes)


def _functionalise(work: Work) -> int:
    assert work.graph is not None
    return functionalise(work.graph.graph)


def _prune(work: Work) -> int:
    assert work.graph is not None
    return prune(work.graph.graph)


def _spell_flex(work: Work) -> int:
    """A flex node that the match cannot explain once it is spelled out is put back and refused as itself."""
    assert work.graph is not None
    if not find_flex(work.graph.graph):
        return 0
    refused: dict[str, Refused] = {}
    while True:
        trial = clone(work.graph)
        spelled: dict[Node, str] = {}
        for node in find_flex(trial.graph):
            name = node.name
            if name not in refused:
                try:
                    spelled[expand_flex(node)] = name
                except Refused as refusal:
                    refused[name] = refusal
        _, refusals = _prove(trial, _candidates(trial, Rules.of(work.score_steps)))
        failed = {spelled[r.anchor]: r for r in refusals if r.anchor in spelled}
        if not failed:
            break
        refused |= {name: Refused(Reason.FLEX, r.node, r.message, "flex") for name, r in failed.items()}
    work.graph, work.flex_refusals = trial, refused
    return len(spelled)


def _match(work: Work) -> int:
    assert work.graph is not None
    candidates = _candidates(work.graph, Rules.of(work.score_steps))
    for node in find_flex(work.graph.graph):
        reason = work.flex_refusals.get(node.name)
        message = reason.message if reason is not None else "flex_attention was not spelled out"
        candidates.append(Candidate(node, Refused(Reason.FLEX, node, message, "flex")))
    work.candidates = tuple(candidates)
    return len(candidates)


def _candidates(graph_module: GraphModule, rules: Rules) -> list[Candidate]:
    """Every softmax and fused node in graph order, then what only resembles attention."""
    anchors = {anchor.node: anchor for anchor in find_anchors(graph_module.graph)}
    candidates: list[Candidate] = []
    for node in graph_module.graph.nodes:
        if node.target is not FUSED and node not in anchors:
            continue
        try:
            found = read_fused(node) if node.target is FUSED else walk(anchors[node], rules)
            candidates.append(Candidate(node, found))
        except Refused as refused:
            candidates.append(Candidate(node, refused))
    for node in find_lookalikes(graph_module.graph, rules):
        message = "the scores go through a sigmoid, not a softmax"
        candidates.append(Candidate(node, Refused(Reason.NOT_ATTENTION, node, message, "softmax")))
    return candidates


def _verify(work: Work) -> int:
    assert work.graph is not None and work.candidates is not None
    work.sites, work.refusals = _prove(work.graph, work.candidates)
    return len(work.sites)


def _prove(
    graph_module: GraphModule, candidates: Sequence[Candidate]
) -> tuple[tuple[Site, ...], tuple[Refusal, ...]]:
    masks = MaskReader(graph_module.graph)
    sites: list[Site] = []
    refusals: list[Refusal] = []
    for candidate in candidates:
        try:
            if isinstance(candidate.found, Refused):
                raise candidate.found
            sites.append(verify(candidate.found, masks))
        except Refused as refused:
            refusals.append(_refusal(refused, candidate.anchor))
    return number_sites(sites), tuple(refusals)


def _refusal(refused: Refused, anchor: Node) -> Refusal:
    path, _, _ = find_owner([anchor])
    return Refusal(
        refused.reason,
        refused.message,
        refused.node,
        anchor,
        refused.reached,
        path,
        source=source_line(anchor),
    )


def _raise(work: Work) -> int:
    assert work.graph is not None and work.sites is not None
    for site in work.sites:
        raise_site(work.graph, site)
    return len(work.sites)


def _lower(work: Work) -> int:
    assert work.graph is not None and work.sites is not None and work.factory is not None
    count = 0
    for site in work.sites:
        module = work.factory(site)
        if module is not None:
            lower_site(work.graph, site, module, f"attention_{count}")
            count += 1
    return count


PIPELINE = Pipeline(
    (
        Pass(
            name="dialect",
            needs=("source",),
            gives=("graph",),
            does="Brings a copy of the graph, from any front door, to pre-dispatch ATen.",
            counts="nodes traced",
            run=_bring_to_dialect,
        ),
        Pass(
            name="functionalise",
            needs=("graph",),
            gives=("graph",),
            does="Replaces writes in place that nothing else can see by their out-of-place twins.",
            counts="writes replaced",
            run=_functionalise,
        ),
        Pass(
            name="prune",
            needs=("graph",),
            gives=("graph",),
            does="Erases operators whose results nobody uses.",
            counts="nodes erased",
            run=_prune,
        ),
        Pass(
            name="flex",
            needs=("graph", "score_steps"),
            gives=("graph",),
            does="Spells out the flex_attention nodes that can then be proved.",
            counts="flex nodes spelled out",
            run=_spell_flex,
        ),
        Pass(
            name="match",
            needs=("graph", "score_steps"),
            gives=("candidates",),
            does="Walks from every softmax and fused node to its query, key, value and output.",
            counts="candidates",
            run=_match,
        ),
        Pass(
            name="verify",
            needs=("graph", "candidates"),
            gives=("sites", "refusals"),
            does="Proves each walk and reads its mask, or says why it is refused.",
            counts="sites",
            run=_verify,
        ),
        Pass(
            name="raise",
            needs=("graph", "sites"),
            gives=("graph",),
            does="Replaces each site by one exact linearize::attention call.",
            counts="sites replaced",
            run=_raise,
            last=True,
        ),
        Pass(
            name="lower",
            needs=("graph", "sites", "factory"),
            gives=("graph",),
            does="Replaces each site by a call of its attention module; the only step that changes results.",
            counts="sites replaced",
            run=_lower,
            last=True,
        ),
    )
)
"""Every pass in order. A run ends with `verify`, `raise` or `lower`: `PIPELINE.to(name)`."""


# --- the calls ----------------------------------------------------------------------------------------------


def find_attention(
    graph_module: GraphModule,
    example_inputs: Sequence[Any] | None = None,
    *,
    score_steps: Sequence[StepRule] = SCORE_STEPS,
) -> MatchReport:
    """Find every attention candidate of a graph and prove or refuse it. The graph is not changed.

    Args:
        graph_module: A graph from any front door: `capture`, `torch.export`, a dynamo backend call or
            `torch.fx.symbolic_trace`.
        example_inputs: The positional inputs of the graph. Needed only where it is not ATen yet.
        score_steps: The table of spellings. To add rules of your own give
            `(*SCORE_STEPS, StepRule(...))`.

    Returns:
        The proved sites and the refused candidates, with the graph whose nodes they name: a copy of
        `graph_module` in the dialect. `report.graph_module.meta["history"]` says which pass did what.

    Raises:
        CaptureError: The graph cannot be brought to pre-dispatch ATen.
    """
    work = Work(graph_module, example_inputs, score_steps)
    run_passes(PIPELINE.to("verify"), work)
    assert work.graph is not None and work.sites is not None
    return MatchReport(work.graph, work.sites, work.refusals)


def raise_attention(
    graph_module: GraphModule,
    example_inputs: Sequence[Any] | None = None,
    *,
    score_steps: Sequence[StepRule] = SCORE_STEPS,
) -> GraphModule:
    """Replace every proved site by one exact `linearize::attention` call.

    The call takes query `[B, H, T, D]`, key `[B, Hkv, S, D]` and value `[B, Hkv, S, Dv]` and returns
    `[B, H, T, Dv]`. Refused candidates stay as they are.

    Args:
        graph_module: As in `find_attention`; it is not changed.
        example_inputs: As in `find_attention`.
        score_steps: As in `find_attention`.

    Returns:
        A new graph over the same parameters. Its outputs and gradients equal the original's within the
        tolerance of the dtype.

    Raises:
        CaptureError: The graph cannot be brought to pre-dispatch ATen.
    """
    return _rewrite("raise", Work(graph_module, example_inputs, score_steps))


def lower_attention(
    graph_module: GraphModule,
    factory: SiteFactory,
    example_inputs: Sequence[Any] | None = None,
    *,
    score_steps: Sequence[StepRule] = SCORE_STEPS,
) -> GraphModule:
    """Replace every proved site by a call of the attention module that `factory` gives for it.

    The n-th module is added as `attention_<n>` and called as
    `module(query, key, value, key_mask=..., query_start=...)`: query `[B, H, T, D]`, key `[B, Hkv, S, D]`,
    value `[B, Hkv, S, Dv]`, result `[B, H, T, Dv]`; see `lower.lower_site` for the two keywords.

    Args:
        graph_module: As in `find_attention`; it is not changed.
        factory: From a site to its module. Where it gives None the site stays as it is.
        example_inputs: As in `find_attention`.
        score_steps: As in `find_attention`.

    Returns:
        A new graph over the same parameters.

    Raises:
        CaptureError: The graph cannot be brought to pre-dispatch ATen.
    """
    return _rewrite("lower", Work(graph_module, example_inputs, score_steps, factory))


def _rewrite(name: str, work: Work) -> GraphModule:
    run_passes(PIPELINE.to(name), work)
    assert work.graph is not None
    return work.graph
