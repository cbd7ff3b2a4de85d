"""Checks of the operators' arguments, and the order in which the registered operators take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import registered
from ..kernels.activations import ACTIVATIONS
from ..kernels.dispatch import FORMS, Choice
from ..kernels.tensors import as_autocast
from .state import AttentionState


def choice(arguments: registered.Arguments) -> Choice:
    """The form that runs a call. Raises InputError when the form that it asks for cannot."""
    try:
        return arguments.choose()
    except ValueError as error:
        raise InputError(str(error)) from error


def attention_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | float | None,
    conv_weight: Tensor | None,
    local_scale: Tensor | float | None,
    local_bias: Tensor | None,
    activation: str,
    group_size: int,
    causal: bool,
    cross: bool,
    kv_layout: str,
    key_mask: Tensor | None,
    query_start: int | Tensor | None,
    normalize: bool,
    form: str | None,
) -> registered.Arguments:
    """The arguments of `augmented_attention`, checked, as the registered operator takes them: heads
    interleaved, tables one row per head."""
    check(query, key, value, conv_weight, group_size, causal, cross, kv_layout, key_mask, query_start)
    heads, kv_heads = query.shape[1], key.shape[1]
    width = group_size if causal else 2 * group_size - 1
    if local_bias is not None and tuple(local_bias.shape) != (heads, width):
        raise InputError(f"local_bias must be [{heads}, {width}], got {tuple(local_bias.shape)}")
    check_names(activation, form)
    conv_weight = None if cross else conv_weight
    query, key, value = as_autocast(query, key, value)
    query, tables = interleaved_tables(query, key, alpha, local_scale, conv_weight, kv_layout)
    if local_bias is not None and kv_layout == "tiled":
        local_bias = to_interleaved(local_bias.unsqueeze(0), kv_heads)[0]
    start, start_tensor = (None, query_start) if isinstance(query_start, Tensor) else (query_start, None)
    return registered.Arguments(
        query,
        key,
        value,
        *tables,
        local_bias,
        activation,
        group_size,
        causal,
        cross,
        key_mask,
        start,
        start_tensor,
        normalize,
        form,
    )


def per_head(name: str, x: Tensor | float | None, query: Tensor) -> Tensor | None:
    """One number or `[1]` or `[H]` as `[H]`."""
    if x is None:
        return None
    heads = query.shape[1]
    if not isinstance(x, Tensor):
        if x == 0:
            return None
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return torch.full((heads,), float(x), dtype=dtype, device=query.device)
    if x.numel() == 1:
        return x.reshape(1).expand(heads)
    if x.dim() != 1 or x.shape[0] != heads:
        raise InputError(f"{name} must be one number or [{heads}], got shape {tuple(x.shape)}")
    return x


def to_interleaved(x: Tensor, kv_heads: int) -> Tensor:
    """Head h of `[B, H, ...]` reads key/value head h % kv_heads; afterwards h // (H // kv_heads)."""
    return x.unflatten(1, (-1, kv_heads)).transpose(1, 2).flatten(1, 2)


