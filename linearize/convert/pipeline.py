"""The steps of a conversion, in their order: apply exact softmax, prove, put the mechanism in, prove again.

Each takes the live model and the plan. A step that fails raises, and `linearize` takes everything back.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .. import mechanisms
from ..common.given import run_model
from ..errors import RefusedError, VerificationError
from ..mechanisms.module import PlainSoftmaxAttention
from ..passes.site import MatchReport, Pattern, Reason
from ..planning.config import LinearizeConfig
from ..planning.left_alone import Skipped, nothing_left
from ..planning.plan import Plan
from ..rewrite.apply import apply_owners, attach, use_compact_masks
from ..rewrite.interface import dispatches
from ..rewrite.snapshot import Snapshot
from .decoding import decode, verify_cache
from .proof import Recording, verify, verify_generation

Seen = dict[str, list[tuple[int, int | None]]]
"""Owner path -> slot and wanted sliding window of every site that ran, in order."""


def apply_exact(
    model: nn.Module, plan: Plan, recording: Recording, config: LinearizeConfig, report: MatchReport
) -> Plan:
    """Rewrite the model as `plan` says, with exact softmax; the plan with its routes comes back.

    Owners go by the interface when they dispatch through transformers' attention interface and their calls
    arrive there, otherwise by their graph. Plain sites compute softmax of exactly what a linear form is
    shown, so that the proof covers the key mask and the start of the queries as well.

    Raises VerificationError when an owner goes by neither route, RefusedError when a window that did not show
    on the example inputs cannot be carried.
    """
    before = Snapshot(model)
    routes = {p: "interface" if dispatches(model.get_submodule(p)) else "graph" for p in plan.owners}
    while True:
        routed = with_routes(plan, routes)
        apply_owners(model, routed, config.exact())
        for site in routed.sites:
            if site.plain:
                put_plain(model, site.path, site.child, recording)
        seen, missed = trial(model, routed, recording)
        check_hidden_windows(routed, seen, config, report)
        if not missed:
            break
        before.restore()
        first = next(iter(missed))  # those after it may only not have been reached
        if routes[first] == "graph":
            plan = without(plan, first, missed[first], config, report)
        routes.update(dict.fromkeys(missed, "graph"))
    if config.mechanism != "softmax":
        # What stays softmax follows the square masks to the letter.
        routed = allow_compact_masks(model, routed)
    check_dropped_windows(routed, config, report)
    return routed


def prove_exact(model: nn.Module, plan: Plan, recording: Recording) -> None:
    """The model with exact softmax equals the recording of the original. Raises VerificationError."""
    verify(model, recording)
    if not _has_graphs(plan):
        verify_generation(model, recording)


def apply_mechanism(model: nn.Module, plan: Plan, config: LinearizeConfig) -> None:
    """Put the modules of the wanted mechanism in the places of exact softmax."""
    for path, sites in plan.owners.items():
        attach(model.get_submodule(path), sites, config)


def prove_mechanism(model: nn.Module, recording: Recording, config: LinearizeConfig) -> None:
    """The converted model runs, and where it decodes, a cache makes no difference.

    Softmax kept as the mechanism must equal the original once more, decoding included. Raises InputError or
    VerificationError.
    """
    if config.mechanism == "softmax":
        verify(model, recording)
        verify_generation(model, recording)
        return
    for example in recording.inputs:
        run_model(model, example)
    verify_cache(model, recording.cache)
    if recording.cache is None and recording.generated and recording.generated[0] is not None:
        decode(model, recording.inputs[0], must=True)


def with_routes(plan: Plan, routes: Mapping[str, str]) -> Plan:
    """`plan` with its routes filled in."""
    sites = tuple(dataclasses.replace(site, route=routes[site.path]) for site in plan.sites)
    return dataclasses.replace(plan, sites=sites)


def without(plan: Plan, path: str, why: str, config: LinearizeConfig, report: MatchReport | None) -> Plan:
    """`plan` without an owner that goes by neither route; why: what is wrong with its calls.

    Raises VerificationError unless `config` leaves out what cannot be rewritten, RefusedError where nothing
    is left.
    """
    sites = tuple(site for site in plan.sites if site.path != path)
    if config.on_refusal == "error":
        helps = ". What helps: on_refusal='keep', which leaves such layers softmax" if sites else ""
        raise VerificationError(f"{path}: {why}; nothing was changed{helps}")
    skips = [Skipped(path, site.slot, Reason.NOT_VERIFIED.value, why) for site in plan.owners[path]]
    if not sites:
        raise nothing_left([(skip, ()) for skip in skips], config, False, report)
    return dataclasses.replace(plan, sites=sites, skipped=(*plan.skipped, *skips))


def put_plain(model: nn.Module, path: str, child: str, recording: Recording) -> None:
    """Let a site's exact child see only what a linear form is shown."""
    owner = model.get_submodule(path)
    plain = PlainSoftmaxAttention(getattr(owner, child).spec, recording.hide)
    setattr(owner, child, plain.train(owner.training))


