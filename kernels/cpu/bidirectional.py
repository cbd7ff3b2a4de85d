"""`salient_chunk.bidirectional` in C++, without gradients, with convolution and tail in the same call."""

from __future__ import annotations

import torch
from torch import Tensor

from ..salient import Sizes
from ..softmax import Scores
from . import DTYPES
from .library import parameter, place, run, table, threads_for
from .salient import fields_of
from .salient import tokens_refusal as refusal

__all__ = ["attend", "refusal"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Sizes,
    rule: Scores,
    conv_weight: Tensor | None,
    tail_weight: Tensor | None,
    count: Tensor | None,
    *,
    isa: str | None = None,
) -> Tensor:
    """As `salient_chunk.bidirectional`, for a call that `refusal` has nothing to say against.

    Args:
        query: [B, H, T, D], head h reads key/value head h // (H // Hkv).
        key, value, sizes, rule: As there.
        conv_weight: [H, K], K odd: weights of the values around each token, its own in the middle, which are
            added. None: none are.
        tail_weight: [H, Dv, D + Dv + 1], the weights of `salient_tail.features`. None: no tail.
        count: int64 [B]: how many of the tokens are real, those in front. None: all.
        isa: "avx2" keeps to that instruction set; None takes the best.

    Returns:
        float32 [B, H, T, Dv], zeros for tokens that are not real; the heads of a token are adjacent.

    Raises:
        ValueError: Shapes do not fit together.
    """
    batch, heads, length, dim = query.shape
    _, kv_heads, _, value_dim = value.shape
    taps = 0 if conv_weight is None else conv_weight.shape[1]
    if (
        key.shape != (batch, kv_heads, length, dim)
        or value.shape != (batch, kv_heads, length, value_dim)
        or heads % kv_heads
        or (conv_weight is not None and not taps % 2)
    ):
        shapes = [list(x.shape) for x in (query, key, value)]
        raise ValueError(f"shapes of query, key and value, or {taps} taps, do not fit: {shapes}")
    conv, conv_at = parameter(conv_weight, (heads, taps), "conv_weight")
    tail, tail_at = parameter(tail_weight, (heads, value_dim, dim + value_dim + 1), "tail_weight")
    out, count_at = torch.empty(batch, length, heads, value_dim).transpose(1, 2), 0
    if count is not None:
        count = table(count, (batch,), torch.int64, "count")
        count_at = count.data_ptr()
        out.zero_()
    query, query_fields = place(query)
    key, key_fields = place(key)
    value, value_fields = place(value)
    fields = (
        *(DTYPES[query.dtype], batch, heads, kv_heads, length, dim, value_dim, *sizes, taps),
        *fields_of(rule),
        *(*query_fields, *key_fields, *value_fields, *place(out)[1], count_at, conv_at, tail_at),
    )
    seen = min(length, 2 * sizes.window + 1 + sizes.kept)
    work = batch * heads * length * seen * (dim + value_dim)
    run("linearize_bidirectional", fields, isa, threads_for(work))
    del conv, tail  # the kernel read what they hold
    return out
