"""What a token that is no one's key gets as a query.

A mask of keys hides a padded token from all queries, and its own query still sees the real ones. As a rule
models do not look at what it gets; a module of someone's own may. The mechanisms give such a query zeros, so
it gets the softmax of the original here: one row of scores for each padded token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..mechanisms.module import SoftmaxAttention
from ..mechanisms.spec import SiteSpec
from .masks import position_mask, visible


def with_padded_queries(
    out: Tensor,
    spec: SiteSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_mask: Tensor,
) -> Tensor:
    """Outputs `[B, H, T, Dv]` of a whole sequence, those of padded tokens as the original gives them.

    Args:
        out: What the mechanism gave.
        spec: Of the site.
        query, key, value: As for `attend.attend`, T = S.
        mask: Of the call, bool or additive; where it has no row for each query, the spec says which is seen.
        key_mask: Bool `[B, S]`, not all True.
    """
    batch, length = key_mask.shape
    if mask is not None and mask.ndim == 4 and mask.shape[2] == length:
        seen = visible(mask)[..., :length].expand(batch, -1, -1, -1)
    else:
        seen = key_mask[:, None, None].expand(-1, -1, length, -1)
        if spec.causal:
            seen = seen & position_mask(length, length, None, key.device)
    # The mask says it all: no position pattern on top.
    softmax = SoftmaxAttention(dataclasses.replace(spec, causal=False, window=None, dropout=0.0))
    rows = []
    for at in range(batch):
        row, hidden = slice(at, at + 1), (~key_mask[at]).nonzero()[:, 0]
        if not len(hidden):
            rows.append(out[row])
            continue
        asked, sees = query[row, :, hidden], seen[row, :, hidden]
        found = softmax(asked, key[row], value[row], mask=sees)
        found = found.masked_fill(~sees.any(-1, keepdim=True), 0)
        rows.append(out[row].index_copy(2, hidden, found.to(out.dtype)))
    return torch.cat(rows)
