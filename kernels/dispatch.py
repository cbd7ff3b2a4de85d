"""Which form computes a call: `torch` always can, `cpu` (C++) and `triton` where they are built and fit."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal

from torch import Tensor

FORMS = ("torch", "cpu", "triton")
Order = Literal["causal", "both", "other"]
"""What a query sees: tokens up to its own, also after a state; all of its own sequence; anything else."""
_ORDERS: dict[str, tuple[Order, ...]] = {"cpu": ("causal", "both"), "triton": ("causal",)}
_DEVICE_OF = {"cpu": "cpu", "triton": "cuda"}
_LOG = logging.getLogger("linearize")


@dataclass(frozen=True)
class Choice:
    """form: one of `FORMS`. reason: one sentence. slow: this device has a faster form, but not here."""

    form: str
    reason: str
    slow: bool = False


def choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    conv_weight: Tensor | None,
    local_bias: Tensor | None,
    activation: str,
    group_size: int,
    order: Order,
    form: str | None = None,
) -> Choice:
    """The form for one call (shapes as in `chunk.forward`). Reads no data.

    form: the one that must be taken; raises ValueError, with the reason, when it cannot take the call.
    """
    if form == "torch":
        return Choice("torch", "asked for")
    wanted = form or ("triton" if query.device.type == "cuda" else "cpu")
    reason = _refusal(wanted, query, key, value, conv_weight, local_bias, activation, group_size, order)
    if reason is None:
        way = "causal" if order == "causal" else "bidirectional"
        return Choice(wanted, f"{way}, on {query.device.type}")
    if form is not None:
        raise ValueError(f"form {form!r} cannot take this call: {reason.reason}")
    return reason


def _refusal(
    form: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    conv_weight: Tensor | None,
    local_bias: Tensor | None,
    activation: str,
    group_size: int,
    order: Order,
) -> Choice | None:
    """The torch form instead, with the reason why `form` cannot take the call."""
    if query.device.type != _DEVICE_OF[form]:
        return Choice("torch", f"the {form} form needs {_DEVICE_OF[form]} tensors, not {query.device.type}")
    if order not in _ORDERS[form]:
        some = "causal attention" if form == "triton" else "attention"
        return Choice("torch", f"only {some} of a sequence to itself has a compiled form")
    if local_bias is not None:
        return Choice("torch", "a relative position bias has no compiled form")
    found = load(form)
    if isinstance(found, str):
        return Choice("torch", found, slow=True)
    missing = found.unavailable_reason(query.device)
    if missing is not None:
        return Choice("torch", missing, slow=True)
    unsupported = found.supports(query, key, value, conv_weight, activation, group_size)
    if unsupported is None:
        return None
    return Choice("torch", f"the {form} form does not take {unsupported}", slow=mixes(query, key, value))


def mixes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the dtypes differ, so that a cast would give the call a faster form."""
    return not query.dtype == key.dtype == value.dtype


@cache
def load(form: str) -> ModuleType | str:
    """The module of a compiled form, or one sentence saying why it cannot be imported."""
    try:
        return import_module(f".{form}", __package__)
    except ImportError as error:
        return str(error)


def module(choice: Choice) -> ModuleType:
    """The module of a compiled form that was chosen."""
    found = load(choice.form)
    assert isinstance(found, ModuleType)
    return found


@cache
def say(choice: Choice) -> None:
    """Log what runs, once for each kind of call: a warning when a faster form is missing."""
    level = logging.WARNING if choice.slow else logging.DEBUG
    _LOG.log(level, "attention runs in its %s form: %s", choice.form, choice.reason)
