"""Exact attention to a constant number of tokens: the last ones, the first ones and the salient ones.

Tokens are counted in blocks of `BLOCK`. A query of block b sees, causally and by softmax,

    near     every token from position b * BLOCK - window on, itself the last
    kept     of all earlier tokens the first `sinks`, and the `salient` ones with the largest scores

A score says how much attention a token got. The weights that the queries of block b - 3 gave are counted
before block b, and what was counted earlier is then worth `DECAY` of itself. After that the tokens that are
near for block b - 1 and not for block b compete with those that are kept. So a query reads a selection that
depends only on tokens at least `DELAY` older than itself: trees that deep, and rewinds that long, see
selections of committed tokens alone (as long as the window is no narrower).

Heavy hitters by accumulated attention are those of H2O (arXiv 2306.14048), the first tokens those of
StreamingLLM (arXiv 2309.17453); average, delay and blocks are ours.

State of one layer, K = sinks + salient rows that are kept, R rows of a ring; rows of the batch independent:

    keys    [B, Hkv, K + R, D]       kept tokens in any order, then position p in row K + p % R
    values  [B, Hkv, K + R, Dv]
    scores  [B, Hkv, K + R] float32  infinite for sinks, minus infinite where nothing is kept
    votes   [B, Hkv, P, K + R]       weights given and not yet counted: one row for a block of queries, or for
                                     each query where tokens can be taken back
    length  [B] int64                tokens so far
    block   [B] int64                the block that the kept tokens were chosen for
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 32
DELAY = 2 * BLOCK
DECAY = 0.9


class Sizes(NamedTuple):
    """How many tokens are seen exactly, beside the query's own block."""

    window: int
    sinks: int
    salient: int

    @property
    def kept(self) -> int:
        return self.sinks + self.salient


class State(NamedTuple):
    """The tensors of the module's docstring; functions here change them in place."""

    keys: Tensor
    values: Tensor
    scores: Tensor
    votes: Tensor
    length: Tensor
    block: Tensor


@dataclass(frozen=True)
class Flat:
    """Sequences that lie end to end in one row of tokens, and whose states are rows of a larger state.

    All int64 [B] on the CPU: slots, the rows of the state, no two the same; first, the token that each
    sequence begins at; count, how many it has.
    """

    slots: Tensor
    first: Tensor
    count: Tensor


def new(
    batch: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    sizes: Sizes,
    max_rewind: int = 0,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> State:
    """An empty state. max_rewind: tokens that can be taken back at any time."""
    ring = sizes.window + BLOCK * (1 + -(-max_rewind // BLOCK))
    pending = ring - sizes.window + DELAY  # queries whose weights are not yet counted
    rows = pending if max_rewind else pending // BLOCK
    heads = (batch, kv_heads)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    state = State(
        torch.zeros(*heads, sizes.kept + ring, head_dim, dtype=dtype, device=device),
        torch.zeros(*heads, sizes.kept + ring, value_dim, dtype=dtype, device=device),
        torch.zeros(*heads, sizes.kept + ring, dtype=precise, device=device),
        torch.zeros(*heads, rows, sizes.kept + ring, dtype=precise, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
        torch.zeros(batch, dtype=torch.int64, device=device),
    )
    forget(state, sizes)
    return state


def forget(state: State, sizes: Sizes) -> None:
    """Keep nothing, in a state that is zero otherwise: an empty one."""
    state.scores[:, :, : sizes.kept] = -torch.inf


def queries_per_vote(state: State, sizes: Sizes) -> int:
    """How many queries share a row of `votes`: `BLOCK`, or 1 where tokens can be taken back."""
    pending = state.keys.shape[2] - sizes.kept - sizes.window + DELAY
    return pending // state.votes.shape[2]


def positions(state: State, sizes: Sizes) -> Tensor:
    """Position of the token in each row of the ring, int64 [B, R]; negative where there is none."""
    ring = state.keys.shape[2] - sizes.kept
    last = state.length[:, None] - 1
    return last - (last - torch.arange(ring, device=last.device)) % ring


def seen(state: State, sizes: Sizes) -> Tensor:
    """Which rows the queries of block `state.block` see of the committed tokens: bool [B, Hkv, K + R]."""
    position = positions(state, sizes)
    near = (position >= 0) & (position >= (state.block * BLOCK - sizes.window)[:, None])
    kept = state.scores[:, :, : sizes.kept] > -torch.inf
    return torch.cat([kept, near[:, None].expand(-1, kept.shape[1], -1)], 2)


def advance(state: State, sizes: Sizes, due: Tensor | None = None) -> tuple[State, Tensor]:
    """The state with the tokens kept that the next block is to see; what is given is not changed.

    Args:
        state: With all tokens that the next selection reads; see the module's docstring.
        sizes: As when the state was made.
        due: Bool [B], rows of the batch to advance; None: all.

    Returns:
        The new state, which shares `length` with the old one, and for each of its rows the row of the old
        state that it was, int64 [B, Hkv, K + R].
    """
    kept, ring = sizes.kept, state.keys.shape[2] - sizes.kept
    scores = _counted(state, sizes)
    leaving = (state.block * BLOCK - sizes.window)[:, None] + torch.arange(BLOCK, device=scores.device)
    rows = (kept + leaving % ring)[:, None].expand(-1, scores.shape[1], -1)  # [B, Hkv, BLOCK]
    rank = scores.gather(2, rows)
    rank = rank.masked_fill((leaving < sizes.sinks)[:, None], torch.inf)
    rank = rank.masked_fill((leaving < 0)[:, None], -torch.inf)
    every = torch.arange(kept + ring, device=rows.device).expand(*rows.shape[:2], -1)
    # Stable, so that among equals the longest kept stays, whatever the form.
    rank, order = torch.cat([scores[:, :, :kept], rank], 2).sort(dim=2, descending=True, stable=True)
    chosen = torch.cat([every[:, :, :kept], rows], 2).gather(2, order[:, :, :kept])
    scores = torch.cat([rank[:, :, :kept], scores[:, :, kept:]], 2)
    block = state.block + 1
    if due is not None:
        block = torch.where(due, block, state.block)
        chosen = torch.where(due[:, None, None], chosen, every[:, :, :kept])
        scores = torch.where(due[:, None, None], scores, state.scores)
    source = torch.cat([chosen, every[:, :, kept:]], 2)
    keys, values = (
        x.gather(2, source[..., None].expand(-1, -1, -1, x.shape[3])) for x in (state.keys, state.values)
    )
    votes = state.votes.gather(3, source[:, :, None].expand(-1, -1, state.votes.shape[2], -1))
    return State(keys, values, scores, votes, state.length, block), source


def _counted(state: State, sizes: Sizes) -> Tensor:
    """The scores after the weights that are counted before the next block, [B, Hkv, K + R]."""
    each = queries_per_vote(state, sizes)
    first = (state.block * BLOCK - DELAY) // each
    index = (first[:, None] + torch.arange(BLOCK // each, device=first.device)) % state.votes.shape[2]
    index = index[:, None, :, None].expand(-1, state.votes.shape[1], -1, state.votes.shape[3])
    given = state.votes.gather(2, index).sum(2) * (first >= 0)[:, None, None]
    return state.scores * DECAY + given
