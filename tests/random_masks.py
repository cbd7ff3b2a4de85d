"""Random masks in random spellings: drawn from the language of masks, or from outside of it.

The language: causal, window, band, chunk, padding, documents. A mask is written in one of many ways, in code
or as a buffer. `drawn` makes one attention of a seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from masked import APPLY, Code, Inputs, OneAttention, grid, ones
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A mask and the inputs it reads. kind: of the language; "outside" for what it cannot say."""

    code: Code
    reads: tuple[str, ...] = ()
    kind: str = "causal"


# ---- spellings of positions


def causal(r: random.Random) -> Code:
    shift = r.randint(1, 5)
    ways: list[Code] = [
        lambda t, x: ones(t).tril(),
        lambda t, x: ~ones(t).triu(1),
        lambda t, x: grid(t)[1] <= grid(t)[0],
        lambda t, x: grid(t)[0] - grid(t)[1] > -1,
        lambda t, x: ~(grid(t)[1] > grid(t)[0]),
        lambda t, x: grid(t)[1] + shift <= grid(t)[0] + shift,
        lambda t, x: (grid(t)[0] - grid(t)[1]).clamp(max=0) == 0,
        lambda t, x: torch.minimum(*grid(t)) == grid(t)[1],
        lambda t, x: torch.full((t, t), -1e9).triu(1) == 0,
        lambda t, x: (grid(t)[1] - grid(t)[0]).float() < 0.5,
        lambda t, x: torch.zeros(t, t).masked_fill(ones(t).triu(1), 1.0) != 1,
        lambda t, x: torch.where(grid(t)[1] > grid(t)[0], torch.tensor(0), torch.tensor(1)).bool(),
        lambda t, x: ones(t).flip(0).triu().flip(0) if False else ones(t).cumsum(1) <= grid(t)[0] + 1,
        lambda t, x: (2 * grid(t)[1] - 2 * grid(t)[0]) <= 1,
        lambda t, x: grid(t)[0] // 1 >= grid(t)[1],
        lambda t, x: torch.arange(1, t + 1)[:, None] > torch.arange(t),
        lambda t, x: (ones(t).int().tril(0) * 7 - 7).eq(0),
        lambda t, x: ones(t).triu().mT,
        lambda t, x: torch.stack([ones(t).tril(), ones(t)])[0],
    ]
    return r.choice(ways)


def near(r: random.Random, w: int) -> Code:
    """At most w - 1 behind the query, whatever is ahead."""
    limit = torch.tensor(w)
    ways: list[Code] = [
        lambda t, x: grid(t)[1] > grid(t)[0] - w,
        lambda t, x: (grid(t)[0] - grid(t)[1]).float() < float(w),
        lambda t, x: grid(t)[0] - grid(t)[1] < limit,
        lambda t, x: ~ones(t).tril(-w),
        lambda t, x: ones(t).triu(1 - w),
        lambda t, x: (grid(t)[0] - grid(t)[1]).clamp(min=0) <= w - 0.5,
        lambda t, x: (grid(t)[0] - grid(t)[1] + 5).sub(5) / 2 < w / 2,
        lambda t, x: ~((grid(t)[0] - w) >= grid(t)[1]),
        lambda t, x: torch.logical_not(grid(t)[1] + w <= grid(t)[0]),
        lambda t, x: (
            torch.maximum(grid(t)[0] - grid(t)[1], torch.tensor(0)) != w
            if False
            else (grid(t)[0] - grid(t)[1]).clamp(0, w).lt(w)
        ),
    ]
    return r.choice(ways)


def band(r: random.Random, w: int) -> Code:
    ways: list[Code] = [
        lambda t, x: (grid(t)[0] - grid(t)[1]).abs() <= w,
        lambda t, x: ones(t).triu(-w) & ones(t).tril(w),
        lambda t, x: ones(t).triu(-w).tril(w),
        lambda t, x: (grid(t)[0] - grid(t)[1] <= w) & (grid(t)[1] - grid(t)[0] < w + 1),
        lambda t, x: ~((grid(t)[0] - grid(t)[1]).abs().float() > float(w)),
    ]
    return r.choice(ways)


