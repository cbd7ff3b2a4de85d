"""Giving rewritten owners their own softmax attention back, and the models above them their square masks."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..planning.plan import Plan
from .apply import mask_configs
from .interface import NAME
from .owner import OwnerRecord, original_class


def release(model: nn.Module, paths: Iterable[str]) -> None:
    """Make the owners at `paths` what they were before they were rewritten; their attention modules go.

    Does not undo itself: for use inside a Snapshot. Masks are another matter, see `use_square_masks`.
    """
    for path in paths:
        owner: Any = model.get_submodule(path)
        record: OwnerRecord = owner._linearize_owner
        for site in record.sites:
            owner._modules.pop(site.child, None)
        if record.graphs is None:
            # The interface route: the owner's config is a copy of its own.
            owner.config._attn_implementation_internal = record.implementation
        base: Any = original_class(type(owner))
        if "_old_forward" in owner.__dict__:
            owner.__dict__["_old_forward"] = types.MethodType(base.forward, owner)
        owner.__class__ = base
        del owner.__dict__["_linearize_owner"]


def use_square_masks(model: nn.Module, plan: Plan) -> None:
    """Undo `use_compact_masks`: the masks of the owners of `plan` are those of their own implementation.

    Call it while all of them are still rewritten.
    """
    for path, sites in plan.owners.items():
        record: OwnerRecord = model.get_submodule(path)._linearize_owner  # type: ignore[assignment]
        alone = Plan(sites)
        for config in mask_configs(model, alone):
            if config._attn_implementation_internal == NAME:
                config._attn_implementation_internal = record.implementation
