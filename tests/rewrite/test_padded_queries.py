"""A module of someone's own gives every token what the original gives, those that no one sees included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import linearize as lz

WIDE = {"mechanism": "softmax_window", "options": {"window": 1024}}


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv, self.causal = nn.Linear(16, 48), causal

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        hidden = (ids == 2)[:, None, None, :]
        if self.causal:
            hidden = hidden | ~torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        scores = (query @ key.mT * 0.5).masked_fill(hidden, torch.finfo(x.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("causal", [False, True])
def test_padded_queries_too(causal: bool) -> None:
    torch.manual_seed(0)
    original = Attention(causal)
    model = copy.deepcopy(original)
    x, ids = torch.randn(3, 20, 16), torch.randint(3, 9, (3, 20))
    lz.linearize(model, (x, ids), **WIDE)
    ids[0, 14:], ids[1, 3:6] = 2, 2
    wanted, found = original(x, ids), model(x, ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    grads = [
        torch.autograd.grad(out.square().sum(), of.qkv.weight)[0]
        for out, of in ((wanted, original), (found, model))
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["compiled", "exported", "backend"])
def test_in_a_graph_they_get_zeros_and_all_others_what_the_original_gives(how: str) -> None:
    torch.manual_seed(0)
    original = Attention(True).eval()
    x, ids = torch.randn(3, 20, 16), torch.randint(3, 9, (3, 20))
    model = lz.linearize(copy.deepcopy(original), (x, ids), **WIDE)
    model(x, ids)
    torch._dynamo.reset()
    run = {
        "compiled": lambda: torch.compile(model, backend="eager"),
        "exported": lambda: torch.export.export(model, (x, ids)).module(),
        "backend": lambda: torch.compile(original, backend="linearize", options={**WIDE, "inner": "eager"}),
    }[how]()
    ids[0, 14:], ids[1, 3:6], ids[2] = 2, 2, 2  # no token of the last row is real
    with torch.no_grad():
        wanted, found = original(x, ids), run(x, ids)
    real = ids != 2
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-5)
    assert bool((found[~real] == 0).all())
