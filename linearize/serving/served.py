"""What a converted checkpoint must be to be served, and what of it an engine is told."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InvalidModelError
from ..mechanisms.module import AttentionModule
from ..mechanisms.spec import SiteSpec
from ..planning.build import build_attention, parameter_dtype
from ..planning.config import LinearizeConfig
from ..planning.plan import Plan, SitePlan
from ..planning.record import METHOD, parse
from .slots import Layout

MIXED, ALONE = "LinearizeForCausalLM", "LinearizeStatesForCausalLM"
"""Names of the architectures: with softmax layers among the converted ones, and with converted ones alone."""
_KEPT = "linearize_kept"
_STATEFUL = "linear_attention"  # the word for such a layer in transformers' `layer_types`


def tell(config: Any, where: str) -> None:
    """Change the transformers config of a converted checkpoint so that an engine knows what its layers are.

    Args:
        config: With a `linearize` record; changed in place. `original` undoes it.
        where: The checkpoint, for errors.

    Raises:
        CheckpointError: The record cannot be used.
    """
    plan, _ = parse(config.linearize, where)
    converted = {site.layer_index for site in plan.sites}
    kinds = getattr(config, "layer_types", None)
    setattr(config, _KEPT, {"architectures": config.architectures, "layer_types": kinds})
    alone = len(converted) == config.num_hidden_layers
    config.architectures = [ALONE if alone else MIXED]
    if kinds is not None and not alone:
        config.layer_types = [_STATEFUL if i in converted else kind for i, kind in enumerate(kinds)]


def original(config: Any) -> Any:
    """A copy of a config as it was before `tell`."""
    found = copy.deepcopy(config)
    for name, value in vars(found).pop(_KEPT, {}).items():
        if value is not None:
            setattr(found, name, value)
    return found


def check(config: Any, where: str) -> None:
    """Raise InvalidModelError, naming the checkpoint `where`, for a model that cannot be served."""
    plan, settings = plan_of(config, where)
    if config.get_text_config() is not config or getattr(config, "is_encoder_decoder", False):
        raise InvalidModelError(f"{where} is no decoder of text alone; use its own generate()")
    for site in plan.sites:
        problem = _problem(site, settings)
        if problem is not None:
            raise InvalidModelError(f"{where} cannot be served: {site.name} {problem}")


def _problem(site: SitePlan, settings: LinearizeConfig) -> str | None:
    if site.route != "interface":
        return (
            "was rewritten on its own graph, not through transformers' attention interface, and vLLM has no "
            "place for such a layer; use the model's own generate(), or export_onnx()"
        )
    if site.layer_index is None or site.slot or site.calls != 1 or not site.spec.causal:
        return "is not the one causal attention of a layer; use the model's own generate()"
    module = module_of(site.spec, settings.at(site.path, site.layer_index))
    if not module.has_state:
        return (
            f"has no state of constant size (mechanism {settings.mechanism!r} at this layer); use "
            "generate(), or convert with a mechanism that has one"
        )
    return None


def plan_of(config: Any, where: str) -> tuple[Plan, LinearizeConfig]:
    """Plan and settings of a served checkpoint. Raises CheckpointError, naming `where`."""
    record: Mapping[str, Any] = config.linearize
    return parse(record, where)


def is_converted(config: Mapping[str, Any]) -> bool:
    """Whether the `config.json` of a checkpoint says that it is a converted one."""
    entry = config.get("quantization_config")
    return "linearize" in config and isinstance(entry, Mapping) and entry.get("quant_method") == METHOD


def module_of(spec: SiteSpec, settings: LinearizeConfig, shards: int = 1) -> AttentionModule:
    """The attention module of a site, or what one of several processes holds of it.

    Args:
        spec: Of the site.
        settings: Of its layer.
        shards: Processes that share the key/value heads.

    Raises:
        InvalidModelError: The heads cannot be shared like that.
    """
    module = build_attention(share_of(spec, shards), settings)
    return module.eval().requires_grad_(False)


def share_of(spec: SiteSpec, shards: int) -> SiteSpec:
    """What one of several processes has of a site. Raises InvalidModelError where that cannot be."""
    if shards == 1:
        return spec
    if spec.num_key_value_heads % shards or spec.kv_layout != "interleaved":
        raise InvalidModelError(
            f"{spec.num_key_value_heads} key/value heads ({spec.kv_layout}) cannot be shared by {shards} "
            "processes, and states are split by key/value head; choose a tensor parallel size that divides "
            "them"
        )
    heads, kv_heads = spec.num_heads // shards, spec.num_key_value_heads // shards
    return dataclasses.replace(spec, num_heads=heads, num_key_value_heads=kv_heads)


def bytes_of_slot(plan: Plan, settings: LinearizeConfig, dtype: torch.dtype, shards: int = 1) -> int:
    """The longest row that a layer of the plan needs for one sequence; all layers have rows of one length."""
    kinds = {(site.spec, settings.at(site.path, site.layer_index)) for site in plan.sites}
    modules = [module_of(*kind, shards).to(dtype=parameter_dtype(dtype)) for kind in kinds]
    return max(Layout.of(module, dtype, torch.device("cpu")).nbytes for module in modules)
