"""Masks on the live model: converted on an example that shows nothing, then called with what it did not show.

The converted module gives what the original gives at every real token, or the conversion is refused with the
cause. `softmax_window` with a window wider than the text is exact softmax, so it shows what a linear form is
told of the mask.
"""

from __future__ import annotations

import copy

import pytest
import torch
from mask_kinds import KINDS
from masked import SHOWN, OneAttention, make_inputs
from torch import Tensor

import linearize as lz
from linearize.errors import RefusedError

WIDE = {"mechanism": "softmax_window", "options": {"window": 1024}}
EXACT = {"mechanism": "softmax"}


def arguments(module: OneAttention, batch: int, length: int, seed: int) -> tuple[Tensor, ...]:
    x = torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(seed))
    inputs = make_inputs(batch, length, seed)
    return x, *(inputs[name] for name in module.names)


def converted(name: str, settings: dict) -> tuple[OneAttention, OneAttention]:
    """The original and the converted module of one kind."""
    torch.manual_seed(0)
    _, inputs, code = KINDS[name]
    original = OneAttention(code, inputs.split(), "fill", None).eval()
    module = copy.deepcopy(original)
    lz.linearize(module, arguments(original, *SHOWN, 0), **settings)
    return original, module


def follows(original: OneAttention, module: OneAttention) -> None:
    for length, seed in ((11, 1), (70, 2)):
        given = arguments(original, 2, length, seed)
        inputs = dict(zip(original.names, given[1:], strict=True))
        seen = original.mask(length, inputs).expand(2, 1, length, length)
        real = seen[:, 0].diagonal(dim1=-2, dim2=-1)  # what a padded query gives, nothing says
        with torch.no_grad():
            torch.testing.assert_close(module(*given)[real], original(*given)[real], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["pad_id", "two_pad_ids", "float_padding", "lengths", "clamped", "float_window", "segments"]
)
def test_padding_of_any_kind_a_covered_window_and_documents_are_carried(name: str) -> None:
    follows(*converted(name, WIDE))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("prefix_lengths", "mask-data-dependent.*prefix.*'inputs_0'"),
        ("prefix_number", "mask-unsupported.*prefix"),
        ("switch", "mask-data-dependent.*'inputs_0'"),
        ("positions_that_may_fall", "mask-data-dependent.*'inputs_0'"),
    ],
)
def test_a_mask_that_is_not_carried_is_refused_with_its_cause(name: str, words: str) -> None:
    with pytest.raises(RefusedError, match=words) as error:
        converted(name, WIDE)
    assert len(str(error.value)) <= 600


@pytest.mark.parametrize("name", ["prefix_lengths", "switch", "segments", "float_window", "half_positions"])
def test_exact_softmax_follows_any_mask(name: str) -> None:
    follows(*converted(name, EXACT))