def same_chunk(r: random.Random, w: int) -> Code:
    ways: list[Code] = [
        lambda t, x: grid(t)[0] // w == grid(t)[1] // w,
        lambda t, x: torch.div(grid(t)[0], w, rounding_mode="floor") - grid(t)[1] // w == 0,
        lambda t, x: (grid(t)[0] - grid(t)[0] % w) == (grid(t)[1] - grid(t)[1] % w),
        lambda t, x: (grid(t)[0] / w).floor() == (grid(t)[1] / w).floor(),
        lambda t, x: (grid(t)[0] // w).eq((torch.arange(t) / w).int()),
    ]
    return r.choice(ways)


# ---- spellings of inputs


def padding(r: random.Random) -> Part:
    ids = [2, r.randint(3, 8)]
    ways: list[tuple[Code, str]] = [
        (lambda t, x: x["real"][:, None, None], "real"),
        (lambda t, x: ~(x["keep"] == 0)[:, None, None].expand(-1, 1, t, t), "keep"),
        (lambda t, x: x["keep"][:, None, None].bool(), "keep"),
        (lambda t, x: (x["tokens"] != 2).view(-1, 1, 1, t), "tokens"),
        (lambda t, x: ~torch.isin(x["tokens"], torch.tensor(ids))[:, None, None], "tokens"),
        (lambda t, x: (x["tokens"].sub(2).abs() > 0)[:, None, None], "tokens"),
        (lambda t, x: torch.arange(t)[None, None, None] < x["lengths"][:, None, None, None], "lengths"),
        (lambda t, x: (x["weights"] > 0.5)[:, None, None], "weights"),
        (lambda t, x: (1 - x["keep"]).to(torch.bool).logical_not()[:, None, None], "keep"),
        (
            lambda t, x: x["keep"][torch.arange(x["keep"].shape[0])[:, None, None, None], grid(t)[1]] > 0,
            "keep",
        ),
        (lambda t, x: (x["tokens"] == 2).cumsum(1)[:, None, None] < 3, "tokens"),
    ]
    code, name = r.choice(ways)
    return Part(code, (name,), "padding")


def documents(r: random.Random) -> Part:
    def tell(x: Tensor) -> Tensor:
        return x[:, None, :, None] == x[:, None, None]

    ways: list[tuple[Code, str]] = [
        (lambda t, x: tell(x["segments"]), "segments"),
        (lambda t, x: tell((x["tokens"] == 2).cumsum(1)), "tokens"),
        (lambda t, x: tell((x["tokens"] == 2).cumsum(1) - (x["tokens"] == 2).long()), "tokens"),
        (lambda t, x: tell((x["positions"] == 0).int().cumsum(-1)), "positions"),
        (lambda t, x: (x["segments"][:, :, None] - x["segments"][:, None] == 0)[:, None], "segments"),
        (lambda t, x: ~(x["segments"][:, :, None] != x["segments"][:, None]).unsqueeze(1), "segments"),
        (
            lambda t, x: tell(
                (torch.diff(x["positions"], prepend=x["positions"][:, :1] - 1, dim=1) != 1).cumsum(1)
            ),
            "positions",
        ),
    ]
    code, name = r.choice(ways)
    return Part(code, (name,), "documents")


def outside(r: random.Random) -> Part:
    """What the language does not say."""
    n = r.randint(12, 60)
    ways: list[tuple[Code, tuple[str, ...]]] = [
        (lambda t, x: grid(t)[1] >= grid(t)[0], ()),
        (lambda t, x: ones(t).tril() | (grid(t)[1] < n), ()),
        (lambda t, x: (grid(t)[0] - grid(t)[1]) % 3 != 1, ()),
        (lambda t, x: (grid(t)[1] > grid(t)[0] - n) | (grid(t)[1] < 2), ()),
        (lambda t, x: (grid(t)[0] < n) | (grid(t)[1] > n), ()),
        (lambda t, x: grid(t)[0] + grid(t)[1] < 2 * n, ()),
        (lambda t, x: ~((grid(t)[0] - grid(t)[1]) == n), ()),
        (lambda t, x: ones(t).tril() | (grid(t)[1] < x["lengths"][:, None, None, None]), ("lengths",)),
        (lambda t, x: ones(t).tril() | (x["tokens"] == 2)[:, None, None], ("tokens",)),
        (lambda t, x: x["real"][:, None, :, None] & x["real"][:, None, None], ("real",)),
        (lambda t, x: x["positions"][:, None, None] <= x["positions"][:, None, :, None], ("positions",)),
        (lambda t, x: x["segments"][:, None, None] <= x["segments"][:, None, :, None], ("segments",)),
        (lambda t, x: (grid(t)[0] - grid(t)[1]).half() < float(n), ()),
        (lambda t, x: (grid(t)[0] - grid(t)[1]) < x["lengths"][:, None, None, None], ("lengths",)),
        (lambda t, x: grid(t)[0] // 4 >= grid(t)[1] // 4, ()),
        (lambda t, x: ((grid(t)[0] - grid(t)[1]).float() * 0.3).sin() > -0.9, ()),
    ]
    code, reads = r.choice(ways)
    return Part(code, reads, "outside")


# ---- random masks


def positional(r: random.Random) -> list[Part]:
    w = r.choice([2, 5, 12, 16, 31, 64])
    first = causal(r)
    kinds = {
        "full": [],
        "causal": [first],
        "window": [first, near(r, w)],
        "band": [band(r, w)],
        "chunk": [first, same_chunk(r, w)],
    }
    kind = r.choice(list(kinds))
    return [Part(code, kind=kind) for code in kinds[kind]]


def draw(seed: int) -> tuple[list[Part], random.Random]:
    r = random.Random(seed)
    parts = positional(r)
    parts += [padding(r)] if r.random() < 0.35 else []
    parts += [documents(r)] if r.random() < 0.25 else []
    parts += [outside(r)] if r.random() < 0.3 else []
    r.shuffle(parts)
    return parts or [Part(lambda t, x: grid(t)[1] >= 0, kind="full")], r


def joined(r: random.Random, parts: Sequence[Part]) -> Code:
    """The conjunction of the parts, in one of its spellings."""
    codes = [part.code for part in parts]
    way = r.randrange(5)

    def code(t: int, x: Inputs) -> Tensor:
        masks = [one(t, x) for one in codes]
        total = masks[0]
        for mask in masks[1:]:
            if way == 0:
                total = total & mask
            elif way == 1:
                total = ~(~total | ~mask)
            elif way == 2:
                total = total.logical_and(mask)
            elif way == 3:
                total = torch.where(mask, total, torch.zeros((), dtype=torch.bool))
            else:
                total = (total * mask).bool()
        return total

    return code


@dataclass(frozen=True)
class Drawn:
    """One attention under a random mask, and the kinds of which its mask is a conjunction."""

    module: OneAttention
    kinds: frozenset[str]

    @property
    def known(self) -> bool:
        """The language can say it."""
        return "outside" not in self.kinds


def drawn(seed: int) -> Drawn:
    parts, r = draw(seed)
    names = sorted({name for part in parts for name in part.reads})
    fixed = next((part for part in parts if not part.reads), None)
    as_buffer = fixed is not None and r.random() < 0.3
    rest = [part for part in parts if not (as_buffer and part is fixed)]
    code = joined(r, rest) if rest else (lambda t, x: ones(t))
    torch.manual_seed(seed)
    module = OneAttention(code, names, r.choice(APPLY), fixed.code if as_buffer and fixed else None).eval()
    return Drawn(module, frozenset(part.kind for part in parts))
