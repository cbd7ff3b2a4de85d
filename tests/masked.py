"""One attention under any mask: what the matcher says of it, and whether that is true.

The mask is a code of the length and of named inputs; `make_inputs` makes every input that such a code may
read. Captured is one short length and inputs that show nothing: no padding, one document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from linearize.passes import capture, find_attention
from linearize.passes.site import Mask, Pattern
from torch import Tensor, nn

LONGEST = 80
"""Entries of a buffer along each side."""

SHOWN = (3, 11)
"""(batch, length) of the capture: shorter than most windows, prefixes and chunks."""

LATER = ((3, 11), (2, 37), (2, 70))

Inputs = dict[str, Tensor]
Code = Callable[[int, Inputs], Tensor]
"""From a length and the inputs to a bool mask, True where a key is seen, that broadcasts to [B, 1, T, T]."""


def make_inputs(batch: int, length: int, seed: int) -> Inputs:
    """Every input a mask may read; the first seed shows nothing: no padding, one document, no prefix."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 9, (batch, length), generator=g)
    keep = torch.ones(batch, length, dtype=torch.long)
    segments = torch.zeros(batch, length, dtype=torch.long)
    lengths = torch.full((batch,), length)
    if seed:
        tokens[torch.rand(batch, length, generator=g) < 0.3] = 2
        keep[torch.rand(batch, length, generator=g) < 0.3] = 0
        segments = (torch.rand(batch, length, generator=g) < 0.2).long().cumsum(1)
        lengths = torch.randint(1, length + 1, (batch,), generator=g)
    positions = torch.arange(length).expand(batch, -1) - (segments * 0 if not seed else _starts(segments))
    return {
        "keep": keep,
        "real": keep.bool(),
        "tokens": tokens,
        "segments": segments,
        "positions": positions.contiguous(),
        "lengths": lengths,
        "weights": keep.float(),
    }


def _starts(segments: Tensor) -> Tensor:
    """The place where each token's segment starts."""
    place = torch.arange(segments.shape[1]).expand_as(segments)
    first = torch.cat([torch.ones_like(segments[:, :1]), segments.diff(dim=1)], 1) != 0
    return torch.where(first, place, 0).cummax(1).values


def grid(t: int) -> tuple[Tensor, Tensor]:
    place = torch.arange(t)
    return place[:, None], place[None]


def ones(t: int) -> Tensor:
    return torch.ones(t, t, dtype=torch.bool)


APPLY = ("fill", "where", "add", "times", "sdpa", "sdpa_float", "two_steps")


class OneAttention(nn.Module):
    """One attention whose mask is a code of its length and inputs."""

    def __init__(self, code: Code, names: Sequence[str], how: str, buffer: Code | None) -> None:
        super().__init__()
        self.code, self.names, self.how = code, tuple(names), how
        if buffer is not None:
            self.register_buffer("kept", buffer(LONGEST, {}))
        self.qkv = nn.Linear(8, 24)

    def mask(self, t: int, inputs: Inputs) -> Tensor:
        mask = self.code(t, inputs)
        return mask & self.kept[:t, :t] if hasattr(self, "kept") else mask

    def forward(self, x: Tensor, *inputs: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mask = self.mask(x.shape[1], dict(zip(self.names, inputs, strict=True)))
        if self.how.startswith("sdpa"):
            if self.how == "sdpa_float":
                mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
            out = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        else:
            out = self.hidden(q @ k.mT * 0.5, mask).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2)

    def hidden(self, scores: Tensor, mask: Tensor) -> Tensor:
        lowest = torch.finfo(scores.dtype).min
        if self.how == "fill":
            return scores.masked_fill(~mask, -torch.inf)
        if self.how == "where":
            return torch.where(mask, scores, lowest)
        if self.how == "add":
            return scores + torch.where(mask, 0.0, -torch.inf)
        if self.how == "times":
            return scores + (1.0 - mask.to(scores.dtype)) * -1e9
        half = scores + (~mask).float() * lowest
        return half.masked_fill(mask == 0, lowest)


def reading(module: OneAttention) -> Mask:
    """What the matcher says of the mask, from one capture that shows nothing."""
    inputs = make_inputs(*SHOWN, 0)
    graph = capture(module, (torch.randn(*SHOWN, 8), *(inputs[name] for name in module.names)))
    (site,) = find_attention(graph).sites
    return site.mask


def check(module: OneAttention, mask: Mask) -> None:
    """What is said of the mask is true at every length and on every input tried."""
    for batch, length in LATER:
        for seed in (0, 1, 2):
            seen = module.mask(length, make_inputs(batch, length, seed))
            seen = seen.expand(batch, 1, length, length)[:, 0]
            expected = shown(mask.pattern, mask.width, length).expand_as(seen)
            if mask.padding:
                expected = expected & seen.any(-2, keepdim=True)
            if mask.documents:
                keys = seen.diagonal(dim1=-2, dim2=-1)
                near = (seen | seen.mT) & keys[:, None] & keys[:, :, None]
                reached = near.float() @ near.float() > 0
                if mask.pattern is not Pattern.WINDOW and mask.pattern is not Pattern.BAND:
                    assert bool((reached == near).all()), "documents overlap"
                expected = expected & seen
                continue
            assert bool((seen == expected).all()), (mask.label, length, seed)


def shown(pattern: Pattern, width: int | None, length: int) -> Tensor:
    i, j = grid(length)
    match pattern:
        case Pattern.FULL:
            return torch.ones(length, length, dtype=torch.bool)
        case Pattern.CAUSAL:
            return j <= i
        case Pattern.WINDOW:
            return (j <= i) & (i - j < width)
        case Pattern.BAND:
            return (i - j).abs() <= width
        case Pattern.CHUNK:
            return (j <= i) & (i // width == j // width)
    raise AssertionError(pattern)
