"""The cache of a decoder under export: its states come in as tensors and go out as other tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..cache.state_layer import StateLayer
from ..kernels.tensors import full_precision
from ..mechanisms.module import AttentionModule
from ..mechanisms.onnx_form import OperatorCall
from ..mechanisms.term import Term
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
            written = _Written(self.past, self.call)
            out = module.emit_onnx(written, query, key, value)
            self.past = tuple(written.present)
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
    spec, heads = module.spec, module.spec.num_key_value_heads
    sizes = (spec.num_heads, spec.head_dim), (heads, spec.head_dim), (heads, spec.value_dim)
    device = next((p.device for p in module.parameters()), None)
    tokens = (torch.zeros(batch, n, 1, size, dtype=dtype, device=device) for n, size in sizes)
    found = _Empty()
    module.emit_onnx(found, *tokens)
    return found.states


class _Empty:
    """`Nodes` that write nothing, and collect the empty state of each node."""

    def __init__(self) -> None:
        self.states: list[Past] = []

    def core(self, term: Term, group_size: int, kv_layout: str) -> Tensor:
        rows = nodes.core_rows(group_size, term.conv_weight)
        self.states.append(nodes.empty_past(term.key, term.value, rows))
        return term.value.new_zeros(*term.query.shape[:3], term.value.shape[3])

    def operator(self, given: OperatorCall) -> Tensor:
        key, value = given.key, given.value
        self.states.append(nodes.empty_past(key, value, given.rows, given.sums))
        return value.new_zeros(*given.query.shape[:3], value.shape[3])

    def tokens(self, value: Tensor) -> tuple[Tensor, Tensor]:
        real = value.new_ones(value.shape[0], value.shape[2], dtype=torch.bool)
        return real, real.new_zeros(value.shape[0], dtype=torch.int64)


class _Written:
    """`Nodes` of a graph under export: each takes its `past` in, and its state after the call goes out."""

    def __init__(self, past: Sequence[Past], call: Call) -> None:
        self._past, self._call = past, call
        self.present: list[Past] = []

    def core(self, term: Term, group_size: int, kv_layout: str) -> Tensor:
        out, after = nodes.causal(term, self._next(), self._call, group_size, kv_layout)
        self.present.append(after)
        return out

    def operator(self, given: OperatorCall) -> Tensor:
        out, after = nodes.own_operator(given, self._next(), self._call)
        self.present.append(after)
        return out

    def tokens(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._call.mask, self._call.length

    def _next(self) -> Past:
        return self._past[len(self.present)]