def from_interleaved(x: Tensor, kv_heads: int) -> Tensor:
    return x.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(1, 2)


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    conv_weight: Tensor | None,
    group_size: int,
    causal: bool,
    cross: bool,
    kv_layout: str,
    key_mask: Tensor | None,
    query_start: int | Tensor | None,
) -> None:
    """Raise InputError for arguments of `augmented_attention` that do not fit together.

    Checked is everything that can be known without reading data or tying symbolic lengths together.
    """
    _check_tokens(query, key, value)
    if group_size < 1:
        raise InputError(f"group_size must be at least 1, got {group_size}")
    _check_layout(kv_layout)
    if causal and cross:
        raise InputError("cross-attention has no order between queries and keys: set causal=False")
    if conv_weight is not None:
        _check_convolution(conv_weight, query.shape[1], causal)
    if key_mask is not None and (
        key_mask.dtype != torch.bool
        or key_mask.dim() != 2
        or key_mask.shape[0] != key.shape[0]
        or key_mask.shape[1] != key.shape[2]
    ):
        raise InputError(
            f"key_mask must be bool {list(key.shape[::2])}, True for real tokens: "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    if not causal and not cross and query_start is not None:
        raise InputError("query_start has no meaning for bidirectional self-attention (cross=False)")
    _check_lengths(query.shape[2], key.shape[2], causal, cross, query_start)


def _check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4 or not tensor.is_floating_point():
            raise InputError(
                f"{name} must be a floating point [batch, heads, length, features] tensor, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if query.shape[0] != key.shape[0] or key.shape[0] != value.shape[0]:
        raise InputError(
            f"query, key and value need one batch size: "
            f"got {query.shape[0]}, {key.shape[0]} and {value.shape[0]}"
        )
    check_not_empty(query, key, value)
    heads, kv_heads = query.shape[1], key.shape[1]
    if value.shape[1] != kv_heads or heads % kv_heads:
        raise InputError(
            f"key and value need the same number of heads, a divisor of the query's: "
            f"got query {heads}, key {kv_heads}, value {value.shape[1]}"
        )
    if query.shape[3] != key.shape[3]:
        raise InputError(
            f"query has {query.shape[3]} features per head and key has {key.shape[3]}; they must agree"
        )
    if key.shape[2] != value.shape[2]:
        raise InputError(f"key has {key.shape[2]} tokens and value has {value.shape[2]}; they must agree")


def check_not_empty(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise InputError where a batch, a number of heads or tokens, or a head dimension is 0."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if any(type(size) is int and size == 0 for size in tensor.shape):
            raise InputError(
                f"{name} is empty: [batch, heads, length, features] is {list(tensor.shape)}; leave out calls "
                "without sequences or tokens"
            )


def _check_layout(kv_layout: str) -> None:
    if kv_layout not in ("interleaved", "tiled"):
        raise InputError(f"kv_layout must be 'interleaved' or 'tiled', got {kv_layout!r}")


def _check_convolution(conv_weight: Tensor, heads: int, causal: bool) -> None:
    if conv_weight.dim() != 2 or conv_weight.shape[0] != heads or conv_weight.shape[1] < 1:
        raise InputError(f"conv_weight must be [{heads}, taps], got {tuple(conv_weight.shape)}")
    if not causal and conv_weight.shape[1] % 2 == 0:
        raise InputError(
            f"a bidirectional convolution is centred and needs an odd number of taps, "
            f"got {conv_weight.shape[1]}"
        )


def _check_lengths(
    queries: Any, keys: Any, causal: bool, cross: bool, query_start: int | Tensor | None
) -> None:
    """Lengths are compared where they are plain ints: a comparison of symbols would specialise a trace."""
    if type(queries) is not int or type(keys) is not int or cross:
        return
    if not causal and queries != keys:
        raise InputError(f"bidirectional self-attention got {queries} queries and {keys} keys (cross=False)")
    if causal and queries > keys:
        raise InputError(f"causal attention got {queries} queries but only {keys} keys")
    if type(query_start) is int and not 0 <= query_start <= keys - queries:
        raise InputError(
            f"queries at columns {query_start}..{query_start + queries} do not lie inside {keys} keys"
        )


def interleaved_tables(
    query: Tensor,
    key: Tensor,
    alpha: Tensor | float | None,
    local_scale: Tensor | float | None,
    conv_weight: Tensor | None,
    kv_layout: str,
) -> tuple[Tensor, registered.Tables]:
    """The query and its tables, heads interleaved, as the registered operators take them."""
    _check_layout(kv_layout)
    tables = [per_head("alpha", alpha, query), per_head("local_scale", local_scale, query), conv_weight]
    if kv_layout == "tiled":
        query = to_interleaved(query, key.shape[1])
        tables = [None if x is None else to_interleaved(x.unsqueeze(0), key.shape[1])[0] for x in tables]
    alphas, scales, taps = tables
    return query, (alphas, scales, taps)


def check_names(activation: str, form: str | None) -> None:
    """Raise InputError for an activation or a form that does not exist."""
    if activation not in ACTIVATIONS:
        raise InputError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if form is not None and form not in FORMS:
        raise InputError(f"form must be one of {', '.join(FORMS)}, or None, got {form!r}")


def check_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    conv_weight: Tensor | None,
    state: AttentionState,
    key_mask: Tensor | None,
) -> None:
    """Raise InputError when new tokens do not fit together or to the state."""
    check(query, key, value, conv_weight, state.group_size, True, False, "interleaved", key_mask, None)
    check_held(query, key, value, state.tensors.key_window, state.tensors.value_window)
    if conv_weight is not None and conv_weight.shape[1] > state.taps:
        raise InputError(
            f"the state was made for {state.taps} convolution taps, conv_weight has {conv_weight.shape[1]}"
        )


def check_held(query: Tensor, key: Tensor, value: Tensor, held_key: Tensor, held_value: Tensor) -> None:
    """Raise InputError when new tokens do not fit to the keys and values [B, Hkv, rows, ...] of a state."""
    if query.shape[2] != key.shape[2]:
        raise InputError(f"got {query.shape[2]} queries and {key.shape[2]} keys; every new token has both")
    check_no_gradients(query, key, value)
    pairs = (held_key, held_value), (key, value)
    wanted, got = (tuple((*x.shape[:2], x.shape[3]) for x in pair) for pair in pairs)
    if got != wanted:
        raise InputError(
            f"the state holds [batch, heads, features] {wanted[0]} and {wanted[1]} of key and value, "
            f"the new tokens have {got[0]} and {got[1]}"
        )


def check_no_gradients(*tensors: Tensor) -> None:
    """Raise InputError when autograd would follow what is about to be written into a state."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise InputError(
            "a state carries no gradients: train with augmented_attention, or use torch.no_grad()"
        )
