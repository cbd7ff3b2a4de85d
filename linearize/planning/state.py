"""What a converted model carries: its plan, its config, and evaluations of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import InvalidModelError
from .config import LinearizeConfig
from .plan import Plan


@dataclass(frozen=True)
class LinearizeState:
    """What a converted model carries as `model._linearize`.

    measured: evaluations in their JSON form, each with a fingerprint of the weights it is of.
    """

    plan: Plan
    config: LinearizeConfig
    measured: tuple[Mapping[str, Any], ...] = ()


def state_of(model: nn.Module) -> LinearizeState:
    """Plan and config of a converted model. Raises InvalidModelError when it is not one itself."""
    if not isinstance(model, nn.Module):
        raise InvalidModelError(f"this needs a converted nn.Module, got {type(model).__name__}")
    # vars, not getattr: a wrapper that forwards attributes (PeftModel) has other parameter names.
    state = vars(model).get("_linearize")
    if isinstance(state, LinearizeState):
        return state
    if isinstance(getattr(model, "_linearize", None), LinearizeState):
        raise InvalidModelError(
            f"{type(model).__name__} wraps a converted model; save the model inside it (for PEFT, "
            "`linearize.merge(model)` first, or save the adapter with its own `save_pretrained`)"
        )
    raise InvalidModelError(f"{type(model).__name__} is not converted; call linearize(model) first")


def carry(model: nn.Module, measured: Sequence[Mapping[str, Any]]) -> None:
    """Let a converted model carry evaluations, in place of those it has."""
    live: Any = model
    live._linearize = dataclasses.replace(live._linearize, measured=tuple(measured))
    record = getattr(getattr(model, "config", None), "linearize", None)
    if record is not None:
        kept = {name: value for name, value in record.items() if name != "measured"}
        live.config.linearize = {**kept, "measured": list(measured)} if measured else kept
