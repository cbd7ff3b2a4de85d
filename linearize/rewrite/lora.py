"""LoRA on converted models with PEFT: a configuration that also trains the new parameters, and merging.

A LoRA adapter holds what PEFT was told to save, so parameters trained beside it are lost with it (the paper's
reference code attaches its own after wrapping the model and saves none of them). `lora_config` names the
attention modules among `modules_to_save`: PEFT then trains a copy of their parameters, stores it in the
adapter and loads it again. `merge` makes one ordinary converted model of base and adapter.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn

from ..common.checks import unknown
from ..errors import ConfigError, InvalidModelError, MissingExtraError
from ..planning.plan import Plan
from ..planning.state import LinearizeState, state_of
from .apply import finish
from .snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable

    from peft import LoraConfig

_CALLED = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
"""What peft calls what others call otherwise."""


def lora_config(model: nn.Module, modules_to_save: Iterable[str] = (), **settings: Any) -> LoraConfig:
    """A `peft.LoraConfig` for a converted model, which trains and saves the model's new parameters too.

    For example `adapted = peft.get_peft_model(model, lz.lora_config(model))`.

    Args:
        model: a converted model.
        modules_to_save: names of further modules that are trained whole, such as "embed_tokens".
        **settings: fields of `LoraConfig`. Unless given, `target_modules` are the linear layers beside the
            rewritten attention (query, key, value and output projections), with r=8 and lora_alpha=16 as in
            the paper.

    Returns:
        The configuration.

    Raises:
        InvalidModelError: the model is not converted, or has no linear layer beside its attention.
        ConfigError: `LoraConfig` has no such field.
        MissingExtraError: peft is not installed.
    """
    peft = require_peft()
    plan = state_of(model).plan
    trained = [
        site for site in plan.sites if next(model.get_submodule(site.name).parameters(), None) is not None
    ]
    children = sorted({site.child for site in trained})
    if "target_modules" not in settings:
        # The owner's own name goes with it: GPT-2 has a `c_proj` in its attention and another in its MLP.
        settings["target_modules"] = sorted(
            {
                f"{path.rpartition('.')[2]}.{name}".removeprefix(".")
                for path in plan.owners
                for name, child in model.get_submodule(path).named_children()
                if _takes_lora(child)
            }
        )
        if not settings["target_modules"]:
            raise InvalidModelError(
                f"no linear layer beside the rewritten attention of {type(model).__name__}: "
                "give target_modules"
            )
    fields = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    for name in settings:
        if name not in fields:
            hint = f"did you mean {_CALLED[name]!r}?" if name in _CALLED else ""
            raise ConfigError(unknown("field of LoraConfig", name, fields, hint))
    settings = {"r": 8, "lora_alpha": 16, **settings}
    return peft.LoraConfig(modules_to_save=[*children, *modules_to_save] or None, **settings)


def merge(model: nn.Module) -> nn.Module:
    """Add the active adapters of a `PeftModel` to the weights and return the converted model without PEFT.

    New parameters keep what they learned, by `modules_to_save` or directly. The result is an ordinary
    converted model for `save`, and equals the adapted one within rounding. It is made in place, so `model` is
    used up.

    Args:
        model: a `peft.PeftModel` of a converted model.

    Returns:
        The converted model.

    Raises:
        InvalidModelError: `model` is something else, or its adapters cannot be merged; it is then as it was.
        MissingExtraError: peft is not installed.
    """
    peft = require_peft()
    if not isinstance(model, peft.PeftModel):
        raise InvalidModelError(f"merge works on a peft.PeftModel, got {type(model).__name__}")
    whole: Any = model
    base = whole.get_base_model()
    # Either the base was converted, then wrapped, or the wrapper was converted as a whole.
    state = vars(model).get("_linearize") or state_of(base)
    kind = whole.active_peft_config.peft_type.value
    if not hasattr(model, "merge_and_unload"):
        raise InvalidModelError(
            f"this adapter cannot be merged: {kind} adds no weights to those of the model"
        )
    with Snapshot(model, keep="tensors"):
        try:
            merged = whole.merge_and_unload(safe_merge=True)
        # How PEFT refuses: NaN and quantised weights are a ValueError; a bias without a place in the base is
        # a RuntimeError, and so is its NotImplementedError.
        except (ValueError, RuntimeError) as error:
            raise InvalidModelError(f"this adapter cannot be merged: {error}") from error
        if "_linearize" not in vars(merged):
            plan = _inside(model, base, state)
            for path, sites in plan.owners.items():
                owner: Any = merged.get_submodule(path)
                owner._linearize_owner = dataclasses.replace(owner._linearize_owner, path=path, sites=sites)
            finish(merged, plan, state.config)
    return merged


def _inside(wrapper: nn.Module, base: nn.Module, state: LinearizeState) -> Plan:
    """The plan of a wrapper, with the paths that `base` inside it has."""
    prefix = next(f"{name}." for name, module in wrapper.named_modules() if module is base)
    sites = tuple(dataclasses.replace(site, path=site.path.removeprefix(prefix)) for site in state.plan.sites)
    return dataclasses.replace(state.plan, sites=sites)


def _takes_lora(child: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(child, nn.Linear | Conv1D)


def require_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("LoRA needs the extra `train`: pip install 'linearize[train]'") from error
    return peft
