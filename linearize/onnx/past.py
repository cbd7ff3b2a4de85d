"""The cache of a decoder under export: its states come in as tensors and go out as other tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..cache.state_layer import StateLayer
from ..errors import ExportError
from ..mechanisms.composed import ComposedAttention, Term, full_precision
from ..mechanisms.module import AttentionModule
from ..mechanisms.softmax_window import SoftmaxWindowAttention
from ..ops.arguments import to_interleaved
from . import nodes
from .nodes import Call, Past


class ExportLayer(StateLayer):
    """A state layer that changes nothing in place: `past` is replaced.

    past: one per node of the module. columns: width of the attention mask before this call.
    """

    def __init__(self, module: AttentionModule, past: Sequence[Past], call: Call, columns: Any) -> None:
        super().__init__(module, DynamicLayer())
        self.past, self.call, self.columns = tuple(past), call, columns
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.columns = self.columns + key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> Any:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        return self.columns + query_length, 0

    def extend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        """`real` is what `call` says of all layers."""
        with full_precision(value.device):
            out, self.past = _attend(module, query, key, value, self.past, self.call)
        return out.to(value.dtype)


class KeyValueLayer(DynamicLayer):
    """Keys and values `[B, Hkv, P, D]` of a layer that is still softmax; P may be symbolic, and 0 at run
    time."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def get_seq_length(self) -> Any:
        return self.keys.shape[-2]


def empty(module: AttentionModule, batch: int, dtype: torch.dtype) -> list[Past]:
    """The states of one module before the first token, one per node. Raises ExportError when it has none."""
    if not isinstance(module, ComposedAttention) or not _known(module):
        raise ExportError(
            f"{type(module).__name__} has no ONNX form with a state; choose another mechanism for this model"
        )
    spec, heads = module.spec, module.spec.num_key_value_heads
    sizes = (spec.num_heads, spec.head_dim), (heads, spec.head_dim), (heads, spec.value_dim)
    device = next((p.device for p in module.parameters()), None)
    query, key, value = (torch.zeros(batch, n, 1, size, dtype=dtype, device=device) for n, size in sizes)
    states = []
    if isinstance(module, SoftmaxWindowAttention):
        states.append(nodes.empty_window_past(key, value, module.window))
    for term in [*module.terms(query, key, value), *module._apart(query, key, value)]:
        states.append(nodes.empty_past(term.key, term.value, module.group_size, term.conv_weight))
    return states


def _known(module: ComposedAttention) -> bool:
    """Whether the module is a sum of core calls, or the one that is more."""
    same = type(module).mix_after is ComposedAttention.mix_after
    return same or isinstance(module, SoftmaxWindowAttention)


def _attend(
    module: ComposedAttention, query: Tensor, key: Tensor, value: Tensor, past: Sequence[Past], call: Call
) -> tuple[Tensor, tuple[Past, ...]]:
    """`ComposedAttention.extend` as nodes, functional in its state."""
    present: list[Past] = []

    def run(term: Term) -> Tensor:
        place = past[len(present)]
        out, after = nodes.causal(term, place, call, module.group_size, module.spec.kv_layout)
        present.append(after)
        return out

    if isinstance(module, SoftmaxWindowAttention):
        out, after = _window(module, query, key, value, past[0], call)
        present.append(after)
    else:
        out = module.combine([run(term) for term in module.terms(query, key, value)])
    for term in module._apart(query, key, value):
        out = out + run(term)
    return out, tuple(present)


def _window(
    module: SoftmaxWindowAttention, query: Tensor, key: Tensor, value: Tensor, past: Past, call: Call
) -> tuple[Tensor, Past]:
    maps: list[Tensor] = [module.query_map, module.key_map, module.far_weight]
    kv_heads, tiled = key.shape[1], module.spec.kv_layout == "tiled"
    if tiled:
        query = to_interleaved(query, kv_heads)
        maps = [
            to_interleaved(maps[0][None], kv_heads)[0],
            maps[1],
            to_interleaved(maps[2][None], kv_heads)[0],
        ]
    out, after = nodes.window_softmax(query, key, value, past, call, maps, module.window, module.scale)
    return nodes.from_interleaved(out, kv_heads) if tiled else out, after
