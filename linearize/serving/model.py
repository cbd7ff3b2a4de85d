"""Converted models as vLLM's models: transformers' classes, on vLLM's layers and on ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import maybe_prefix
from vllm.model_executor.utils import set_weight_attrs

from ..checkpoint.hook import relocate
from ..checkpoint.replay import check_owners
from ..planning.build import parameter_dtype
from ..planning.plan import Plan, SitePlan
from .layer import StateAttention
from .served import bytes_of_slot, module_of, original, plan_of
from .slots import Layout


class _Served(TransformersForCausalLM):
    """Both kinds of model. The layers of the plan get our attention, the others vLLM's."""

    has_inner_state = True
    config: Any
    _plan: Plan
    _row: int
    _attention_class: Any = None

    def _patch_config(self) -> None:
        self._where = f"the checkpoint {self.model_config.model!r}"
        self._stored, self._settings = plan_of(self.config, self._where)
        self.config = original(self.config)
        self.text_config = self.config.get_text_config()
        super()._patch_config()

    def pipeline_parallel(self) -> None:
        """As its parent; before that, while all layers are there, the plan is compared with the model."""
        self._plan = relocate(self._stored, self.model, self._where)
        check_owners(self.model, self._plan, self._where)
        shards = get_tensor_model_parallel_world_size()
        self._row = bytes_of_slot(self._plan, self._settings, self.model_config.dtype, shards)
        super().pipeline_parallel()

    def _create_attention_instances(self, prefix: str = "") -> None:
        sites = {maybe_prefix(prefix, f"model.{site.path}.attn"): site for site in self._plan.sites}
        softmax = self._get_attn_cls()

        def made(**options: Any) -> Any:
            site = sites.get(options["prefix"])
            return softmax(**options) if site is None else self._attention(site, options["prefix"])

        self._attention_class = made
        super()._create_attention_instances(prefix)

    def _get_attn_cls(self) -> Any:
        return self._attention_class or super()._get_attn_cls()

    def _attention(self, site: SitePlan, name: str) -> StateAttention:
        """The layer of a site; its weights become a child of the owner, where the checkpoint has them."""
        shards, dtype = get_tensor_model_parallel_world_size(), self.model_config.dtype
        settings, device = self._settings.at(site.path, site.layer_index), self.device_config.device
        module = module_of(site.spec, settings, shards)
        module = module.to(device=device, dtype=parameter_dtype(dtype))
        whole = dict(module_of(site.spec, settings).named_parameters())
        for path, parameter in module.named_parameters():
            split = parameter.shape != whole[path].shape
            set_weight_attrs(parameter, {"weight_loader": _load_share if split else _load})
        self.model.get_submodule(site.path).add_module(site.child, module)
        layers = self.compilation_config.static_forward_context
        return StateAttention(module, Layout.of(module, dtype, device), self._row, name, layers)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        """Of one layer and sequence: so many bytes."""
        config, shards = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
        plan, settings = plan_of(config.hf_config, f"the checkpoint {config.model!r}")
        return ((bytes_of_slot(plan, settings, config.dtype, shards),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)


class LinearizeForCausalLM(_Served):
    """With softmax layers among the converted ones."""

    is_hybrid = True


class LinearizeStatesForCausalLM(_Served):
    """Whose every layer is converted."""

    is_attention_free = True


def _load(parameter: Tensor, stored: Tensor) -> None:
    parameter.data.copy_(stored)


def _load_share(parameter: Tensor, stored: Tensor) -> None:
    """Of a parameter by head: those of this process."""
    size = parameter.shape[0]
    parameter.data.copy_(stored.narrow(0, get_tensor_model_parallel_rank() * size, size))
