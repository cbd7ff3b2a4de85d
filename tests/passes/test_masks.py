"""Kinds of masks that one example does not show: each is read for what it is, or called something else."""

from __future__ import annotations

import pytest
import torch
from linearize.passes import capture, find_attention
from mask_kinds import KINDS, SEEN
from masked import LONGEST, OneAttention, check, grid, make_inputs, ones, reading
from torch import Tensor, nn


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
