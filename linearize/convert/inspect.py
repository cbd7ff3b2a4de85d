"""`inspect(model)`: what `linearize` would make of a model, without changing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..common.running import quiet_run
from ..errors import NoAttentionError, RefusedError
from ..passes.site import MatchReport, Reason
from ..planning.config import LinearizeConfig
from ..planning.left_alone import kept_window
from ..planning.plan import (
    check_layers_of,
    layer_index,
    missing,
    plan_sites,
    problem_of,
    stays_softmax,
)
from ..planning.state import LinearizeState
from .inputs import example_inputs, model_inside
from .linearize import check_model, resolve_config, search
from .report import Report, candidates, converted_candidates, describe


def inspect(
    model: nn.Module,
    inputs: Any = None,
    config: LinearizeConfig | Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Report:
    """Report every candidate attention site of a model, and what `linearize` would make of it.

    The model is run on example inputs and not changed. A site that cannot be rewritten is a row of the report
    with its reason, not an error. A model that is converted already is reported from its plan.

    Args:
        model: any `nn.Module` that `torch.export` can capture.
        inputs: example inputs, as for `linearize`; made from the config of transformers models when omitted.
        config: the conversion that is asked about, as for `linearize`; the default one when omitted.
        **overrides: fields of `LinearizeConfig`, which go before those of `config`.

    Returns:
        The report, which prints as a table.

    Raises:
        InvalidModelError: the model is no module, is compiled or scripted, or holds no values.
        InputError: the model does not run on the inputs, or cannot be captured.
        ConfigError: the config has an unknown field or a wrong value.
    """
    model = model_inside(model, inputs)
    name = type(model).__name__
    state = getattr(model, "_linearize", None)
    if isinstance(state, LinearizeState):
        return Report(name, state.config.mechanism, converted_candidates(state))
    settings = resolve_config(config, overrides)
    check_model(model)
    examples = example_inputs(model, inputs)
    with quiet_run(model):
        match = search(model, examples)
    check_layers_of(model, match, settings)
    refused, becomes, windowed = {}, {}, {}
    for site in match.sites:
        index = layer_index(model, site.path)
        if stays_softmax(settings, site.path, index):
            continue
        own = settings.at(site.path, index)
        found = problem_of(site, own)
        window = kept_window(site.mask.width, missing(site, own)) if found else None
        if window is not None:
            windowed[site.path, site.ordinal] = window[1]
        elif found is not None:
            refused[site.path, site.ordinal] = found
        else:
            becomes[site.path, site.ordinal] = describe(settings)
    # A module is rewritten as a whole or not at all.
    stuck = {path for path, _ in (*refused, *windowed)}
    stuck |= {found.path for found in match.refusals if found.reason is not Reason.NOT_ATTENTION}
    for path, ordinal in [key for key in becomes if key[0] in stuck]:
        del becomes[path, ordinal]
        message = "another attention of this module cannot be rewritten"
        refused[path, ordinal] = (Reason.OWNER.value, message)
    rows = candidates(match, refused, becomes, windowed)
    return Report(name, settings.mechanism, rows, _advice(model, match, settings))


def _advice(model: nn.Module, match: MatchReport, settings: LinearizeConfig) -> str:
    """What a conversion would say that helps, if it were refused."""
    try:
        plan_sites(model, match, settings)
    except RefusedError as error:
        return error.advice
    except NoAttentionError:
        pass
    return ""
