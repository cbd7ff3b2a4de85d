"""What the tokens that `augmented` drops would add to a query's output, estimated from what the query has.

    added = log(1 + n / E) (A q + B o + c)

q is the scaled query, o the output without the tail, n the number of tokens that are
dropped, E how many the sizes let it keep, and A, B, c weights of each head, zero until they are fitted or
trained. Nothing is dropped while everything fits, and then nothing is added. No state is needed: n follows
from the position.

A sum of k^T v over the dropped tokens, the linear part of the paper, was measured beside it on SmolLM2: it
took off less of what dropping costs than as many bytes of salient tokens do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .salient import BLOCK, Sizes


def dropped_after(position: Tensor, sizes: Sizes) -> Tensor:
    """How many earlier tokens a causal query does not see; position int64 [B, T]."""
    leaves = torch.div(position, BLOCK, rounding_mode="floor") * BLOCK
    return (leaves - sizes.window - sizes.kept).clamp_min(0)


def dropped_of(count: Tensor, length: int, sizes: Sizes) -> Tensor:
    """How many of `count` [B] tokens the queries of a bidirectional site do not see, [B, length]."""
    return (count - (2 * sizes.window + 1) - sizes.kept).clamp_min(0)[:, None].expand(-1, length)


def features(query: Tensor, rows: Tensor, dropped: Tensor, sizes: Sizes) -> Tensor:
    """What the weights are multiplied with.

    Args:
        query: Scaled, [B, H, T, D].
        rows: Output of the softmax part, [B, H, T, Dv], float32 or wider.
        dropped: int64 [B, T].
        sizes: Of the mechanism.

    Returns:
        [B, H, T, D + Dv + 1] in the dtype of `rows`.
    """
    kept = max(sizes.window + sizes.kept, 1)
    share = (dropped.to(rows.dtype) / kept).log1p()[:, None, :, None]
    return torch.cat([query.to(rows.dtype), rows, torch.ones_like(rows[..., :1])], 3) * share


def after_state(
    query: Tensor,
    rows: Tensor,
    weight: Tensor,
    length: Tensor,
    real: Tensor | None,
    sizes: Sizes,
    scale: float,
) -> Tensor:
    """`rows` [B, Hkv, R, T, Dv] of tokens after a state, and what is added.

    query: [B, Hkv, R, T, D]. weight: [Hkv, R, Dv, D + Dv + 1]. length: int64 [B], tokens before these. real:
    Bool [B, T], tokens that count; None: all.
    """
    if real is None:
        ahead = torch.arange(query.shape[3], device=query.device)
    else:
        ahead = (real.cumsum(1) - 1).clamp_min(0)
    found = features(
        query.flatten(1, 2).to(rows.dtype) * scale,
        rows.flatten(1, 2),
        dropped_after(length[:, None] + ahead, sizes),
        sizes,
    )
    if real is not None:
        found = found.masked_fill(~real[:, None, :, None], 0)  # whatever padding holds, NaN included
    return rows + (found @ weight.flatten(0, 1).to(rows.dtype).mT).unflatten(1, rows.shape[1:3])
