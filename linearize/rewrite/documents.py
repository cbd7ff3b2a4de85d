"""Rows that hold several documents: attention that gives each what it gets alone, whatever the mechanism.

Documents are numbers, one per token: int64 `[B, T]`. Tokens of a row with the same number are one document;
0 is padding that belongs to none. A negative number is padding inside the document of that number: no token
sees it, and it sees what the document's other tokens see.

The tokens of a document need not stand side by side. They are gathered into a batch of their own, padded on
the right, which every mechanism takes; so there is nothing about documents in any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of query, key, value and the mask of real tokens `[B, T]`, or None where all are."""


@dataclass(frozen=True)
class Documents:
    """Documents of like length, one a row.

    Attributes:
        tokens: int64 `[N, L]`, which token of the flattened `[B * T]` stands here; 0 after the last.
        filled: bool `[N, L]`, whether one does.
        real: bool `[N, L]`, which of them may be seen; None where all may.
    """

    tokens: Tensor
    filled: Tensor
    real: Tensor | None


def attend_documents(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, documents: Tensor
) -> Tensor:
    """Each document's attention by itself.

    Args:
        attention: what to run on every batch of documents.
        query: `[B, H, T, D]`.
        key: `[B, Hkv, T, D]`.
        value: `[B, Hkv, T, Dv]`.
        documents: see the module's docstring.

    Returns:
        `[B, H, T, Dv]`, zero at tokens of no document.
    """
    batch, heads, length, _ = query.shape
    flat = [x.transpose(1, 2).reshape(batch * length, x.shape[1], x.shape[3]) for x in (query, key, value)]
    outputs, places = [], []
    for group in grouped(documents.expand(batch, -1)):
        q, k, v = (x[group.tokens].transpose(1, 2) for x in flat)
        outputs.append(attention(q, k, v, group.real).transpose(1, 2)[group.filled])
        places.append(group.tokens[group.filled])
    if not outputs:
        return value.new_zeros(batch, heads, length, value.shape[3])
    rows = torch.cat(outputs)
    whole = rows.new_zeros(batch * length, heads, value.shape[3]).index_copy(0, torch.cat(places), rows)
    return whole.reshape(batch, length, heads, -1).transpose(1, 2)


def grouped(documents: Tensor) -> Iterator[Documents]:
    """The documents of all rows, by length: within a group none is padded to more than twice its length."""
    rows = torch.arange(documents.shape[0], device=documents.device)[:, None]
    number = documents.abs()
    name = (rows * (number.max() + 1) + number).flatten()
    (places,) = number.flatten().nonzero(as_tuple=True)
    _, document, lengths = name[places].unique(return_inverse=True, return_counts=True)
    order = document.argsort(stable=True)
    places, document = places[order], document[order]
    first = lengths.cumsum(0) - lengths
    rank = torch.arange(len(places), device=places.device) - first[document]
    size = (lengths - 1).double().log2().floor()  # -inf, 0, 1, 1, 2, 2, 2, 2, ... of lengths 1, 2, 3, ...
    for each in size.unique():
        members = size == each
        row = members.cumsum(0) - 1
        here = members[document]
        tokens = places.new_zeros(int(members.sum()), int(lengths[members].max()))
        filled = torch.zeros_like(tokens, dtype=torch.bool)
        tokens[row[document[here]], rank[here]] = places[here]
        filled[row[document[here]], rank[here]] = True
        real = filled & (documents.flatten()[tokens] > 0)
        yield Documents(tokens, filled, None if bool(real.all()) else real)


def side_by_side(documents: Tensor) -> Tensor:
    """Bool: the tokens of every document `[B, T]` stand side by side, padding inside of one included."""
    number = documents.abs()
    runs, distinct = (
        ((x != F.pad(x[:, :-1], (1, 0))) & (x > 0)).sum(1) for x in (number, number.sort(1).values)
    )
    return (runs == distinct).all()


def of_lengths(ends: Tensor, length: int) -> Tensor:
    """Documents `[1, T]` of a row of `length` tokens, from where they end: int `[0, n1, n1 + n2, ..., T]`."""
    columns = torch.arange(length, device=ends.device)
    return (torch.bucketize(columns, ends[1:].to(columns.dtype), right=True) + 1)[None]


def of_square(seen: Tensor, real: Tensor, windowed: bool) -> Tensor:
    """Documents of a mask, if it has any. Whether it says exactly these is for the caller to compare.

    Without a window the first real key that a token sees names its document. In a window, where a token does
    not see the real one before it, a document begins: there the tokens of each stand side by side.

    Args:
        seen: bool `[B, 1, T, T]`.
        real: bool `[B, T]`, the tokens that some token sees.
        windowed: the mask has a window.
    """
    seen = seen[:, 0].expand(real.shape[0], -1, -1) & real[:, None, :]
    if not windowed:
        first = seen.byte().argmax(2)
        number = torch.where(seen.any(2), first + 1, 0)
        return torch.where(real, number, -number)
    columns = torch.arange(real.shape[1], device=real.device)
    before = torch.where(real, columns, -1).cummax(1).values.roll(1, 1)
    before[:, 0] = -1  # of each token the last real one before it, if any
    sees = seen.gather(2, before.clamp_min(0)[:, :, None])[:, :, 0] & (before >= 0)
    begins = real & ~sees
    number = begins.cumsum(1)
    alone = ~real & ~sees
    return torch.where(real, number, -number).masked_fill(alone, 0)
