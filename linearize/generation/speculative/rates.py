"""How often draft heads guess right, and the hidden states that measuring and training them need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.text import sequences
from ...errors import InputError
from .hidden import observe_hidden_states


def acceptance_rates(heads: Any, model: Any, tokens: Any, ranks: int) -> list[list[float]]:
    """See `MedusaHeads.acceptance`; heads: `MedusaHeads`."""
    heads.check(model)
    count = heads.num_heads
    hits = torch.zeros(count, ranks, dtype=torch.int64)
    tried = torch.zeros(count, dtype=torch.int64)
    for piece in pieces_of(sequences(tokens, None), 512, count):
        hidden, choice = hidden_states(model, piece[None])
        places = len(piece) - 1 - count
        piece = piece.to(choice.device)
        with torch.no_grad():
            logits = heads(hidden[0, :places], piece[1 : places + 1])
        # Only places that decoding would reach: the text before them is what the model would choose.
        alive = piece[1 : places + 1] == choice[0, :places]
        for head in range(count):
            target = choice[0, head + 1 : head + 1 + places]
            rank = (logits[head] > logits[head].gather(1, target[:, None])).sum(1)
            rank = rank[alive].cpu()
            tried[head] += len(rank)
            hits[head] += torch.bincount(rank.clamp_max(ranks), minlength=ranks + 1)[:ranks]
            found = torch.zeros_like(alive)
            found[alive] = (rank < ranks).to(found.device)
            alive = found & (piece[head + 2 : head + 2 + places] == target)
    return (hits / tried.clamp_min(1)[:, None]).tolist()


@torch.no_grad()
def hidden_states(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states `[B, T, hidden_size]` that the output layer gets for tokens int64 `[B, T]`, and the
    model's greedy choice `[B, T]` after each token."""
    tokens = tokens.to(next(iter(model.parameters())).device)
    with observe_hidden_states(model) as states:
        logits = model(input_ids=tokens, use_cache=False).logits
    return states.hidden, logits.argmax(-1)


def pieces_of(found: Sequence[Tensor], context: int, num_heads: int) -> list[Tensor]:
    """Cut sequences to pieces of at most `context` tokens; leave out those too short to give a target."""
    pieces = [piece for tensor in found for piece in tensor.split(context) if len(piece) > num_heads + 1]
    if not pieces:
        raise InputError(f"the data has no text of {num_heads + 2} tokens: give more text")
    return pieces
