"""What a change of a layer costs, estimated from gradients, beside what it does cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linearize.errors import InputError
from linearize.training.influence import influence


class Mapped(nn.Module):
    """A map of each token, so that no products of tokens are left out; gives a pair, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16, dtype=torch.float64) / 4)

    def forward(self, hidden: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        return scale * hidden @ self.weight, hidden


class Model(nn.Module):
    """Two such layers and a head. The model writes into what it gave to a layer and into what it got."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16, dtype=torch.float64)
        self.layers = nn.ModuleList([Mapped(), Mapped()])
        self.head = nn.Linear(16, 50, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids) * 1.0
        for layer in self.layers:
            out, _ = layer(hidden, scale=2.0)
            hidden.mul_(0.5)
            out.add_(hidden)
            hidden = torch.tanh(out) * 1.0
        return self.head(hidden).flatten(0, 1)


def draw_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return -nn.functional.cross_entropy(logits, drawn, reduction="sum") / 2**0.5


def draw_direction(outputs: Tensor, generator: torch.Generator) -> Tensor:
    return (outputs * torch.randn(outputs.shape, generator=generator)).sum()


def kl(original: Tensor, found: Tensor) -> float:
    p, q = original.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def squared_distance(original: Tensor, found: Tensor) -> float:
    return float((found - original).square().sum())


@pytest.mark.parametrize("draw, cost", ((draw_tokens, kl), (draw_direction, squared_distance)))
@torch.no_grad()
def test_the_estimate_is_what_a_small_change_costs(
    draw: Callable[..., Tensor], cost: Callable[..., float]
) -> None:
    model, ids = Model(), torch.randint(50, (8, 128), generator=torch.Generator().manual_seed(1))
    original = model(ids)
    paths, sizes = ["layers.0", "layers.1"], (0.01, 0.03)
    start = [layer.weight.clone() for layer in model.layers]
    noise = torch.randn(16, 16, dtype=torch.float64)

    def put(size: float) -> Callable[[], None]:
        def change() -> None:
            for layer, weight in zip(model.layers, start, strict=True):
                layer.weight.copy_(weight + size * noise)

        return change

    output, found = influence(model, paths, [put(size) for size in sizes], lambda: model(ids), draw)
    torch.testing.assert_close(output, original)
    for number, path in enumerate(paths):
        for size, estimate in zip(sizes, found[path], strict=True):
            changed = copy.deepcopy(model)
            for layer, weight in zip(changed.layers, start, strict=True):
                layer.weight.copy_(weight)
            changed.layers[number].weight.add_(size * noise)
            assert estimate == pytest.approx(cost(original, changed(ids)), rel=0.35)


class Deaf(Model):
    """Its layers come to nothing."""

    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids).detach()


@torch.no_grad()
def test_an_output_without_gradients_is_refused() -> None:
    model = Deaf()
    with pytest.raises(InputError, match="no gradient by its layers.*budget="):
        influence(model, ["layers.0"], [], lambda: model(torch.zeros(1, 4, dtype=torch.long)), draw_tokens)
