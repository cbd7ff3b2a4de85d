"""`kernels/salient_recurrent.py` in C++: any number of tokens after a state that takes none back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..salient import BLOCK, DELAY, Sizes, State
from . import DTYPES
from .library import parameter, place, run, table, threads_for


def refusal(query: Tensor, key: Tensor, value: Tensor, state: State, sizes: Sizes) -> str | None:
    """What of a call the kernel does not take; None when it takes it. Arguments as for `extend`."""
    dtype = query.dtype
    if dtype != key.dtype or dtype != value.dtype or dtype not in DTYPES:
        return f"query, key and value in {query.dtype}, {key.dtype} and {value.dtype}"
    if state.keys.dtype != state.values.dtype or state.keys.dtype not in DTYPES:
        return f"a state in {state.keys.dtype}"
    if state.keys.shape[2] != sizes.kept + sizes.window + BLOCK or state.votes.shape[2] != 1 + DELAY // BLOCK:
        return "a state that can take tokens back"
    every = (query, key, value, *state)
    if not all(x.is_cpu for x in every) or any(type(x) is not Tensor for x in state):
        return "tensors that are not plain ones on the CPU"
    if not (query.numel() and value.numel()):
        return "tensors without elements"
    rows = state.scores.is_contiguous() and state.votes.is_contiguous()
    if not rows or any(x.shape[3] > 1 and x.stride(3) != 1 for x in (state.keys, state.values)):
        return "a state whose columns are apart"
    if not (state.length.is_contiguous() and state.block.is_contiguous()):
        return "lengths that are apart"
    return None


def extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    sizes: Sizes,
    scale: float,
    conv_weight: Tensor | None,
    count: Tensor | None,
    *,
    isa: str | None = None,
) -> Tensor:
    """As `salient_recurrent.extend`, for a call that `refusal` has nothing to say against.

    Args:
        query, key, value, state, sizes, scale, conv_weight: As there.
        count: int64 [B]: how many of the tokens are real, those in front. None: all.
        isa: "avx2" keeps to that instruction set; None takes the best.

    Returns:
        float32 [B, Hkv, R, T, Dv], zeros for tokens that are not real.
    """
    batch, kv_heads, shared, length, dim = query.shape
    value_dim, heads = value.shape[3], kv_heads * shared
    conv, conv_at = None, 0
    taps = 0 if conv_weight is None else conv_weight.shape[2]
    if conv_weight is not None:
        conv, conv_at = parameter(conv_weight.reshape(heads, taps), (heads, taps), "conv_weight")
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
        *(0 if count is None else count.data_ptr(), conv_at),
    )
    work = batch * heads * length * (sizes.kept + sizes.window + BLOCK) * (dim + value_dim)
    run("linearize_salient", fields, isa, threads_for(work))
    del conv
    return out.unflatten(1, (kv_heads, shared))
