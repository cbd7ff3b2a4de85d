"""One converted layer in vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ..mechanisms.module import AttentionModule
from ..ops.state import States
from .plugin import BACKEND
from .ragged import attend
from .slots import Layout


class StateAttention(MambaBase, nn.Module):
    """Stands where vLLM's attention would, and keeps states in the memory that vLLM binds."""

    def __init__(self, module: AttentionModule, layout: Layout, row: int, name: str, layers: Any) -> None:
        """module: of the site, its weights a child of the owner and not of this. layout: of its states. row:
        bytes of a slot. name: of this layer, in `layers`, which a step finds it by."""
        super().__init__()
        self._module = (module,)  # in a tuple: not registered twice
        self._layout, self._row, self._name = layout, row, name
        self._states: States | None = None
        self.kv_cache: Any = ()
        if name in layers:
            raise ValueError(f"two layers are called {name}")
        layers[name] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return getattr(MambaAttentionBackendEnum, BACKEND)

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        """Bytes: `Layout` says what they are."""
        return ((self._row,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """kv_cache: [slots, 1, 1, bytes], whose rows may be apart and may be longer than ours."""
        memory = kv_cache.squeeze((1, 2)).view(torch.uint8)
        self._states, self.kv_cache = self._layout.over(memory), (memory,)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [T, H * D], key [T, Hkv * D], value [T, Hkv * W] -> [T, H * W], W >= Dv, the rest zeros."""
        spec = self._module[0].spec
        kv_heads = key.shape[1] // spec.head_dim
        out = query.new_zeros(query.shape[0], spec.num_heads * value.shape[1] // kv_heads)
        torch.ops.vllm.linearize_attention(query, key, value, out, self._name)
        return out

    def run(self, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        """`forward` into `out`, by what the engine says of this step."""
        batches = get_forward_context().attn_metadata
        if batches is None:  # the engine measures its memory
            return
        assert isinstance(batches, dict) and self._states is not None
        (module,) = self._module
        spec = module.spec
        query, key = query.unflatten(1, (-1, spec.head_dim)), key.unflatten(1, (-1, spec.head_dim))
        value = value.unflatten(1, (key.shape[1], -1))[..., : spec.value_dim]
        shared = spec.num_key_value_heads // key.shape[1]
        if shared > 1:  # as `rewrite.interface.attention_forward`
            key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        found = attend(module, self._layout, self._states, query, key, value, batches[self._name])
        out.unflatten(1, (spec.num_heads, -1))[..., : spec.value_dim] = found


def linearize_attention(query: Tensor, key: Tensor, value: Tensor, out: Tensor, layer: str) -> None:
    """One opaque node in any graph: the batch is known when it runs."""
    get_forward_context().no_compile_layers[layer].run(query, key, value, out)


def _nothing(query: Tensor, key: Tensor, value: Tensor, out: Tensor, layer: str) -> None:
    return None


direct_register_custom_op("linearize_attention", linearize_attention, ["out"], _nothing)
