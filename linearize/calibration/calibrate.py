"""Calibration: fitting the new parameters of a converted model to the softmax attention that it replaced.

The output of each head is an affine function of its local factor, its alpha and its convolution taps, so the
best fit to the outputs of the original attention is a small ridge regression. One pass over a few batches
collects the normal equations; every layer gets what it got in the original model, and no gradient is needed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

from ..common.running import quiet_run, without_cache
from ..errors import InputError, InvalidModelError
from ..mechanisms.composed import widen
from ..mechanisms.module import AttentionModule
from ..planning.plan import SitePlan
from ..planning.state import state_of
from .observers import Observation, watching, why_unseen

TOKENS = 50_000
"""The default number of tokens that are read; far fewer give the same fit."""
_ROWS = 512
"""The most queries of one sequence that are used, evenly spread: neighbours are much alike."""


@dataclass(frozen=True)
class SiteFit:
    """The fit of one attention site.

    Attributes:
        name: The path of the attention module.
        before: |linear - softmax| / |softmax| of the outputs on the batches, before the fit.
        after: The same, after the fit.
        left_out: Why the site was not fitted; empty if it was.
    """

    name: str
    before: float = math.nan
    after: float = math.nan
    left_out: str = ""


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did.

    Attributes:
        tokens: The number of tokens that were read.
        sites: The fit of every attention site.
    """

    tokens: int
    sites: tuple[SiteFit, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("site", "error before", "after")
        for site in self.sites:
            numbers = ("", site.left_out) if site.left_out else (f"{site.before:.3f}", f"{site.after:.3f}")
            table.add_row(site.name, *numbers)
        yield table
        yield f"{self.tokens} tokens; errors are relative to the output of the softmax attention"


def calibrate(
    model: nn.Module, batches: Iterable[Any], *, max_tokens: int = TOKENS, ridge: float = 1e-4
) -> Calibration:
    """Fit the new parameters of a freshly converted model to its original attention, in place.

    Do this before any tuning, because the fit is to softmax attention with the model's present weights. If
    this raises, the model is as it was before.

    Args:
        model: A converted model.
        batches: Dicts of the model's keyword arguments, or token ids int64 `[B, T]`.
        max_tokens: Batches are read until this number of tokens is reached.
        ridge: How strongly parameters are pulled towards their present values, relative to the evidence for
            each.

    Returns:
        The error of every attention site before and after the fit.

    Raises:
        InvalidModelError: The model is not converted, or has nothing to fit.
        InputError: A batch does not run, or the batches never reach some attention or give values that are
            not finite.
    """
    sites = state_of(model).plan.sites
    fits = {site.name: _Fit(model.get_submodule(site.name), site, ridge) for site in sites}
    able = {name: fit for name, fit in fits.items() if not fit.left_out}
    if not able:
        reasons = {fit.left_out for fit in fits.values()}
        raise InvalidModelError(f"nothing can be calibrated: {'; '.join(sorted(reasons))}")
    tokens = 0
    watchers = {site: able[site.name] for site in sites if site.name in able}
    with watching(model, watchers), quiet_run(model):
        for batch in batches:
            given = model_inputs(batch)
            forward(model, given)
            tokens += tokens_in(given)
            if tokens >= max_tokens:
                break
    solved = {name: fit.solve() for name, fit in able.items()}
    for name, (solution, _) in solved.items():
        able[name].assign(solution)
    reports = {name: SiteFit(name, left_out=fit.left_out) for name, fit in fits.items()}
    reports |= {name: report for name, (_, report) in solved.items()}
    return Calibration(tokens, tuple(reports.values()))


class _Fit:
    """The normal equations of one site: for each head, the products of the columns and of the target."""

    def __init__(self, module: Any, site: SitePlan, ridge: float) -> None:
        self.module, self.name, self.ridge = module, site.name, ridge
        self.left_out = _why_not(module, site)
        self._names = [n for n in module.linear_parameters if getattr(module, n, None) is not None]
        self._probe: Any = copy.deepcopy(module).float().eval()
        for name in self._names:
            getattr(self._probe, name).data.zero_()
        self._gram: Tensor | None = None

    def see(self, call: Observation) -> None:
        """Add one call."""
        rows = _spread(call.real_queries())
        tensors = (widen(call.query), widen(call.key), widen(call.value))
        masked = dict(key_mask=call.key_mask, query_start=call.query_start)
        wanted = _rows(widen(call.target), rows)
        # The output without any weight. Each column below is what a single weight of 1 adds to it.
        offset = _rows(self._probe(*tensors, **masked), rows)
        columns = []
        for name in self._names:
            parameter = _columns(getattr(self._probe, name).data)
            for column in parameter.unbind(1):
                column.fill_(1)
                if name == "conv_weight":  # by itself: the rest need not run for every tap
                    out = self._probe.convolution(*tensors, call.key_mask, call.query_start)
                    columns.append(_rows(out, rows))
                else:
                    out = self._probe(*tensors, **masked)
                    columns.append(_rows(out, rows) - offset)
                column.zero_()
        # The target is one more column: the regression needs nothing of it but its products.
        joined = torch.stack([*columns, wanted - offset], -1).double()  # [H, N, P + 1]
        gram = joined.mT @ joined
        size = wanted.double().square().sum(1)
        if self._gram is None:
            self._gram, self._size = torch.zeros_like(gram), torch.zeros_like(size)
        self._gram += gram
        self._size += size

    @torch.no_grad()
    def solve(self) -> tuple[Tensor, SiteFit]:
        """Solve for the parameters `[H, P]`. Raises InputError when the batches hold too little for that."""
        gram = self._gram
        if gram is None:
            raise InputError(f"{self.name}: the batches never called this attention; give complete inputs")
        if not bool(torch.isfinite(gram).all()):
            raise InputError(f"{self.name}: the batches gave values that are not finite")
        products, right = gram[:, :-1, :-1], gram[:, :-1, -1]
        before = torch.cat([_columns(getattr(self.module, name)) for name in self._names], 1).to(gram)
        # A parameter without any evidence keeps its value.
        own = products.diagonal(dim1=1, dim2=2)
        damped = products + torch.diag_embed(torch.where(own > 0, own * self.ridge, torch.ones_like(own)))
        step = torch.linalg.solve(damped, right - (products @ before[..., None])[..., 0])
        after = before + step

        def error(solution: Tensor) -> float:
            left = (solution[:, None] @ products @ solution[..., None])[:, 0, 0]
            rest = left - 2 * (solution * right).sum(1) + gram[:, -1, -1]
            return math.sqrt(max(float(rest.sum()), 0.0) / max(float(self._size.sum()), 1e-300))

        return after, SiteFit(self.name, error(before), error(after))

    def assign(self, solution: Tensor) -> None:
        """Copy parameters `[H, P]` into the module."""
        parameters = [getattr(self.module, name) for name in self._names]
        widths = [_columns(p).shape[1] for p in parameters]
        with torch.no_grad():
            for parameter, part in zip(parameters, solution.split(widths, 1), strict=True):
                parameter.copy_(part.reshape(parameter.shape))


def _why_not(module: AttentionModule, site: SitePlan) -> str:
    """Why a site cannot be fitted; empty if it can."""
    if not any(getattr(module, name, None) is not None for name in module.linear_parameters):
        return "the output of the mechanism is linear in none of its parameters (augmentation=True adds such)"
    return why_unseen(module, site)


def _columns(parameter: Tensor) -> Tensor:
    """`[H]` or `[H, n]` -> `[H, n]`, a view."""
    return parameter[:, None] if parameter.dim() == 1 else parameter


def _spread(real: Tensor) -> Tensor:
    """Indices of the queries to use, of `[B * T]`: at most `_ROWS` per sequence, from the `real` `[B, T]`."""
    step = -(-real.shape[1] // _ROWS)
    chosen = torch.zeros_like(real)
    chosen[:, ::step] = real[:, ::step]
    return chosen.flatten().nonzero()[:, 0]


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """`[B, H, T, Dv]` -> `[H, N * Dv]`, the chosen rows."""
    return x.transpose(0, 1).flatten(1, 2).index_select(1, rows).flatten(1)


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The model's output on one batch, without a cache. Raises InputError if the model does not run on it."""
    try:
        return model(**without_cache(model, inputs))
    except Exception as error:
        raise InputError(f"the model does not run on a batch: {type(error).__name__}: {error}") from error


def model_inputs(batch: Any) -> dict[str, Any]:
    """A batch as keyword arguments. Raises InputError for anything else, and for an empty batch."""
    inputs = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    tensors = [x for x in inputs.values() if isinstance(x, Tensor)]
    if not tensors or any(x.numel() == 0 for x in tensors):
        raise InputError(
            "a batch must be token ids [B, T] or a dict of the model's keyword arguments, and not empty"
        )
    return inputs


def tokens_in(inputs: Mapping[str, Any]) -> int:
    """The number of tokens in the first tensor among a model's inputs."""
    first = next(x for x in inputs.values() if isinstance(x, Tensor))
    return first.shape[0] * (first.shape[1] if first.dim() > 1 else 1)
