"""Putting a plan into a live model, all of it or nothing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import InvalidModelError
from ..mechanisms.module import AttentionModule
from ..planning.build import build_attention, parameter_dtype
from ..planning.config import LinearizeConfig
from ..planning.plan import Plan, SitePlan
from ..planning.state import LinearizeState
from .attributes import values_of_config, values_of_owner
from .graph.calls import Graphs
from .graph.nested import use_no_nested_tensors
from .graph.owner import apply_graph
from .interface import NAME, apply_interface
from .owner import OwnerRecord, Rewritten, layer_argument, layers_beside, takes_keywords
from .snapshot import Snapshot


def apply_plan(model: nn.Module, plan: Plan, config: LinearizeConfig) -> nn.Module:
    """Rewrite `model` in place as `plan` says, without searching a graph; returns `model`.

    Works on the meta device (a checkpoint is loaded afterwards). New parameters take the device of their
    owner, and are float32 (float64 in a model of float64). Raises InvalidModelError when the model is already
    rewritten or lacks an owner of the plan; the model is then unchanged.
    """
    check_unconverted(model)
    with Snapshot(model):
        apply_owners(model, plan, config)
        finish(model, plan, config)
    return model


def check_unconverted(model: nn.Module) -> None:
    """Raise InvalidModelError when `model` or a part of it was rewritten before."""
    for path, module in model.named_modules():
        if isinstance(module, (Rewritten, AttentionModule)):
            raise InvalidModelError(
                f"the model is already linearized (at {path or 'the root'}); load the original to "
                f"convert it again"
            )


def apply_owners(model: nn.Module, plan: Plan, config: LinearizeConfig) -> None:
    """Attach the children and rewrite every owner. Does not undo itself: for use inside a Snapshot."""
    use_own_configs(model)
    beside = layers_beside(plan.owners)
    for path, sites in plan.owners.items():
        try:
            owner = model.get_submodule(path)
        except AttributeError as error:
            raise InvalidModelError(
                f"the plan names {path!r}, which {type(model).__name__} does not have"
            ) from error
        attach(owner, sites, config)
        on_graph = sites[0].route == "graph"
        graphs = Graphs() if on_graph else None
        record = OwnerRecord(
            path,
            sites,
            beside[path],
            takes_keywords(owner),
            graphs,
            layer_argument=layer_argument(owner),
        )
        if on_graph:
            apply_graph(owner, record)
        else:
            configs = {id(c): c for c in (owner.config, *mask_configs(model, Plan(sites)))}.values()
            record = dataclasses.replace(
                record,
                implementation=getattr(owner.config, "_attn_implementation_internal", None),
                values=values_of_owner(owner),
                configs=tuple((config, values_of_config(config)) for config in configs),
            )
            apply_interface(owner, record)
    if plan.compact_masks:
        use_compact_masks(model, plan)


def attach(owner: nn.Module, sites: Sequence[SitePlan], config: LinearizeConfig) -> None:
    """Give `owner` one attention module per site, or replace those it has."""
    tensors = [
        *owner.parameters(),
        *owner.buffers(),
    ]  # of a quantised owner: ints, perhaps
    dtype = next((x.dtype for x in tensors if x.is_floating_point()), torch.float32)
    for site in sites:
        child = build_attention(site.spec, config.at(site.path, site.layer_index))
        if tensors:
            child = child.to(device=tensors[0].device, dtype=parameter_dtype(dtype))
        child.train(owner.training)
        owner._modules.pop(site.child, None)
        owner.add_module(site.child, child)


def finish(model: nn.Module, plan: Plan, config: LinearizeConfig) -> None:
    """Record what was done: `model._linearize`, and `model.config.linearize` on transformers models."""
    live: Any = model
    use_no_nested_tensors(model)
    for site in plan.sites:
        # Made while the model was in evaluation mode.
        owner = model.get_submodule(site.path)
        owner.get_submodule(site.child).train(owner.training)
    live._linearize = LinearizeState(plan, config)
    if hasattr(getattr(model, "config", None), "to_dict"):
        from .model import save_with_plan

        save_with_plan(model)
        live.config.linearize = {"version": 1, "plan": plan.to_dict(), "config": config.to_dict()}


def use_own_configs(model: nn.Module) -> None:
    """Copy the configs of all modules: other models may share them, and must not see what is written."""
    shared = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "to_dict")}
    own = dict(zip(shared, copy.deepcopy(list(shared.values())), strict=True))  # one call keeps them nested
    for module in model.modules():
        config = own.get(id(getattr(module, "config", None)))
        if config is not None:
            module.config = config


def use_compact_masks(model: nn.Module, plan: Plan) -> None:
    """Let transformers build one-row masks (`masks.compact_mask`) for the configs of the rewritten owners.

    The configs that the owners copied are shared with the modules that build the masks.
    """
    shared = {id(c): c for c in mask_configs(model, plan)}
    for config in shared.values():
        config._attn_implementation_internal = NAME


def mask_configs(model: nn.Module, plan: Plan) -> list[Any]:
    """Configs of the modules above the planned owners: what the mask builders read."""
    found: list[Any] = []
    for path in plan.owners:
        parts = path.split(".")
        for depth in range(len(parts)):
            config = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
            if hasattr(config, "_attn_implementation_internal"):
                found.append(config)
    return found
