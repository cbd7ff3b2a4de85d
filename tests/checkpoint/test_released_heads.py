"""The paper's Medusa heads, in the format of the Medusa project, against that project's formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_models import VOCAB, converted, tokens
from torch import Tensor

import linearize as lz
from linearize.errors import CheckpointError

SIZE, HEADS = 32, 3


def released() -> dict[str, Tensor]:
    """What `medusa_head.state_dict()` holds after training."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for k in range(HEADS):
        tensors[f"{k}.0.linear.weight"] = torch.randn(SIZE, SIZE, generator=generator) * 0.3
        tensors[f"{k}.0.linear.bias"] = torch.randn(SIZE, generator=generator)
        tensors[f"{k}.1.weight"] = torch.randn(VOCAB, SIZE, generator=generator)
    return tensors


@pytest.fixture(scope="module")
def model() -> Any:
    return converted("llama")


def test_heads_compute_what_medusa_says(model: Any, tmp_path: Path) -> None:
    torch.save(released(), tmp_path / "medusa_lm_head.pt")
    hidden = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(2))
    wanted = torch.stack(
        [
            (hidden + F.silu(F.linear(hidden, w[f"{k}.0.linear.weight"], w[f"{k}.0.linear.bias"])))
            @ w[f"{k}.1.weight"].T
            for w in (released(),)
            for k in range(HEADS)
        ]
    )
    for source in (tmp_path, tmp_path / "medusa_lm_head.pt", released()):
        heads = lz.load_released_heads(source, model)
        with torch.no_grad():
            torch.testing.assert_close(heads(hidden, tokens(1, 5)[0]), wanted, atol=1e-4, rtol=1e-5)


def test_they_draft_and_are_saved_like_any_other(model: Any, tmp_path: Path) -> None:
    heads = lz.load_released_heads(released(), model)
    heads.save(tmp_path)
    again = lz.MedusaHeads.load(tmp_path, model)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in heads.state_dict().items())
    ids, settings = tokens(1, 9), dict(max_new_tokens=15, do_sample=False, eos_token_id=None)
    tree = lz.Tree(((0,), (1,), (0, 0), (0, 1), (0, 0, 0)))
    out = model.generate(ids, speculative=lz.TreeSpeculation(lz.Medusa(again, tree)), **settings)
    assert torch.equal(out, model.generate(ids, **settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"1.0.linear.bias": None}, "1.0.linear.bias is missing, though there are 3 heads"),
        ({"0.1.weight": torch.zeros(50, SIZE)}, r"0.1.weight is \(50, 32\), and this model needs \(96, 32\)"),
        ({"0.1.linear.weight": torch.zeros(SIZE, SIZE)}, "0.1.linear.weight is no part of a Medusa head"),
        ({"lm_head.weight": torch.zeros(VOCAB, SIZE)}, "lm_head.weight is no part of a Medusa head"),
    ],
)
def test_what_does_not_fit_is_named(model: Any, changes: dict[str, Tensor | None], message: str) -> None:
    tensors = {name: value for name, value in {**released(), **changes}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        lz.load_released_heads(tensors, model)


def test_places_without_heads(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="medusa_lm_head.pt: no such file"):
        lz.load_released_heads(tmp_path, model)
    with pytest.raises(CheckpointError, match="no heads"):
        lz.load_released_heads({}, model)
