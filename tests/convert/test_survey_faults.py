"""Whole models that the survey found refused without need."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from zoo import ENTRIES

from linearize.convert.linearize import linearize

NAMES = (
    "openai-gpt",  # scores times the triangle, and -1e4 where it is zero: the factor is half of a mask
    "jetmoe",  # repeats keys and values itself before it dispatches
)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_converted_and_gives_what_the_original_gives(name: str) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    original = replace(entry, config={**entry.config, "num_hidden_layers": 1}).build(
        entry.implementations[-1]
    )
    ids = torch.randint(4, 60, (2, 17), generator=torch.Generator().manual_seed(0))
    # Exact softmax in a window that is wider than the text.
    model: Any = linearize(copy.deepcopy(original), mechanism="softmax_window", options={"window": 64})
    with torch.no_grad():
        wanted, found = original(input_ids=ids).logits, model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
