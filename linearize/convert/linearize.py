"""`linearize(model)`: find, plan, apply, prove, or leave the model as it was."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from .. import mechanisms
from ..calibration import calibrate as calibration
from ..common.running import quiet_run, run_model, without_cache
from ..errors import ConfigError, InputError, InvalidModelError, RefusedError, VerificationError
from ..passes import find_attention
from ..passes.capture import capture
from ..passes.site import MatchReport, Reason
from ..planning.config import LinearizeConfig
from ..planning.plan import Plan, plan_sites
from ..rewrite.apply import apply_owners, attach, check_unconverted, finish, use_compact_masks
from ..rewrite.interface import dispatches
from ..rewrite.snapshot import Transaction
from .inputs import example_inputs
from .proof import Recording, record, verify, verify_cache, verify_generation

Model = TypeVar("Model", bound=nn.Module)


def linearize(
    model: Model,
    inputs: Any = None,
    config: LinearizeConfig | Mapping[str, Any] | None = None,
    calibrate: Iterable[Any] | None = None,
    **overrides: Any,
) -> Model:
    """Rewrite the softmax attention of `model` to linear attention, in place, and return it.

    inputs: example inputs: a dict of keyword arguments, a tuple of positional ones, one tensor, or a list of
    such dicts (the first one is captured, all of them are verified). Made from the config of transformers
    models when omitted.
    config: a `LinearizeConfig`, or its fields as a dict or as keyword arguments.
    calibrate: batches for `lz.calibrate`, which then follows at once.

    Raises InvalidModelError, InputError, ConfigError, NoAttentionError, RefusedError or VerificationError.
    Whatever it raises, the model is as it was before.
    """
    settings = resolve_config(config, overrides)
    check_model(model)
    examples = example_inputs(model, inputs)
    transaction = Transaction(model)
    try:
        with quiet_run(model):
            for example in examples:
                run_model(model, example)
            report = search(model, examples)
            plan, recording = make_plan(model, report, settings, examples)
            plan = prove(model, plan, recording, settings, report)
        finish(model, plan, settings)
        if calibrate is not None:
            calibration.calibrate(model, calibrate)
    except BaseException:
        transaction.rollback()
        raise
    return model


def planned(
    model: nn.Module,
    inputs: Any = None,
    config: LinearizeConfig | Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Plan:
    """What `linearize` would rewrite, without touching the model or proving it. Same arguments and errors."""
    settings = resolve_config(config, overrides)
    check_model(model)
    examples = example_inputs(model, inputs)
    with quiet_run(model):
        run_model(model, examples[0])
        report = search(model, examples)
        return make_plan(model, report, settings, examples[:1])[0]


def resolve_config(
    config: LinearizeConfig | Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> LinearizeConfig:
    """One `LinearizeConfig` from an object, a dict, keyword overrides, or nothing. Raises ConfigError."""
    if config is None:
        base = LinearizeConfig()
    elif isinstance(config, LinearizeConfig):
        base = config
    elif isinstance(config, Mapping):
        base = LinearizeConfig.from_dict(dict(config))
    else:
        raise ConfigError(
            f"config must be a LinearizeConfig or a dict of its fields, got {type(config).__name__}"
        )
    known = {field.name for field in dataclasses.fields(LinearizeConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ConfigError(
            f"unknown setting(s) {', '.join(unknown)}; the settings are {', '.join(sorted(known))}"
        )
    return dataclasses.replace(base, **overrides) if overrides else base


def check_model(model: Any) -> None:
    """Raise InvalidModelError unless `model` is a live, unconverted `nn.Module` with values."""
    if not isinstance(model, nn.Module):
        raise InvalidModelError(f"linearize() works on an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InvalidModelError(
            "linearize() cannot work on a TorchScript module; give the original nn.Module"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise InvalidModelError("the model is compiled; linearize the original, then compile the result")
    check_unconverted(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InvalidModelError("the model is on the meta device and holds no values; load its weights first")


def search(model: nn.Module, examples: Sequence[Mapping[str, Any]]) -> MatchReport:
    """Capture the model on the last example (the padded one, where there is one) and find its attention."""
    example = without_cache(model, examples[-1])
    positional = tuple(example[name] for name in sorted((n for n in example if n.isdigit()), key=int))
    keywords = {name: value for name, value in example.items() if not name.isdigit()}
    try:
        graph = capture(model, positional, keywords)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} could not be captured by torch.export: {type(error).__name__}: {error}"
        ) from error
    return find_attention(graph)


def make_plan(
    model: nn.Module, report: MatchReport, config: LinearizeConfig, examples: Sequence[Mapping[str, Any]]
) -> tuple[Plan, Recording]:
    """The plan with undecided rungs, and the recording of the original that proves it later."""
    recording = record(model, [site.path for site in report.sites], examples)
    return plan_sites(model, report, config), recording


def prove(
    model: nn.Module, plan: Plan, recording: Recording, config: LinearizeConfig, report: MatchReport
) -> Plan:
    """Apply `plan` with exact softmax, verify it, put the wanted mechanism in; returns the plan with rungs.

    Owners go by the seam when they dispatch through the attention interface and the call arrives, otherwise
    by the graft.
    """
    exact = config.exact()
    before = Transaction(model)
    rungs = {p: "seam" if dispatches(model.get_submodule(p)) else "graft" for p in plan.owners}
    while True:
        candidate = with_rungs(plan, rungs)
        apply_owners(model, candidate, exact)
        missed = trial(model, candidate, recording)
        windows = hidden_windows(model, candidate, config)
        if windows:
            raise RefusedError(windows, report)
        if not missed:
            break
        before.rollback()
        stuck = [path for path in missed if rungs[path] == "graft"]
        if stuck:
            raise VerificationError(f"{stuck[0]}: {missed[stuck[0]]}; nothing was changed")
        rungs.update(dict.fromkeys(missed, "graft"))
    if config.mechanism != "softmax":
        # What stays softmax follows the square masks to the letter.
        candidate = allow_compact_masks(model, candidate)
    check_dropped_windows(candidate, config, report)
    verify(model, recording)
    graphs = any(site.rung == "graft" for site in candidate.sites)
    if config.mechanism == "softmax" or not graphs:
        verify_generation(model, recording)
    proving(model, candidate, False)
    if config.mechanism != "softmax":
        for path, sites in candidate.owners.items():
            attach(model.get_submodule(path), sites, config)
        for example in recording.inputs:
            run_model(model, example)
        if graphs:
            verify_cache(model, recording)
    return candidate


def proving(model: nn.Module, plan: Plan, on: bool) -> None:
    """While on, calls are logged, and exact children see what linear ones will see: equality proves it."""
    for path in plan.owners:
        owner: Any = model.get_submodule(path)
        owner._linearize_proof = on
        owner._linearize_log = [] if on else None


def with_rungs(plan: Plan, rungs: Mapping[str, str]) -> Plan:
    """`plan` with its rungs filled in."""
    sites = tuple(dataclasses.replace(site, rung=rungs[site.path]) for site in plan.sites)
    return dataclasses.replace(plan, sites=sites)


def allow_compact_masks(model: nn.Module, plan: Plan) -> Plan:
    """One-row masks are allowed when nothing but rewritten, dispatching owners reads masks."""
    harmless = all(skip.reason == Reason.NOT_ATTENTION.value for skip in plan.skipped)
    if harmless and all(site.rung == "seam" for site in plan.sites):
        plan = dataclasses.replace(plan, compact_masks=True)
        use_compact_masks(model, plan)
    return plan


def check_dropped_windows(plan: Plan, config: LinearizeConfig, report: MatchReport) -> None:
    """Raise RefusedError where a causal window would be dropped while masks still say it.

    During decoding such a mask hides every key before the window, padding or not, so padding cannot be told.
    """
    windowed = [site.path for site in plan.sites if site.spec.causal and site.spec.window is not None]
    if windowed and not plan.compact_masks and config.mechanism != "softmax":
        raise RefusedError(
            f"the window of {windowed[0]} can only be dropped when every attention of the model is rewritten "
            "and dispatches through transformers' attention interface; keep its softmax",
            report,
        )


def trial(model: nn.Module, plan: Plan, recording: Recording) -> dict[str, str]:
    """Run the rewritten model once: owner path -> what is wrong with the calls of its children."""
    proving(model, plan, True)
    problem: Exception | None = None
    try:
        run_model(model, recording.inputs[0])
    except Exception as error:
        # An owner that does not dispatch after all may do anything; those not reached tell which.
        problem = error
    wrong: dict[str, str] = {}
    for path, sites in plan.owners.items():
        owner: Any = model.get_submodule(path)
        ran = Counter(slot for slot, _ in owner._linearize_log)
        for site in sites:
            if ran[site.slot] != site.calls:
                cause = f" ({type(problem).__name__}: {problem})" if problem is not None else ""
                wrong[path] = f"its attention ran {ran[site.slot]} times instead of {site.calls}{cause}"
    if problem is not None and not wrong:
        raise problem
    return wrong


def hidden_windows(model: nn.Module, plan: Plan, config: LinearizeConfig) -> str | None:
    """Why not to go on: an owner asked for a sliding window too wide to show on the example inputs."""
    carried = "window" in mechanisms.get(config.mechanism).supports or "window" in config.approximate
    for path, sites in plan.owners.items():
        owner: Any = model.get_submodule(path)
        for slot, window in owner._linearize_log:
            if window is not None and not carried and sites[slot].spec.window is None:
                return (
                    f"{path} attends to a window of {window} tokens, longer than the example inputs; the "
                    f"mechanism "
                    f"{config.mechanism!r} cannot carry it; approximate=('window',) leaves it out knowingly"
                )
    return None
