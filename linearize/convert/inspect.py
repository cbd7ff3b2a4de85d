from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..passes.site import Reason
from .report import Report, _converted_rows, describe, rows

if TYPE_CHECKING:
    from torch import nn

    from ..planning.config import LinearizeConfig


def inspect(
    model: nn.Module, inputs: Any = None, config: LinearizeConfig | Mapping[str, Any] | None = None
) -> Report:
    """Every candidate attention site of `model`, and what `linearize` with these arguments would make of it.

    The model is only run, never changed. A refusal is a row, not an error. A model that is already converted
    is reported from its plan. inputs, config: as for `linearize`.
    Raises InvalidModelError, InputError, ConfigError.
    """
    from ..common.running import quiet_run
    from ..planning.plan import kept, layer_index, problem_of
    from ..planning.state import LinearizeState
    from . import linearize as api
    from .inputs import example_inputs

    name = type(model).__name__
    state = getattr(model, "_linearize", None)
    if isinstance(state, LinearizeState):
        return Report(name, state.config.mechanism, _converted_rows(state))
    settings = api.resolve_config(config, {})
    api.check_model(model)
    examples = example_inputs(model, inputs)
    with quiet_run(model):
        match = api.search(model, examples)
    refused, becomes = {}, {}
    for site in match.sites:
        if kept(settings, site.path, layer_index(model, site.path)):
            continue
        found = problem_of(site, settings)
        if found is None:
            becomes[site.path, site.ordinal] = describe(settings)
        else:
            refused[site.path, site.ordinal] = found
    # A module is rewritten as a whole or not at all.
    stuck = {path for path, _ in refused}
    stuck |= {found.path for found in match.refusals if found.reason is not Reason.NOT_ATTENTION}
    for path, ordinal in [key for key in becomes if key[0] in stuck]:
        del becomes[path, ordinal]
        message = "another attention of this module cannot be rewritten"
        refused[path, ordinal] = (Reason.OWNER.value, message)
    return Report(name, settings.mechanism, rows(match, refused, becomes))
