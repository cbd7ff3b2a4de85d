"""Several tokens after a state in C++: any split, with padding that is no number, is the PyTorch form's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linearize.kernels import cpu
from linearize.kernels import recurrent as plain
from torch import Tensor

from linearize.ops import attention as ops

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "")
LENGTH = 330


def in_pieces(size: int, form: str, group: int, taps: int, padded: bool, dtype: torch.dtype) -> list[Tensor]:
    """The outputs, and the state after them."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(2, n, LENGTH, 24, generator=generator).to(dtype) for n in (4, 2, 2)]
    options: dict[str, Any] = dict(
        alpha=torch.linspace(0.1, 0.5, 4), conv_weight=torch.randn(4, taps, generator=generator), form=form
    )
    real = torch.rand(2, LENGTH, generator=generator) < 0.7 if padded else None
    if real is not None:
        tokens = [x.masked_fill(~real[:, None, :, None], torch.nan) for x in tokens]
    state = ops.AttentionState.new(2, 2, 24, group_size=group, taps=taps)
    outputs = []
    for start in range(0, LENGTH, size):
        cut = slice(start, start + size)
        mask = None if real is None else real[:, cut]
        outputs.append(ops.augmented_extend(*(x[:, :, cut] for x in tokens), state, key_mask=mask, **options))
    return [torch.cat(outputs, 2), *state.tensors]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("group", "taps"), [(16, 9), (64, 32), (7, 17), (64, 1)])
def test_any_split_is_that_of_the_torch_form(padded: bool, group: int, taps: int) -> None:
    for size in (2, 7, 63, 64, 65, 130, 200):
        ours = in_pieces(size, "cpu", group, taps, padded, torch.float32)
        for found, wanted in zip(
            ours, in_pieces(size, "torch", group, taps, padded, torch.float32), strict=True
        ):
            torch.testing.assert_close(found, wanted, atol=5e-5, rtol=1e-5)


def test_half_precision_too() -> None:
    ours, wanted = (in_pieces(50, form, 16, 9, False, torch.bfloat16)[0] for form in ("cpu", "torch"))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, wanted, atol=0.05, rtol=0.02)


def test_the_torch_form_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What says `cpu form` in the log is that: the PyTorch walk is not called."""

    def unexpected(*arguments: Any) -> None:
        raise AssertionError("in PyTorch")

    monkeypatch.setattr(plain, "extend", unexpected)
    in_pieces(50, "cpu", 16, 9, True, torch.float32)
