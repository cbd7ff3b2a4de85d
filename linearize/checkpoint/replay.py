"""A stored plan applied to a model: what a record says of a model is checked against that model first."""

from __future__ import annotations

import inspect

from torch import nn

from ..common.checks import excerpt
from ..errors import CheckpointError, LinearizeError
from ..planning.config import LinearizeConfig
from ..planning.plan import Plan, layer_index
from ..rewrite.apply import apply_plan
from ..rewrite.interface import dispatches


def replay(model: nn.Module, plan: Plan, config: LinearizeConfig, where: str) -> None:
    """As `apply_plan`, for a plan from a file. Raises CheckpointError, naming `where`; `model` is then as it
    was."""
    check_owners(model, plan, where)
    try:
        apply_plan(model, plan, config)
    except LinearizeError as error:
        raise CheckpointError(f"{where} was saved from another architecture: {error}") from error
    # Whatever a module says to a record that is right in form and not about it.
    except Exception as error:
        raise CheckpointError(
            f"the `linearize` record of {where} does not fit a {type(model).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_owners(model: nn.Module, plan: Plan, where: str) -> None:
    """Raise CheckpointError unless the paths of a plan are modules of the model that can be what it says."""
    modules = dict(model.named_modules())
    for site in plan.sites:
        owner = modules.get(site.path)
        if owner is None:
            raise CheckpointError(
                f"{where} was saved from another architecture: its plan names {excerpt(site.path)}, which a "
                f"{type(model).__name__} does not have"
            )
        if site.route == "interface" and not (dispatches(owner) and _names_attention(owner)):
            raise CheckpointError(
                f"the plan of {where} says that {excerpt(site.path)} is attention; it is a "
                f"{type(owner).__name__}"
            )
        if layer_index(model, site.path) != site.layer_index:
            raise CheckpointError(
                f"the plan of {where} says that {excerpt(site.path)} is layer {site.layer_index}; it is "
                f"{layer_index(model, site.path)}"
            )


def _names_attention(owner: nn.Module) -> bool:
    """Whether the code of a module's class reads anything by a name of attention, as what dispatches through
    transformers' interface does. Many modules that do not have a config that names one as well."""
    classes = type(owner).__mro__[: type(owner).__mro__.index(nn.Module)]
    functions = [f for cls in classes for f in vars(cls).values() if inspect.isfunction(f)]
    names = {name.lower() for f in functions for name in inspect.unwrap(f).__code__.co_names}
    return any("attention" in name or "attn" in name for name in names)
