"""What the local part makes of a score: value and derivative, for the forms that differentiate by hand.

The formulas and their sources stand in `naive.ACTIVATIONS`; the tests hold these against those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

_SQRT_HALF, _SQRT_2PI = math.sqrt(0.5), math.sqrt(2 * math.pi)
_YOSO_BITS, _YOSO_SHRINK = 8, 0.98


@dataclass(frozen=True)
class Activation:
    """Elementwise functions of the scores. overwrite: `value`, allowed to use its argument's memory."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    overwrite: Callable[[Tensor], Tensor]


def _laplace(s: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf((s - _SQRT_HALF) * _SQRT_2PI))


def _laplace_derivative(s: Tensor) -> Tensor:
    return math.sqrt(2) * torch.exp(-2 * math.pi * (s - _SQRT_HALF).square())


def _yoso(s: Tensor) -> Tensor:
    return (1 - torch.arccos(_YOSO_SHRINK * s) / math.pi) ** _YOSO_BITS


def _yoso_derivative(s: Tensor) -> Tensor:
    x = _YOSO_SHRINK * s
    outer = _YOSO_BITS * (1 - torch.arccos(x) / math.pi) ** (_YOSO_BITS - 1)
    return outer * (_YOSO_SHRINK / math.pi) * torch.rsqrt(1 - x.square())


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "relu2": Activation(
            lambda s: s.relu().square(), lambda s: 2 * s.relu(), lambda s: s.relu_().square_()
        ),
        "linear": Activation(lambda s: s, torch.ones_like, lambda s: s),
        "laplace": Activation(_laplace, _laplace_derivative, _laplace),
        "yoso": Activation(_yoso, _yoso_derivative, _yoso),
    }
)
