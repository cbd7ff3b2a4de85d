"""Masks by name that one short example does not tell apart: how each must be read, its inputs, its code."""

from __future__ import annotations

import torch
from masked import LONGEST, Code, Inputs, grid, ones
from torch import Tensor, nn


def apart(x: Tensor) -> Tensor:
    """Tokens of one value: [B, T] -> [B, 1, T, T]."""
    return x[:, None, :, None] == x[:, None, None]


def prefix_written_in_place(t: int, x: Inputs) -> Tensor:
    mask = ones(t).tril()
    mask[:, :5] = True
    return mask


JUMPS = lambda p: (torch.diff(p, prepend=p[:, :1] - 1, dim=1) != 1).cumsum(1)  # noqa: E731
ENDS = lambda ids: (ids == 2).cumsum(1)  # noqa: E731
LIMIT = torch.tensor([16])
SEEN = torch.rand(LONGEST, LONGEST, generator=torch.Generator().manual_seed(0)) > 0.5

# Name: (label, inputs, mask).
KINDS: dict[str, tuple[str, str, Code]] = {
    # padding, by any value
    "pad_id": ("full+padding", "tokens", lambda t, x: (x["tokens"] != 2)[:, None, None]),
    "two_pad_ids": (
        "causal+padding",
        "tokens",
        lambda t, x: ones(t).tril() & ~((x["tokens"] == 2) | (x["tokens"] == 1))[:, None, None],
    ),
    "pad_ids_in_a_set": (
        "causal+padding",
        "tokens",
        lambda t, x: ones(t).tril() & ~torch.isin(x["tokens"], torch.tensor([2, 5]))[:, None, None],
    ),
    "float_padding": ("full+padding", "weights", lambda t, x: (x["weights"] >= 0.5)[:, None, None]),
    "lengths": (
        "causal+padding",
        "lengths",
        lambda t, x: ones(t).tril() & (grid(t)[1] < x["lengths"][:, None, None, None]),
    ),
    "two_inputs": (
        "full+padding",
        "keep tokens",
        lambda t, x: ((x["keep"] == 1) | (x["tokens"] == 4))[:, None, None],
    ),
    # documents
    "segments": ("causal+documents", "segments", lambda t, x: ones(t).tril() & apart(x["segments"])),
    "end_token": ("causal+documents", "tokens", lambda t, x: ones(t).tril() & apart(ENDS(x["tokens"]))),
    "end_token_belongs_to_its_document": (
        "causal+documents",
        "tokens",
        lambda t, x: ones(t).tril() & apart(ENDS(x["tokens"]) - (x["tokens"] == 2).long()),
    ),
    "end_token_of_the_token_before": (
        "causal+documents",
        "tokens",
        lambda t, x: (
            ones(t).tril() & apart((nn.functional.pad(x["tokens"][:, :-1], (1, 0), value=0) == 2).cumsum(1))
        ),
    ),
    "restarts": (
        "causal+documents",
        "positions",
        lambda t, x: ones(t).tril() & apart((x["positions"] == 0).cumsum(1)),
    ),
    "counted_backwards": (
        "causal+documents",
        "segments",
        lambda t, x: ones(t).tril() & (x["segments"][:, None, :, None] - x["segments"][:, None, None] == 0),
    ),
    "earlier_documents_hidden": (
        "causal+documents",
        "tokens",
        lambda t, x: (
            ones(t).tril() & (ENDS(x["tokens"])[:, None, :, None] <= ENDS(x["tokens"])[:, None, None])
        ),
    ),
    "jumps_and_positions": (
        "causal+documents",
        "positions",
        lambda t, x: (
            apart(JUMPS(x["positions"])) & (x["positions"][:, None, None] <= x["positions"][:, None, :, None])
        ),
    ),
    "bidirectional_documents": ("full+documents", "segments", lambda t, x: apart(x["segments"])),
    "cumulative_lengths": (
        "causal+documents",
        "lengths",
        lambda t, x: (
            ones(t).tril() & apart(torch.bucketize(torch.arange(t), x["lengths"].cumsum(0), right=True)[None])
        ),
    ),
    "positions_that_may_fall": (
        "other",
        "positions",
        lambda t, x: x["positions"][:, None, None] <= x["positions"][:, None, :, None],
    ),
    "documents_of_neighbours": (
        "other",
        "segments",
        lambda t, x: (
            ones(t).tril() & ((x["segments"][:, None, :, None] - x["segments"][:, None, None]).abs() <= 1)
        ),
    ),
    # prefixes and what sees each other
    "prefix_lengths": (
        "prefix",
        "lengths",
        lambda t, x: ones(t).tril() | (grid(t)[1] < x["lengths"][:, None, None, None]),
    ),
    "prefix_tokens": ("prefix", "tokens", lambda t, x: ones(t).tril() | (x["tokens"] == 5)[:, None, None]),
    "prefix_number": ("prefix(30)", "", lambda t, x: ones(t).tril() | (grid(t)[1] < 30)),
    "prefix_written_in_place": ("other", "", prefix_written_in_place),
    "types_that_see_each_other": (
        "other",
        "segments",
        lambda t, x: (
            ones(t).tril() | ((x["segments"] == 1)[:, None, :, None] & (x["segments"] == 1)[:, None, None])
        ),
    ),
    "switch": ("other", "lengths", lambda t, x: torch.where(x["lengths"][0] > 5, ones(t).tril(), ones(t))),
    "padded_queries": (
        "other",
        "real",
        lambda t, x: x["real"][:, None, :, None] & x["real"][:, None, None],
    ),
    # windows wider than the example
    "float_window": (
        "window(64)",
        "",
        lambda t, x: ones(t).tril() & ((grid(t)[0] - grid(t)[1]).float() < 64.0),
    ),
    "fractional_window": ("window(17)", "", lambda t, x: ones(t).tril() & (grid(t)[0] - grid(t)[1] <= 16.5)),
    "tensor_window": ("window(16)", "", lambda t, x: ones(t).tril() & (grid(t)[0] - grid(t)[1] < LIMIT)),
    "xor_of_triangles": ("window(16)", "", lambda t, x: ones(t).tril() ^ ones(t).tril(-16)),
    "shifted_window": ("window(33)", "", lambda t, x: ones(t).tril() & (grid(t)[1] + 40 >= grid(t)[0] + 8)),
    "halved_window": ("window(32)", "", lambda t, x: ones(t).tril() & ((grid(t)[0] - grid(t)[1]) / 2 < 16)),
    "clamped": ("causal", "", lambda t, x: ones(t).tril() & ((grid(t)[0] - grid(t)[1]).clamp(max=20) < 21)),
    "clamped_window": (
        "window(20)",
        "",
        lambda t, x: ones(t).tril() & ((grid(t)[0] - grid(t)[1]).clamp(max=20) < 20),
    ),
    "wide_band": ("band(25)", "", lambda t, x: ones(t).tril(25) & ones(t).triu(-25)),
    "uneven_band": ("other", "", lambda t, x: ones(t).tril(25) & ones(t).triu(-24)),
    "window_and_first_tokens": (
        "other",
        "",
        lambda t, x: ones(t).tril() & ((grid(t)[0] - grid(t)[1] < 20) | (grid(t)[1] < 2)),
    ),
    "window_by_input": (
        "other",
        "lengths",
        lambda t, x: ones(t).tril() & (grid(t)[0] - grid(t)[1] < x["lengths"][0]),
    ),
    "wide_chunks": (
        "chunk(32)",
        "",
        lambda t, x: ones(t).tril() & ((torch.arange(t) // 32)[:, None] == (torch.arange(t) / 32).int()),
    ),
    "earlier_chunks_too": ("other", "", lambda t, x: grid(t)[0] // 20 >= grid(t)[1] // 20),
    "every_third": ("other", "", lambda t, x: ones(t).tril() & ((grid(t)[0] - grid(t)[1]) % 30 != 20)),
    "strictly_before": ("other", "", lambda t, x: ones(t).tril(-1)),
    # positions that a dtype rounds or wraps
    "half_positions": ("other", "", lambda t, x: torch.arange(t).half()[:, None] >= torch.arange(t).half()),
    "byte_positions": (
        "other",
        "",
        lambda t, x: torch.arange(t).to(torch.int8)[:, None] >= torch.arange(t).to(torch.int8),
    ),
}
