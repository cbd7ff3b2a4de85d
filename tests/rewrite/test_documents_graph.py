"""Rows of several documents in modules of one's own: each document gets what it gets alone.

Whatever tells them apart, forward and backward, at the borders of groups and windows.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mask_kinds import apart
from masked import Inputs, OneAttention, grid, ones
from torch import Tensor

from linearize.convert.linearize import linearize
from linearize.errors import InputError, RefusedError

LENGTHS = (5, 1, 9, 2)
TOTAL = sum(LENGTHS)
NUMBERS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])

MECHANISMS: dict[str, dict[str, Any]] = {
    "window": dict(mechanism="softmax_window", options={"window": 4}),
    "groups": dict(mechanism="augmented_paper", group_size=4),
    "default": dict(options={"window": 4, "salient": 4}),
}
EXACT: dict[str, Any] = dict(mechanism="softmax_window", options={"window": 64})

# Name: (what says which document a token is of, in rows of one and of several documents; the mask).
KINDS: dict[str, tuple[Tensor, Tensor, Any]] = {
    "restarting_positions": (
        torch.arange(TOTAL),
        POSITIONS,
        lambda t, x: ones(t).tril() & apart((x["by"] == 0).cumsum(1)),
    ),
    "segments": (torch.zeros_like(NUMBERS), NUMBERS, lambda t, x: ones(t).tril() & apart(x["by"])),
    "segments_both_ways": (torch.zeros_like(NUMBERS), NUMBERS, lambda t, x: apart(x["by"])),
    "end_token": (
        torch.full((TOTAL,), 5),
        torch.where(torch.isin(torch.arange(TOTAL), torch.tensor(LENGTHS).cumsum(0) - 1), 2, 5),
        lambda t, x: ones(t).tril() & apart((x["by"] == 2).cumsum(1) - (x["by"] == 2).long()),
    ),
    "lengths": (
        torch.tensor([TOTAL]),
        torch.tensor(LENGTHS),
        lambda t, x: (
            ones(t).tril() & apart(torch.bucketize(torch.arange(t), x["by"][0].cumsum(0), right=True)[None])
        ),
    ),
    "ends": (
        torch.tensor([0, TOTAL]),
        torch.tensor([0, *LENGTHS]).cumsum(0),
        lambda t, x: ones(t).tril() & apart((torch.arange(t)[None] >= x["by"][0, 1:, None]).sum(0)[None]),
    ),
}  # fmt: skip


def module(mask: Any, how: str = "fill") -> OneAttention:
    torch.manual_seed(0)
    return OneAttention(mask, ("by",), how, None).eval()


def hidden(batch: int = 1, length: int = TOTAL) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_each_document_gets_what_it_gets_alone(kind: str) -> None:
    one, several, mask = KINDS[kind]
    original, x = module(mask, "sdpa" if kind == "segments" else "fill"), hidden()
    exact = linearize(copy.deepcopy(original), (x, one[None]), **EXACT)
    torch.testing.assert_close(exact(x, several[None]), original(x, several[None]), atol=1e-5, rtol=1e-4)
    names = list(MECHANISMS) if kind == "segments" else ["groups"]
    for settings in [MECHANISMS[name] for name in names]:
        model: Any = linearize(copy.deepcopy(original), (x, one[None]), **settings)
        packed = x.clone().requires_grad_()
        found = model(packed, several[None])
        (grad,) = torch.autograd.grad(found.square().sum(), packed)
        start = 0
        for length in LENGTHS:
            here = slice(start, start + length)
            alone = x[:, here].clone().requires_grad_()
            by = {"lengths": torch.tensor([length]), "ends": torch.tensor([0, length])}.get(
                kind, one[:length]
            )
            wanted = model(alone, by[None])
            torch.testing.assert_close(found[:, here], wanted, atol=1e-6, rtol=1e-5)
            (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), alone)
            torch.testing.assert_close(grad[:, here], wanted_grad, atol=1e-6, rtol=1e-5)
            start += length


@pytest.mark.parametrize("causal", [True, False])
def test_documents_need_not_stand_side_by_side_and_may_be_padded(causal: bool) -> None:
    def mask(t: int, x: Inputs) -> Tensor:
        seen = apart(x["by"]) & (x["by"] >= 0)[:, None, None]
        return seen & ones(t).tril() if causal else seen

    original, x = module(mask), hidden(2)
    model = linearize(copy.deepcopy(original), (x, torch.zeros(2, TOTAL, dtype=torch.long)), **EXACT)
    by = torch.tensor(
        [[0, 1, 0, 0, 1, 2, 2, 0, 1, 1, 3, 0, 0, 1, 3, 3, 2], [0] * 5 + [-1] * 4 + [1] * 6 + [-1] * 2]
    )
    real = by >= 0
    torch.testing.assert_close(model(x, by)[real], original(x, by)[real], atol=1e-5, rtol=1e-4)


def test_a_window_within_documents_is_followed_where_each_stands_side_by_side() -> None:
    def mask(t: int, x: Inputs) -> Tensor:
        return ones(t).tril() & (grid(t)[0] - grid(t)[1] < 4) & apart(x["by"])

    original, x = module(mask), hidden()
    model = linearize(copy.deepcopy(original), (x, 0 * NUMBERS[None]), **EXACT)
    torch.testing.assert_close(model(x, NUMBERS[None]), original(x, NUMBERS[None]), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="side by side|not a causal mask"):
        model(x, (torch.arange(TOTAL) % 2)[None])


def test_heads_may_each_hold_the_same_documents_and_no_others() -> None:
    """A mask for every head, as `nn.MultiheadAttention` takes it, given where none was at the conversion."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    original, x = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval(), hidden()
    model = linearize(copy.deepcopy(original), x, **EXACT)
    same = ~apart(NUMBERS[None])[0].expand(2, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(x, same), original(x, same), atol=1e-5, rtol=1e-4)
        with pytest.raises(InputError, match="not a bidirectional mask"):
            model(x, torch.stack([same[0], torch.zeros_like(same[0])]))


def test_what_may_be_no_document_is_still_refused() -> None:
    """Documents of neighbours see each other too."""

    def mask(t: int, x: Inputs) -> Tensor:
        return ones(t).tril() & ((x["by"][:, None, :, None] - x["by"][:, None, None]).abs() <= 1)

    with pytest.raises(RefusedError, match="'by'|mask"):
        linearize(module(mask), (hidden(), NUMBERS[None]))
