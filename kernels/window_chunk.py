"""`torch.ops.linearize.softmax_window` and `power_window`: attention to nearby tokens in blocks.

Both are one loop over blocks, `forward`, with another function from scores to weights. Beside the outputs
they give the size of the weights, with which a caller joins what is farther away.

Each is one opaque node in any graph, as the core operator is and for the same reason: seen through, the
number of blocks would be compared with 1, and a trace on a short input would be valid for short inputs only.
The backward recomputes the forward, so that training keeps the arguments and nothing of size [T, window].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .recomputed import recomputed
from .softmax import product
from .tensors import take_rows

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_mask, SymInt? query_start, "
    "Tensor? query_start_tensor, int window, bool causal"
)
EPSILON = 1e-6
"""What a power weighs more than its score says, so that no query is without weights."""

Weigh = Callable[..., tuple[Tensor, Tensor]]
"""(scores [..., S], hidden, *settings) -> weights [..., S], their size [..., 1]. hidden: bool, or None."""


def softmax_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    query_start: int | Tensor | None,
    window: int,
    causal: bool,
) -> Tensor:
    """softmax(q.k) v over the tokens less than `window` away, and log sum exp(q.k).

    Args:
        query: [B, Hkv, R, T, D], scaled: the R query heads of each key/value head. Query, key and value have
            one dtype, in which all is computed.
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, Dv].
        key_mask: Bool [B, S], True for real tokens; distances count real tokens only. None: all are.
        query_start: Key column of the first query if causal; None: the queries are the last columns.
        window: Tokens that are near, the present one included.
        causal: Later tokens are not seen.

    Returns:
        [B, Hkv, R, T, Dv + 1], the logarithm in the last column; zeros for padded queries.
    """
    return _softmax_window(query, key, value, key_mask, *_start(query_start), window, causal)


def power_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    query_start: int | Tensor | None,
    window: int,
    causal: bool,
    power: int,
) -> Tensor:
    """`softmax_window` with the weights of `power_weights`, and their size in the last column.

    Args:
        query, key, value, key_mask, query_start, window, causal: As there.
        power: A power of two.

    Returns:
        [B, Hkv, R, T, Dv + 1], as there.
    """
    return _power_window(query, key, value, key_mask, *_start(query_start), window, causal, power)


def softmax_weights(scores: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(scores), and log sum exp(scores)."""
    if hidden is not None:
        # Not -inf: a row without any key must have finite numbers as well.
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores.softmax(-1), scores.logsumexp(-1, keepdim=True)


def power_weights(scores: Tensor, hidden: Tensor | None, power: int) -> tuple[Tensor, Tensor]:
    """w / sum w for w = relu(1 + scores / power)^power + EPSILON, and (sum w)^(1 / power).

    power: a power of two. All is relative to the row's largest base, if that is above 1, so that neither a
    large score nor its power overflows; a row of hidden keys weighs nothing, and its size is 1.
    """
    base = (1 + scores / power).relu()
    if hidden is not None:
        base = base.masked_fill(hidden, 0)
    largest = base.detach().amax(-1, keepdim=True).clamp(min=1)
    weights = to_power(base / largest, power) + EPSILON * to_power(1 / largest, power)
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0)
    total = weights.sum(-1, keepdim=True)
    total = torch.where(total > 0, total, torch.ones_like(total))
    return weights / total, largest * root(total, power)


def to_power(x: Tensor, power: int) -> Tensor:
    """x^power for a power of two, by squaring."""
    for _ in range(power.bit_length() - 1):
        x = x * x
    return x


def root(x: Tensor, power: int) -> Tensor:
    """x^(1 / power) for a power of two."""
    for _ in range(power.bit_length() - 1):
        x = x.sqrt()
    return x


def _start(query_start: int | Tensor | None) -> tuple[int | None, Tensor | None]:
    """As an int and as a tensor, one of them None."""
    return (None, query_start) if isinstance(query_start, Tensor) else (query_start, None)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    query_start: Any,
    query_start_tensor: Tensor | None,
    window: int,
    causal: bool,
    weigh: Weigh,
) -> Tensor:
    """The operators seen through: arguments as in `softmax_window`, the start as an int or as a tensor.

    Everything is counted in ranks, real tokens before a token: queries of a call have consecutive ranks.
    Block n holds `block` of them; all its keys are the ranks from `before` ahead of it to `after` past it.
    """
    length, keys, device = query.shape[3], key.shape[2], query.device
    start = query_start if query_start_tensor is None else query_start_tensor
    if start is None:
        start = keys - length if causal else 0
    window = min(window, keys)
    block = min(window, length)
    before, after = window - 1, 0 if causal else window - 1
    blocks = -(-length // block)

    first = start  # rank of the first query, [B, 1] under a mask
    count: Any = keys
    order = back = None
    if key_mask is not None:
        columns = torch.arange(length, device=device) + start
        order = torch.argsort(~key_mask, dim=1, stable=True)  # rank -> column, real tokens first
        rank = (key_mask.cumsum(1) - 1).index_select(1, columns)
        real = key_mask.index_select(1, columns)
        count = key_mask.sum(1, keepdim=True)
        first = rank[:, :1] + 1 - real[:, :1].long()
        query = take_rows(query, torch.argsort(~real, dim=1, stable=True))
        back = (rank - first).clamp(min=0)

    span = before + block + after
    position = torch.arange(blocks * block + before + after, device=device) - before + first
    present = (position >= 0) & (position < count)
    source = position.clamp(min=0).clamp(max=keys - 1)
    if order is not None:
        source = order.gather(1, source)
    near_keys = take_rows(key, source).unfold(2, span, block)  # [B, Hkv, N, D, span]
    near_values = take_rows(value, source).unfold(2, span, block)
    lag = torch.arange(block, device=device)[:, None] + before - torch.arange(span, device=device)
    seen = present.unfold(-1, span, block).unsqueeze(-2) & (lag >= -after) & (lag <= before)
    seen = seen[:, None] if seen.dim() == 3 else seen[:, None, :, None]  # [..., N, 1, block, span]

    rows = F.pad(query, (0, 0, 0, blocks * block - length)).unflatten(3, (-1, block)).transpose(2, 3)
    scores = (rows.flatten(3, 4) @ near_keys).unflatten(3, (-1, block))  # [B, Hkv, N, R, block, span]
    weights, size = weigh(scores, ~seen)
    out = product(weights, near_values.mT, seen.expand(scores.shape))
    joined = torch.cat([out, size], dim=-1).transpose(2, 3).flatten(3, 4)[:, :, :, :length]
    return joined if back is None else take_rows(joined, back) * real[:, None, None, :, None]


def _operator(name: str, weigh: Weigh, settings: str = "") -> Any:
    """Register `linearize::{name}` and its derivative. settings: what `weigh` takes besides, as a schema."""

    def run(*inputs: Any) -> Tensor:
        own = inputs[8:]
        arguments: list[Any] = [*inputs[:8], lambda scores, hidden: weigh(scores, hidden, *own)]
        return forward(*arguments)

    def fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
        return query.new_empty((*query.shape[:4], value.shape[3] + 1))

    return recomputed(name, _ARGUMENTS + settings, run, fake)


_softmax_window = _operator("softmax_window", softmax_weights)
_power_window = _operator("power_window", power_weights, ", int power")