def trial(model: nn.Module, plan: Plan, recording: Recording) -> tuple[Seen, dict[str, str]]:
    """Run the rewritten model once: which sites ran, and owner path -> what is wrong with its calls."""
    problem: Exception | None = None
    with witnessed(model, plan) as seen:
        try:
            run_model(model, recording.inputs[0])
        except Exception as error:
            # An owner that does not dispatch after all may do anything; those not reached tell which.
            problem = error
    wrong: dict[str, str] = {}
    for path, sites in plan.owners.items():
        ran = Counter(slot for slot, _ in seen[path])
        for site in sites:
            if ran[site.slot] != site.calls:
                cause = f" ({type(problem).__name__}: {problem})" if problem is not None else ""
                wrong[path] = f"its attention ran {ran[site.slot]} times instead of {site.calls}{cause}"
    if problem is not None and not wrong:
        raise problem
    return seen, wrong


@contextlib.contextmanager
def witnessed(model: nn.Module, plan: Plan) -> Iterator[Seen]:
    """Write down every site that runs inside the context."""
    seen: Seen = {path: [] for path in plan.owners}
    owners: list[Any] = [model.get_submodule(path) for path in plan.owners]
    records = [owner._linearize_owner for owner in owners]
    try:
        for owner, record in zip(owners, records, strict=True):
            log = seen[record.path]
            witness = lambda slot, window, log=log: log.append((slot, window))  # noqa: E731
            owner._linearize_owner = dataclasses.replace(record, witness=witness)
        yield seen
    finally:
        for owner, record in zip(owners, records, strict=True):
            owner._linearize_owner = record


def allow_compact_masks(model: nn.Module, plan: Plan) -> Plan:
    """One-row masks are allowed when nothing but rewritten, dispatching owners reads masks."""
    harmless = all(skip.reason == Reason.NOT_ATTENTION.value for skip in plan.skipped)
    if harmless and not _has_graphs(plan):
        plan = dataclasses.replace(plan, compact_masks=True)
        use_compact_masks(model, plan)
    return plan


def check_dropped_windows(plan: Plan, config: LinearizeConfig, report: MatchReport | None) -> None:
    """Raise RefusedError where a causal window would be dropped while masks still say it.

    During decoding such a mask hides every key before the window, padding or not, so padding cannot be told.
    A window that is carried may stand in the masks, which must have a column for every token, however: those
    of sliding layers that are still softmax have not.
    """
    if plan.compact_masks or config.mechanism == "softmax":
        return
    carried = mechanisms.get(config.mechanism).covers
    windowed = [site for site in plan.sites if site.spec.causal and site.spec.window is not None]
    kept = _windowed_softmax(plan, report)
    layers = [site.path if site.layer_index is None else site.layer_index for site in windowed]
    keep = (*config.keep_softmax, *dict.fromkeys(layers))
    helps = f"What helps: keep_softmax={keep}, which leaves the layers with a window softmax"
    for site in windowed:
        if not carried(site.spec, config.at(site.path, site.layer_index).options):
            raise RefusedError(
                f"the window of {site.path} can only be dropped when every attention of the model is "
                "rewritten and dispatches through transformers' attention interface.",
                report,
                helps,
            )
        if kept:
            raise RefusedError(
                f"{site.path} and {kept[0]} have windows, and only one of them would be rewritten, though "
                "their masks are one.",
                report,
                helps,
            )


def _windowed_softmax(plan: Plan, report: MatchReport | None) -> list[str]:
    """Where softmax with a causal window stays; without a report, where any softmax stays."""
    if report is None:
        return [skip.path for skip in plan.skipped if skip.reason != Reason.NOT_ATTENTION.value]
    return [
        site.path
        for site in report.sites
        if site.path not in plan.owners and site.causal and site.mask.pattern is Pattern.WINDOW
    ]


def check_hidden_windows(plan: Plan, seen: Seen, config: LinearizeConfig, report: MatchReport | None) -> None:
    """Raise RefusedError when an owner asked for a sliding window too wide to show on the example inputs."""
    if "window" in mechanisms.get(config.mechanism).supports or "window" in config.approximate:
        return
    for path, sites in plan.owners.items():
        for slot, window in seen[path]:
            if window is not None and sites[slot].spec.window is None:
                raise RefusedError(
                    f"{path} attends to a window of {window} tokens, longer than the example inputs; the "
                    f"mechanism {config.mechanism!r} cannot carry it; approximate=('window',) leaves it out "
                    "knowingly",
                    report,
                )


def _has_graphs(plan: Plan) -> bool:
    return any(site.route == "graph" for site in plan.sites)
