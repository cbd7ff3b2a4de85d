"""Rows that hold several documents: each gets what it gets alone, forward and backward, or nothing runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from live_models import llama, tokens
from torch import Tensor

from linearize import mechanisms
from linearize.convert.linearize import linearize
from linearize.mechanisms.spec import SiteSpec
from linearize.planning.build import build_attention
from linearize.planning.config import LinearizeConfig
from linearize.rewrite.documents import attend_documents

LENGTHS = (5, 1, 9, 2)
EXACT: dict[str, Any] = dict(mechanism="softmax_window", options={"window": 1024})


def positions(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.fixture(scope="module")
def original() -> Any:
    return llama()


@pytest.fixture(scope="module")
def model(original: Any) -> Any:
    return linearize(copy.deepcopy(original), **EXACT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mechanism", sorted(mechanisms.available()))
def test_every_mechanism_gives_each_document_what_it_gets_alone(mechanism: str, causal: bool) -> None:
    spec = SiteSpec(4, 2, 8, 8, causal)
    if mechanisms.get(mechanism).refusal(spec) is not None:
        pytest.skip("not for such a site")
    options = {"window": 4} if "window" in mechanisms.get(mechanism).options else {}
    torch.manual_seed(0)
    child: Any = build_attention(
        spec, LinearizeConfig(mechanism=mechanism, group_size=4, options=options)
    ).double()
    query, key, value = (torch.randn(2, h, 17, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    numbers = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(LENGTHS))
    interleaved = torch.tensor([1, 2, 1, 2, 2, 3, 3, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2])
    documents = torch.stack([numbers, interleaved])
    out = attend_documents(lambda q, k, v, real: child(q, k, v, key_mask=real), query, key, value, documents)
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))

    assert not out[1, :, documents[1] == 0].any()
    for row in (0, 1):
        for number in range(1, int(documents[row].max()) + 1):
            (at,) = (documents[row] == number).nonzero(as_tuple=True)
            alone = [x[row : row + 1, :, at].detach().requires_grad_() for x in (query, key, value)]
            expected = child(*alone)
            torch.testing.assert_close(out[row : row + 1, :, at], expected)
            for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), alone), strict=True):
                torch.testing.assert_close(grad[row : row + 1, :, at], wanted)


def test_packed_rows_give_each_document_what_it_gets_alone(model: Any, original: Any) -> None:
    ids = tokens(2, sum(LENGTHS))
    other = torch.cat([torch.arange(4), torch.arange(13)])[None]
    packed = model(ids, position_ids=torch.cat([positions(), other]), use_cache=False).logits
    for row, lengths in enumerate([LENGTHS, (4, 13)]):
        parts = ids[row : row + 1].split(lengths, 1)
        alone = torch.cat([original(part, use_cache=False).logits for part in parts], 1)
        torch.testing.assert_close(packed[row : row + 1], alone, atol=1e-5, rtol=1e-4)
