"""What adapters of others make of a converted model."""

from __future__ import annotations

import warnings
from typing import Any


def warn_of_frozen(model: Any, adapters: Any) -> None:
    """Warn of an adapter that leaves the new parameters of a converted model as they are.

    adapters: PEFT's configurations by name, as PEFT notes them in the model that it has put adapters into.
    """
    config = list(adapters.values())[-1] if isinstance(adapters, dict) and adapters else None
    if config is None or getattr(config, "inference_mode", False):
        return
    whole = {name.rpartition(".")[2] for name in getattr(config, "modules_to_save", None) or ()}
    sites = [site for site in model._linearize.plan.sites if site.child not in whole]
    frozen = sum(
        parameter.numel()
        for site in sites
        for name, parameter in model.get_submodule(site.name).named_parameters()
        if "lora_" not in name and not parameter.requires_grad
    )
    if frozen:
        warnings.warn(
            f"this adapter leaves the {frozen:,} new parameters of the attention untrained; "
            "get_peft_model(model, linearize.lora_config(model, ...)) trains and saves them too",
            stacklevel=3,
        )
