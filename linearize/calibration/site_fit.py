"""The fit of one attention site, while the sites before it give what their fits have found so far."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common.precise import wide
from ..errors import InputError
from ..kernels.tensors import full_precision, widen
from ..mechanisms.composed import of_queries
from ..mechanisms.module import AttentionModule
from ..mechanisms.term import Given
from ..planning.plan import SitePlan
from .observers import Observation, why_unseen
from .regression import STRENGTHS, Regression

_ROWS = 512
"""The most queries of one sequence that are used, evenly spread: neighbours are much alike."""


class Fit:
    """Watches one site: compares its module with softmax, fits it, and passes on what the fit gives."""

    def __init__(self, module: Any, site: SitePlan, ridge: float | None, sequential: bool = True) -> None:
        self.module, self.name, self.sequential = module, site.name, sequential
        self.left_out = _why_not(module, site)
        self._names = fitted_parameters(module)
        self._start = {name: getattr(module, name).detach().clone() for name in self._names}
        strengths = STRENGTHS if ridge is None else (ridge,)
        self._regression = Regression(strengths)
        self._size = 0.0
        self._called = False

    def see(self, call: Observation) -> Tensor | None:
        """Add one call; if sequential, the output of the site with what has been fitted so far."""
        self._called = True
        given = Given(call.query, call.key, call.value, call.key_mask, call.query_start)
        with full_precision(call.value.device):
            base = self.module.base(given)
            rows = _spread(call.real_queries())
            if len(rows):
                self._add(base, given, call.target, rows)
            if not self.sequential:
                return None
            self._assign(self._regression.weights())
            return self.module.complete(base, given).to(call.value.dtype)

    def _add(self, base: Tensor, given: Given, target: Tensor, rows: Tensor) -> None:
        columns = self.module.columns(base, given, rows)
        wanted = of_queries(widen(target), rows)
        left = wanted - of_queries(base, rows)
        joined = torch.cat([columns[name] for name in self._names], -1)
        # What the values at the start explain is not asked of the regression.
        start = self._columns_of(self._start).to(joined)
        if joined.dim() == 3:  # weights [H, Dv, F] on features of a token
            left = left - joined @ start
        else:  # a weight of its own for each column [Dv]
            left = (left - (joined @ start[:, None])[..., 0]).flatten(1)[..., None]
            joined = joined.flatten(1, 2)
        self._regression.add(joined, left)
        if not self._regression.finite:
            raise InputError(f"{self.name}: the batches gave values that are not finite")
        self._size += float(wide(wanted).square().sum())

    def finish(self) -> tuple[float, float]:
        """Put in the weights from all that came; the relative error before and after.

        Raises InputError when the site was never called.
        """
        self._regression.weights(last=True)
        if not self._called:
            raise InputError(f"{self.name}: the batches never called this attention; give complete inputs")
        self.put()
        size = max(self._size, 1e-300)
        before, after = self._regression.errors()
        return math.sqrt(before / size), math.sqrt(after / size)

    @property
    def evidence(self) -> bool:
        """Whether what is fitted took part in any output."""
        return self._regression.evidence

    @property
    def gain(self) -> float:
        """What the fit took off the squared error, relative to the output of softmax."""
        before, after = self._regression.errors()
        return (before - after) / max(self._size, 1e-300)

    def put(self) -> None:
        """The fitted parameters."""
        self._assign(self._regression.weights())

    def restore(self) -> None:
        """The parameters as they were."""
        self._assign(None)

    def _columns_of(self, values: dict[str, Tensor]) -> Tensor:
        """Parameters as weights [H, P, C]."""
        if any(value.dim() == 3 for value in values.values()):
            (value,) = values.values()
            return value.mT
        return torch.cat([_table(value) for value in values.values()], 1)[..., None]

    @torch.no_grad()
    def _assign(self, weights: Tensor | None) -> None:
        """The start and, on top of it, weights [H, P, C]."""
        if weights is not None:
            weights = weights + self._columns_of(self._start).to(weights)
        for name, start in self._start.items():
            if weights is None:
                value = start
            elif start.dim() == 3:
                value = weights.mT
            else:
                width = _table(start).shape[1]
                part, weights = weights[:, :width], weights[:, width:]
                value = part.reshape(start.shape)
            getattr(self.module, name).copy_(value)


def fitted_parameters(module: AttentionModule) -> list[str]:
    """Names of the parameters that a fit changes."""
    return [name for name in module.linear_parameters if getattr(module, name, None) is not None]


def _why_not(module: AttentionModule, site: SitePlan) -> str:
    """Why a site cannot be fitted; empty if it can."""
    if not fitted_parameters(module):
        return "the output of the mechanism is linear in none of its parameters (augmentation=True adds such)"
    return why_unseen(module, site)


def _table(parameter: Tensor) -> Tensor:
    """`[H]` or `[H, n]` -> `[H, n]`."""
    return parameter[:, None] if parameter.dim() == 1 else parameter


def _spread(real: Tensor) -> Tensor:
    """Indices of the queries to use, of `[B * T]`: at most `_ROWS` per sequence, from the `real` `[B, T]`."""
    step = -(-real.shape[1] // _ROWS)
    chosen = torch.zeros_like(real)
    chosen[:, ::step] = real[:, ::step]
    return chosen.flatten().nonzero()[:, 0]
