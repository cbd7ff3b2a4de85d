"""`kernels/salient_recurrent.py` in C++: any number of tokens after a state that takes none back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..salient import BLOCK, DELAY, Sizes, State
from . import DTYPES
from .library import parameter, place, run, table, threads_for


def refusal(query: Tensor, key: Tensor, value: Tensor, state: State, sizes: Sizes) -> str | None:
    """What of a call the kernel does not take; None when it takes it. Arguments as for `extend`."""
    refused = tokens_refusal(query, key, value)
    if refused is not None:
        return refused
    if state.keys.dtype != state.values.dtype or state.keys.dtype not in DTYPES:
        return f"a state in {state.keys.dtype}"
    if state.keys.shape[2] != sizes.kept + sizes.window + BLOCK or state.votes.shape[2] != 1 + DELAY // BLOCK:
        return "a state that can take tokens back"
    if any(type(x) is not Tensor or not x.is_cpu for x in state):
        return "a state that is not of plain tensors on the CPU"
    rows = state.scores.is_contiguous() and state.votes.is_contiguous()
    if not rows or any(x.shape[3] > 1 and x.stride(3) != 1 for x in (state.keys, state.values)):
        return "a state whose columns are apart"
    if not (state.length.is_contiguous() and state.block.is_contiguous()):
        return "lengths that are apart"
    return None


def tokens_refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """`refusal` of what every call has."""
    dtype = query.dtype
    if dtype != key.dtype or dtype != value.dtype or dtype not in DTYPES:
        return f"query, key and value in {query.dtype}, {key.dtype} and {value.dtype}"
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        return "tensors that are not on the CPU"
    if not (query.numel() and value.numel()):
        return "tensors without elements"
    return None


def extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    sizes: Sizes,
    scale: float,
    conv_weight: Tensor | None,
    tail_weight: Tensor | None,
    count: Tensor | None,
    *,
    isa: str | None = None,
) -> Tensor:
    """As `salient_recurrent.extend`, and the tail, for a call that `refusal` has nothing to say against.

    Args:
        query, key, value, state, sizes, scale, conv_weight: As there.
        tail_weight: As for `salient_tail.after_state`. None: no tail.
        count: int64 [B]: how many of the tokens are real, those in front. None: all.
        isa: "avx2" keeps to that instruction set; None takes the best.

    Returns:
        float32 [B, Hkv, R, T, Dv], zeros for tokens that are not real.

    Raises:
        ValueError: Shapes do not fit together.
    """
    batch, kv_heads, shared, length, dim = query.shape
    rows, taps = sizes.kept + sizes.window + BLOCK, 0 if conv_weight is None else conv_weight.shape[2]
    held = (batch, kv_heads, rows)
    check_tokens(query, key, value)
    if (
        state.keys.shape != (*held, dim)
        or state.values.shape != (*held, value.shape[3])
        or state.scores.shape != held
        or state.votes.shape != (*held[:2], 1 + DELAY // BLOCK, rows)
        or not state.length.shape == state.block.shape == (batch,)
        or taps > sizes.window + 1
    ):
        shapes = [list(x.shape) for x in state]
        raise ValueError(f"a state of shapes {shapes}, or {taps} taps, does not fit {sizes}")
    value_dim, heads = value.shape[3], kv_heads * shared
    conv, conv_at = _of_heads(conv_weight, (heads, taps), "conv_weight")
    columns = dim + value_dim + 1
    tail, tail_at = _of_heads(tail_weight, (heads, value_dim, columns), "tail_weight")
    make = torch.empty if count is None else torch.zeros
    out = make(batch, heads, length, value_dim)
    if count is not None:
        count = table(count, (batch,), torch.int64, "count")
    kept = [place(x) for x in (query.flatten(1, 2), key, value, out, state.keys, state.values)]
    fields = (
        *(DTYPES[query.dtype], DTYPES[state.keys.dtype], batch, heads, kv_heads, length, dim, value_dim),
        *(*sizes, state.votes.shape[2], taps, scale),
        *(field for _, of_tensor in kept for field in of_tensor),
        *(x.data_ptr() for x in (state.scores, state.votes, state.length, state.block)),
        *(0 if count is None else count.data_ptr(), conv_at, tail_at),
    )
    work = batch * heads * length * (sizes.kept + sizes.window + BLOCK) * (dim + value_dim)
    run("linearize_salient", fields, isa, threads_for(work))
    del conv, tail  # the kernel read what they hold
    return out.unflatten(1, (kv_heads, shared))


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    sizes: Sizes,
    scale: float,
    count: Tensor | None,
    *,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of whole sequences by query, key and value, for what `refusal` has nothing to say against.

    Args:
        grad: Of the output, float32 [B, Hkv, R, T, Dv].
        query, key, value, sizes, scale, count: As for `extend`.
        positions: int64 [B, Hkv, blocks, K], what `salient_chunk.select` found.
        isa: "avx2" keeps to that instruction set; None takes the best.

    Returns:
        Those of query, key and value, each float32 and of its shape.

    Raises:
        ValueError: Shapes do not fit together.
    """
    check_tokens(query, key, value)
    batch, kv_heads, shared, length, dim = query.shape
    if grad.shape != (*query.shape[:4], value.shape[3]):
        raise ValueError(f"grad must be like the output, not {list(grad.shape)}")
    value_dim, heads, blocks = value.shape[3], kv_heads * shared, -(-length // BLOCK)
    grads = [torch.zeros(x.shape, dtype=torch.float32) for x in (query, key, value)]
    positions = table(positions, (batch, kv_heads, blocks, sizes.kept), torch.int64, "positions")
    if count is not None:
        count = table(count, (batch,), torch.int64, "count")
    rows = query.flatten(1, 2), key, value, grad.float().flatten(1, 2), grads[0].flatten(1, 2), *grads[1:]
    kept = [place(x) for x in rows]
    fields = (
        *(DTYPES[query.dtype], batch, heads, kv_heads, length, dim, value_dim, sizes.window, sizes.kept),
        *(blocks, scale),
        *(field for _, of_tensor in kept for field in of_tensor),
        *(positions.data_ptr(), 0 if count is None else count.data_ptr()),
    )
    work = batch * heads * length * (sizes.kept + sizes.window + BLOCK) * (dim + value_dim) * 2
    run("linearize_salient_backward", fields, isa, threads_for(work))
    return grads[0], grads[1], grads[2]


def check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError unless the shapes fit: the kernel reads what they say."""
    batch, kv_heads, _, length, dim = query.shape
    if key.shape != (batch, kv_heads, length, dim) or value.shape[:3] != key.shape[:3]:
        shapes = [list(x.shape) for x in (query, key, value)]
        raise ValueError(f"shapes of query, key and value do not fit: {shapes}")


def _of_heads(x: Tensor | None, shape: tuple[int, ...], name: str) -> tuple[Tensor | None, int]:
    return parameter(None if x is None else x.reshape(shape), shape, name)
