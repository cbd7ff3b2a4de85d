"""Masks of flex_attention that read what the caller gives: documents and padding, carried or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import linearize as lz

Mod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Self-attention of four heads whose mask reads `given` [B, T]."""

    def __init__(self, mask: Callable[[Tensor], Mod]) -> None:
        super().__init__()
        self.mask = mask
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.project(x).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        blocks = create_block_mask(self.mask(given), batch, None, length, length, device="cpu")
        return self.out(flex_attention(q, k, v, block_mask=blocks).transpose(1, 2).reshape(batch, length, 32))


def documents(given: Tensor) -> Mod:
    return lambda b, h, i, j: (i >= j) & (given[b, i] == given[b, j])


def padding(given: Tensor) -> Mod:
    return lambda b, h, i, j: ~((j > i) | (given[b, j] == 0))


def prefix(given: Tensor) -> Mod:
    return lambda b, h, i, j: (i >= j) | (j < given[b, 0])


def call(batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    given = torch.randint(3, (batch, length), generator=generator).sort(-1).values
    return torch.randn(batch, length, 32, generator=generator), given


@pytest.mark.parametrize("mechanism", ("softmax", "augmented"))
@pytest.mark.parametrize("mask", (documents, padding))
@torch.no_grad()
def test_what_a_mask_reads_is_followed_at_every_call(mechanism: str, mask: Any) -> None:
    torch.manual_seed(0)
    original = Attention(mask).eval().requires_grad_(False)
    example = call(2, 12, 0)[0], torch.ones(2, 12, dtype=torch.long)
    model = lz.linearize(copy.deepcopy(original), example, mechanism=mechanism)
    for batch, length, seed in ((2, 12, 1), (3, 17, 2), (1, 9, 3)):
        x, given = call(batch, length, seed)
        seen = given != 0 if mask is padding else torch.ones_like(given, dtype=torch.bool)
        torch.testing.assert_close(model(x, given)[seen], original(x, given)[seen], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_mask_of_prefixes_is_refused() -> None:
    model = Attention(prefix).eval().requires_grad_(False)
    x, given = call(2, 12, 0)
    with pytest.raises(lz.LinearizeError, match="prefix|given"):
        lz.linearize(model, (x, torch.zeros_like(given)))
