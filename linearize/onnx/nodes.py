"""Nodes of `schema.py` in a graph under export: tensors in, tensors out, nothing is computed.

These functions have a meaning only inside `torch.export`, where each becomes one node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ExportError
from ..mechanisms.onnx_form import OperatorCall
from ..mechanisms.term import Term
from ..ops.arguments import from_interleaved, interleaved_tables
from .schema import DOMAIN, FAMILIES, OPERATORS, VERSION, window_rows


class Past(NamedTuple):
    """State of one node: recurrent [B, Hkv, D, Dv] float32 (other sizes for a mechanism's own operator),
    window [B, Hkv, R, D + Dv]."""

    recurrent: Tensor
    window: Tensor

    def flat(self) -> tuple[Tensor, Tensor]:
        """As a file has it, the window as [B, Hkv R, D + Dv]: onnxruntime-genai takes three axes."""
        return self.recurrent, self.window.flatten(1, 2)

    @classmethod
    def of(cls, recurrent: Tensor, window: Tensor) -> Past:
        """Inverse of `flat`."""
        return cls(recurrent, window.unflatten(1, (recurrent.shape[1], -1)))


class Call(NamedTuple):
    """What all layers of one call share: mask, bool [B, T], and the real tokens before it, int64 [B]."""

    mask: Tensor
    length: Tensor


def empty_past(key: Tensor, value: Tensor, rows: int, sums: tuple[int, int] | None = None) -> Past:
    """The state of a node before the first token, of the batch size of key and value.

    rows: of the window. sums: size of `recurrent` per key/value head, by default that of a core call.
    """
    batch, heads, _, dim = key.shape
    return Past(
        key.new_zeros(batch, heads, *(sums or (dim, value.shape[3])), dtype=torch.float32),
        key.new_zeros(batch, heads, rows, dim + value.shape[3]),
    )


def core_rows(group_size: int, conv_weight: Tensor | None) -> int:
    """Rows of the window of a causal core call."""
    return window_rows(group_size, 1 if conv_weight is None else conv_weight.shape[1])


def causal(term: Term, past: Past, call: Call, group_size: int, kv_layout: str) -> tuple[Tensor, Past]:
    """One causal core call after a state -> [B, H, T, Dv] and the state after it."""
    if term.local_bias is not None:
        raise no_bias()
    kv_heads, value = term.key.shape[1], term.value.to(term.key.dtype)
    query, tables = interleaved_tables(
        term.query, term.key, term.alpha, term.local_scale, term.conv_weight, kv_layout
    )
    out, *present = _node(
        FAMILIES[term.activation],
        (query, term.key, value, call.mask, *past, call.length, *_weights(tables, query)),
        dict(group_size=group_size, normalize=int(term.normalize)),
        (value.dtype, *(x.dtype for x in past)),
        ((*query.shape[:3], value.shape[3]), *(x.shape for x in past)),
    )
    out = out.to(term.value.dtype)
    return from_interleaved(out, kv_heads) if kv_layout == "tiled" else out, Past(*present)


def own_operator(given: OperatorCall, past: Past, call: Call) -> tuple[Tensor, Past]:
    """A mechanism's own operator after a state -> [B, H, T, Dv] and the state after it."""
    query, value = given.query, given.value
    out, *present = _node(
        given.operator.name,
        (query, given.key, value, call.mask, *past, call.length, *(x.float() for x in given.own)),
        _attributes(given),
        (value.dtype, *(x.dtype for x in past)),
        ((*query.shape[:3], value.shape[3]), *(x.shape for x in past)),
    )
    return out, Past(*present)


def whole(given: OperatorCall, mask: Tensor | None, causal: bool) -> Tensor:
    """A mechanism's own operator on a whole sequence -> [B, H, T, Dv]."""
    query, key, value = given.query, given.key, given.value
    if mask is None:
        mask = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool)
    if causal:
        past = empty_past(key, value, given.rows, given.sums)
        return own_operator(given, past, Call(mask, key.new_zeros(key.shape[0], dtype=torch.int64)))[0]
    name, shape = f"Bidirectional{given.operator.name}", (*query.shape[:3], value.shape[3])
    (out,) = _node(name, (query, key, value, mask), _attributes(given), (value.dtype,), (shape,))
    return out


def _attributes(given: OperatorCall) -> dict[str, Any]:
    return {**given.ints, **{name: float(number) for name, number in given.floats.items()}}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    local_bias: Tensor | None,
    activation: str,
    group_size: int,
    causal: bool,
    cross: bool,
    key_mask: Tensor | None = None,
    query_start: Any = None,
    query_start_tensor: Tensor | None = None,
    normalize: bool = True,
    form: str | None = None,
) -> Tensor:
    """`torch.ops.linearize.augmented_attention`, which has no state, as one node."""
    if local_bias is not None:
        raise no_bias()
    if key_mask is None:
        key_mask = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool)
    value, dtype = value.to(key.dtype), value.dtype
    shape = (*query.shape[:3], value.shape[3])
    weights = _weights((alpha, local_scale, conv_weight), query)
    attributes = dict(group_size=group_size, normalize=int(normalize))
    if causal:
        if query_start is not None or query_start_tensor is not None:
            raise ExportError(
                "a causal layer keeps all keys and values instead of a state of constant size, which has no "
                "ONNX form; leave the layer as softmax (`keep_softmax=`)"
            )
        past = empty_past(key, value, core_rows(group_size, conv_weight))
        length = key.new_zeros(key.shape[0], dtype=torch.int64)
        out, *_ = _node(
            FAMILIES[activation],
            (query, key, value, key_mask, *past, length, *weights),
            attributes,
            (value.dtype, *(x.dtype for x in past)),
            (shape, *(x.shape for x in past)),
        )
    elif cross:
        start = 0 if query_start is None else query_start
        if query_start_tensor is None:
            query_start_tensor = torch.full((1,), start, dtype=torch.int64)
        start = query_start_tensor.reshape(1).to(torch.int64)
        inputs = (query, key, value, key_mask, start, *weights[:2])
        (out,) = _node(f"Cross{FAMILIES[activation]}", inputs, attributes, (value.dtype,), (shape,))
    else:
        inputs = (query, key, value, key_mask, *weights)
        (out,) = _node(f"Bidirectional{FAMILIES[activation]}", inputs, attributes, (value.dtype,), (shape,))
    return out.to(dtype)


def no_bias() -> ExportError:
    return ExportError("a position bias inside groups has no ONNX form; convert with position_bias='drop'")


def _weights(tables: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """alpha [H], local_scale [H], conv_weight [H, K] in float32; zeros for a part that is left out."""
    alpha, local_scale, conv = (None if table is None else table.float() for table in tables)
    none = torch.zeros(like.shape[1], dtype=torch.float32, device=like.device)
    return [
        none if alpha is None else alpha,
        none if local_scale is None else local_scale,
        none[:, None] if conv is None else conv,
    ]


def _node(
    name: str,
    inputs: Sequence[Tensor],
    attributes: Mapping[str, Any],
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[Sequence[Any]],
) -> Sequence[Tensor]:
    assert len(inputs) == len(OPERATORS[name].inputs)
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}", inputs, dict(attributes), dtypes=dtypes, shapes=shapes, version=VERSION
    )
