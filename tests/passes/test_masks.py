"""Kinds of masks that one example does not show: each is read for what it is, or called something else."""

from __future__ import annotations

import pytest
import torch
from linearize.passes import capture, find_attention
from masked import LONGEST, Code, Inputs, OneAttention, check, grid, make_inputs, ones, reading
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
        lambda t, x: ones(t).tril() & ~((x["tokens"] == 2) | (x["tokens"] == 8))[:, None, None],
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


@pytest.mark.parametrize("name", list(KINDS))
def test_a_mask_is_read_for_all_lengths_and_inputs(name: str) -> None:
    label, inputs, code = KINDS[name]
    module = OneAttention(code, inputs.split(), "fill", None)
    mask = reading(module)
    assert mask.label == label
    if mask.why:
        assert all(f"inputs_{n}" in mask.why for n in range(len(module.names))), mask.why
    else:
        check(module, mask)


BUFFERS: dict[str, tuple[str, Tensor]] = {
    "causal": ("causal", ones(LONGEST).tril()),
    "window": ("window(64)", ones(LONGEST).tril() ^ ones(LONGEST).tril(-64)),
    "prefix": ("prefix(40)", ones(LONGEST).tril() | (torch.arange(LONGEST) < 40)),
    "chunk": ("chunk(32)", ones(LONGEST).tril() & (grid(LONGEST)[0] // 32 == grid(LONGEST)[1] // 32)),
    "one_entry_off": (
        "other",
        ones(LONGEST).tril().index_put((torch.tensor(70), torch.tensor(3)), torch.tensor(False)),
    ),
    "random": ("other", SEEN | torch.eye(LONGEST, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", list(BUFFERS))
@pytest.mark.parametrize("additive", [False, True])
def test_a_buffer_is_read_whole(name: str, additive: bool) -> None:
    """Its first rows are all causal."""
    label, table = BUFFERS[name]
    module = OneAttention(lambda t, x: ones(t), (), "fill", lambda t, x: table)
    if additive:
        module.kept = torch.zeros(LONGEST, LONGEST).masked_fill(~table, -1e9)
        module.mask = lambda t, x: module.kept[:t, :t] > -1.0
    mask = reading(module)
    assert mask.label == label
    if not mask.why:
        check(module, mask)


class TwoSteps(nn.Module):
    """A mask, and then another step on the scores."""

    def __init__(self, step: str) -> None:
        super().__init__()
        self.step, self.qkv = step, nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        t = x.shape[1]
        scores = (q @ k.mT).masked_fill(ones(t).triu(1), -1e4)
        if self.step == "shown again":
            scores = scores.masked_fill(ones(t).triu(2), 0.0)
        elif self.step == "scaled":
            scores = scores * 0.1
        return scores.softmax(-1) @ v


@pytest.mark.parametrize(("step", "label"), [("", "causal"), ("shown again", "other"), ("scaled", "other")])
def test_a_later_step_can_undo_a_mask(step: str, label: str) -> None:
    (site,) = find_attention(capture(TwoSteps(step), (torch.randn(3, 11, 8),))).sites
    assert site.mask.label == label


def test_lengths_cannot_be_told_from_new_tokens_alone() -> None:
    """A running count or a comparison with the place starts anew there; an entry of the token does not."""
    for name, own in (("lengths", False), ("pad_id", True), ("two_pad_ids", True)):
        label, inputs, code = KINDS[name]
        assert reading(OneAttention(code, inputs.split(), "fill", None)).own_column == own, name


def test_the_check_sees_a_wrong_reading() -> None:
    """The guard of these tests can fail: a window called causal is found out where it shows."""
    from dataclasses import replace

    module = OneAttention(KINDS["float_window"][2], (), "fill", None)
    mask = reading(module)
    with pytest.raises(AssertionError):
        check(module, replace(mask, width=63))
    assert make_inputs(2, 9, 1)["lengths"].shape == (2,)
