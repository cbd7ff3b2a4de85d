"""A converted model changes its settings in place: other attention modules, the same proved sites.

What the plan says of the sites was proved by the conversion with exact softmax and does not depend on the
mechanism, so it is not asked again. What does depend on it is: whether the mechanism can carry each site,
which masks the model builds, and that the model runs and decodes as it computes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ..common.running import quiet_run
from ..errors import InvalidModelError, VerificationError
from ..mechanisms.module import AttentionModule
from ..planning.config import LinearizeConfig
from ..planning.plan import Plan, replan
from ..planning.state import LinearizeState, state_of
from ..rewrite.apply import finish
from ..rewrite.owner import layers_beside
from ..rewrite.release import release, use_square_masks
from ..rewrite.snapshot import Snapshot
from .decoding import cache_proof, verify_cache
from .inputs import example_inputs
from .pipeline import (
    allow_compact_masks,
    apply_mechanism,
    check_dropped_windows,
    check_hidden_windows,
    trial,
)
from .proof import Recording


def converted_here(model: Any) -> bool:
    """Whether `model` itself is converted. Raises InvalidModelError for what only wraps a converted model."""
    if not isinstance(model, nn.Module):
        return False
    if isinstance(vars(model).get("_linearize"), LinearizeState):
        return True
    if isinstance(getattr(model, "_linearize", None), LinearizeState):
        raise InvalidModelError(
            f"{type(model).__name__} wraps a model that is already linearized; change the one inside it "
            "(`get_base_model()` of a PEFT model), or make one of both with `linearize.merge(model)` first"
        )
    return False


def change(model: nn.Module, inputs: Any, config: LinearizeConfig) -> None:
    """Let a converted model have other settings; it is as it was when this raises.

    inputs: as for `linearize`; of several examples the last is run. Raises as `linearize`.
    """
    before = state_of(model).plan
    _check_own(model, before)
    plan = replan(model, before, config)
    examples = example_inputs(model, inputs)
    with Snapshot(model):
        with quiet_run(model):
            cache = cache_proof(model, examples)
            _shrink(model, before, plan)
            plan = _masks(model, before, plan, config)
            check_dropped_windows(plan, config, None)
            apply_mechanism(model, plan, config)
            recording = Recording(examples[-1:], cache=cache)
            seen, missed = trial(model, plan, recording)
            for path, problem in missed.items():
                raise VerificationError(f"{path}: {problem}; nothing was changed")
            check_hidden_windows(plan, seen, config, None)
            verify_cache(model, cache)
        finish(model, plan, config)


def _check_own(model: nn.Module, plan: Plan) -> None:
    """Raise InvalidModelError where an attention module is not the owner's: PEFT wraps those it trains."""
    for site in plan.sites:
        child = model.get_submodule(site.name)
        if not isinstance(child, AttentionModule):
            raise InvalidModelError(
                f"{site.name} is trained by an adapter ({type(child).__name__}), which would lose it; "
                "make one model of both with `linearize.merge(model)` first"
            )


def _shrink(model: nn.Module, before: Plan, plan: Plan) -> None:
    """Give the owners that are not in the plan any more their softmax back, and tell the others."""
    gone = [path for path in before.owners if path not in plan.owners]
    if not gone:
        return
    # Softmax reads square masks, and this asks the owners which they had.
    use_square_masks(model, before)
    release(model, gone)
    for path, layers in layers_beside(plan.owners).items():
        owner: Any = model.get_submodule(path)
        owner._linearize_owner = dataclasses.replace(owner._linearize_owner, layers=layers)


def _masks(model: nn.Module, before: Plan, plan: Plan, config: LinearizeConfig) -> Plan:
    """Let the model build the masks that a first conversion by `config` has it build; the plan says which."""
    if config.mechanism == "softmax":
        if before.compact_masks and len(before.owners) == len(plan.owners):
            use_square_masks(model, before)
        return dataclasses.replace(plan, compact_masks=False)
    return allow_compact_masks(model, dataclasses.replace(plan, compact_masks=False))
