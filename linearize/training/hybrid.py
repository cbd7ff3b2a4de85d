"""Which attention layers to leave softmax: what each costs when it is linear, and the best few to keep.

Every figure is of a model that a user can have: layers are rewritten and calibrated exactly as `linearize`
and `calibrate` would, which fits each layer to what it saw in the original, whatever becomes of the others.
So the layers are converted once, and then switched between softmax and their linear form.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

from ..calibration.calibrate import TOKENS as CALIBRATION_TOKENS
from ..calibration.calibrate import calibrate, model_inputs, tokens_in
from ..common.running import floats, quiet_run, without_cache
from ..convert.linearize import check_model, linearize, resolve_config
from ..errors import ConfigError, InputError, InvalidModelError
from ..evaluation.quality import total_kl
from ..planning.config import LinearizeConfig
from ..planning.plan import Plan
from ..planning.state import state_of
from ..rewrite.apply import apply_owners
from ..rewrite.snapshot import Picture, Transaction

MEASURED_TOKENS = 8192
"""Tokens that divergences are measured on, unless asked for more."""
SEARCHES = ("greedy", "ranking")
IGNORED = -100
"""The label that stands for no token, as in transformers."""


@dataclass(frozen=True)
class LayerSensitivity:
    """One attention layer. keep: how `keep_softmax` names it; alone: divergence when only it is linear."""

    path: str
    keep: int | str
    alone: float


@dataclass(frozen=True)
class Choice:
    """Layers left softmax, by path, and the divergence of the model when all others are linear."""

    kept: tuple[str, ...]
    divergence: float


@dataclass(frozen=True)
class Sensitivity:
    """What `plan` found.

    measure: "kl", mean `KL(original || converted)` in nats per position, where the model has logits;
    "distance", `|converted - original| / |original|` of its first output, where it has none.
    tokens: positions measured. calibrated: whether the linear layers were fitted first.
    layers: every layer that can be rewritten, in execution order. choices: the best found for each number of
    kept layers, from none on; the last one is the answer. config: what to give to `linearize`.
    """

    measure: str
    tokens: int
    calibrated: bool
    layers: tuple[LayerSensitivity, ...]
    choices: tuple[Choice, ...]
    config: LinearizeConfig

    @property
    def kept(self) -> tuple[str, ...]:
        """Paths of the layers to leave softmax, in execution order."""
        return self.choices[-1].kept

    @property
    def divergence(self) -> float:
        """That of the model which `config` describes, on the batches."""
        return self.choices[-1].divergence

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "measure": self.measure,
            "tokens": self.tokens,
            "calibrated": self.calibrated,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "choices": [dataclasses.asdict(choice) for choice in self.choices],
            "kept": list(self.kept),
            "divergence": self.divergence,
            "config": self.config.to_dict(),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unit = "KL" if self.measure == "kl" else "distance"
        table = Table("layer", f"{unit} if only it is linear", "becomes")
        for layer in self.layers:
            kept = layer.path in self.kept
            table.add_row(layer.path, f"{layer.alone:.4g}", "softmax" if kept else self.config.mechanism)
        yield table
        steps = Table("kept softmax", unit, "layers")
        for choice in self.choices:
            steps.add_row(str(len(choice.kept)), f"{choice.divergence:.4g}", ", ".join(choice.kept) or "none")
        yield steps
        fitted = "calibrated" if self.calibrated else "not calibrated: nothing in them can be"
        yield f"{self.tokens} positions; linear layers are {fitted}"


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: int | float | None = None,
    max_divergence: float | None = None,
    inputs: Any = None,
    config: LinearizeConfig | Mapping[str, Any] | None = None,
    search: str = "greedy",
    max_tokens: int = MEASURED_TOKENS,
    **overrides: Any,
) -> Sensitivity:
    """Find the layers of an unconverted `model` that are best left softmax; the model stays as it was.

    Starts with every layer linear and gives softmax back to one layer at a time: to that whose return helps
    most, for what layers cost together is not the sum of what they cost alone. That tries all that are left
    at each step; `search="ranking"` goes by what each costs alone, which takes about as many passes over the
    batches as there are layers, and finds nearly as good a choice.

    batches: dicts of keyword arguments of the model, or token ids int64 [B, T]. The linear layers are fitted
    to them (`calibrate`), and divergence from the original is measured on the first `max_tokens` tokens.
    budget: how many layers may stay softmax besides those that `config` leaves, as an int, or as a share of
    those it rewrites, a float below 1. max_divergence: instead of a budget, keep as few as bring the
    divergence down to it (`Sensitivity.measure` says of what). inputs, config, overrides: as in `linearize`.

    Raises what `linearize` raises, ConfigError for a budget that leaves nothing to rewrite or a divergence
    that cannot be reached, and InputError for batches that do not run, are empty or give NaN.
    """
    settings = resolve_config(config, overrides)
    check_model(model)
    _check_limits(budget, max_divergence, max_tokens)
    if search not in SEARCHES:
        raise ConfigError(f"search must be {' or '.join(map(repr, SEARCHES))}, got {search!r}")
    given = _gather(batches)
    with _switchable(model, inputs, settings, given) as (layers, calibrated):
        count = len(layers.paths)
        most = _most(budget, count)
        meter = _Meter(model, layers, _first(given, max_tokens))
        everything = frozenset(layers.paths)
        *alone, whole = meter.divergences([*(everything - {path} for path in layers.paths), frozenset()])
        found = [(frozenset[str](), whole)]
        costs = dict(zip(layers.paths, alone, strict=True))
        while len(found) <= most and (max_divergence is None or found[-1][1] > max_divergence):
            rest = [path for path in layers.paths if path not in found[-1][0]]
            # The one that costs most alone, unless all are tried.
            candidates = rest if search == "greedy" else [max(rest, key=costs.__getitem__)]
            found.append(_give_back(meter, found[-1][0], candidates))
        if max_divergence is not None and found[-1][1] > max_divergence:
            raise ConfigError(
                f"max_divergence={max_divergence} cannot be reached: with {most} of {count} layers softmax "
                f"it is {found[-1][1]:.4g}"
            )
        choices = tuple(Choice(tuple(p for p in layers.paths if p in kept), d) for kept, d in found)
        names = layers.names()
        rows = tuple(LayerSensitivity(path, names[path], cost) for path, cost in costs.items())
        keep = (*settings.keep_softmax, *(names[path] for path in choices[-1].kept))
        return Sensitivity(
            meter.measure,
            meter.positions,
            calibrated,
            rows,
            choices,
            dataclasses.replace(settings, keep_softmax=keep),
        )


def _check_limits(budget: Any, max_divergence: Any, max_tokens: Any) -> None:
    """Raise ConfigError unless exactly one limit is there and makes sense."""
    if (budget is None) == (max_divergence is None):
        raise ConfigError("give budget= or max_divergence=, one of the two")
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    share = isinstance(budget, float)
    if budget is not None and not (number and (0 <= budget < 1 if share else budget >= 0)):
        raise ConfigError(f"budget must be an int >= 0 or a float in [0, 1), got {budget!r}")
    if max_divergence is not None and not max_divergence > 0:
        raise ConfigError(f"max_divergence must be above 0, got {max_divergence!r}")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens!r}")


def _most(budget: int | float | None, count: int) -> int:
    """Layers that may be kept; one at least must be left to rewrite."""
    if budget is None:
        return count - 1
    most = math.floor(budget * count) if isinstance(budget, float) else budget
    if most >= count:
        raise ConfigError(f"budget={budget!r} leaves none of {count} layers to rewrite; give less")
    return most


def _gather(batches: Iterable[Any]) -> list[dict[str, Any]]:
    """As many batches as calibration reads. Raises InputError when there are none."""
    found: list[dict[str, Any]] = []
    tokens = 0
    for batch in batches:
        found.append(model_inputs(batch))
        tokens += tokens_in(found[-1])
        if tokens >= CALIBRATION_TOKENS:
            break
    if not found:
        raise InputError("there is no batch to measure on")
    return found


def _first(batches: Sequence[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """The first batches, until there are `tokens`."""
    found: list[dict[str, Any]] = []
    for batch in batches:
        if tokens <= 0:
            break
        found.append(batch)
        tokens -= tokens_in(batch)
    return found


def _give_back(
    meter: _Meter, kept: frozenset[str], candidates: Sequence[str]
) -> tuple[frozenset[str], float]:
    """The best set of layers with one more of the candidates in it, and its divergence."""
    sets = [kept | {path} for path in candidates]
    return min(zip(sets, meter.divergences(sets), strict=True), key=lambda pair: pair[1])


class _Layers:
    """The attention owners of a model, each switched between softmax and its linear form."""

    def __init__(self, plan: Plan, softmax: Mapping[str, Picture], linear: Mapping[str, Picture]) -> None:
        self.plan, self._softmax, self._linear = plan, softmax, linear
        self.paths = tuple(plan.owners)
        self._kept: frozenset[str] = frozenset()

    def keep(self, kept: frozenset[str]) -> None:
        """Softmax in these layers, linear in all others."""
        for path in kept ^ self._kept:
            (self._softmax if path in kept else self._linear)[path].restore()
        self._kept = kept

    def names(self) -> dict[str, int | str]:
        """How `keep_softmax` says each path: by its layer's index where no other layer has that."""
        index = {path: sites[0].layer_index for path, sites in self.plan.owners.items()}
        same = list(index.values())
        return {p: p if i is None or same.count(i) > 1 else i for p, i in index.items()}


@contextlib.contextmanager
def _switchable(
    model: nn.Module, inputs: Any, config: LinearizeConfig, batches: Sequence[dict[str, Any]]
) -> Iterator[tuple[_Layers, bool]]:
    """The model in evaluation mode with every layer linear, and whether those are calibrated.

    Afterwards it is as it was.
    """
    before = Transaction(model)
    try:
        linearize(model, inputs, config)
        plan = state_of(model).plan
        try:
            calibrate(model, batches)
            calibrated = True
        except InvalidModelError:  # the mechanism has nothing to fit
            calibrated = False
        children = {site: model.get_submodule(site.name).eval() for site in plan.sites}
        before.rollback()
        with quiet_run(model):
            softmax = {path: Picture(model.get_submodule(path)) for path in plan.owners}
            # One-row masks are for models without any softmax.
            apply_owners(model, dataclasses.replace(plan, compact_masks=False), config)
            for site, child in children.items():
                model.get_submodule(site.path).add_module(site.child, child)
            linear = {path: Picture(model.get_submodule(path)) for path in plan.owners}
            yield _Layers(plan, softmax, linear), calibrated
    finally:
        before.rollback()


class _Meter:
    """Divergence of a model from its original on batches, with any of its layers softmax."""

    def __init__(self, model: nn.Module, layers: _Layers, batches: Sequence[dict[str, Any]]) -> None:
        self._model, self._layers, self._batches = model, layers, batches
        self.measure, self.positions = "", 0

    def divergences(self, sets: Sequence[frozenset[str]]) -> list[float]:
        """One for each set of layers that are softmax."""
        self.positions = 0
        totals, size = [0.0] * len(sets), 0.0
        for batch in self._batches:
            original = self._output(batch, frozenset(self._layers.paths))
            self.positions += len(original)
            size += float(original.double().square().sum())
            for index, kept in enumerate(sets):
                totals[index] += self._between(original, self._output(batch, kept))
        if self.positions == 0:
            raise InputError("the batches hold nothing but padding")
        if not all(map(math.isfinite, totals)):
            raise InputError("the divergence on these batches is not finite")
        if self.measure == "kl":
            return [total / self.positions for total in totals]
        return [math.sqrt(total / size) if size else 0.0 for total in totals]

    def _between(self, original: Tensor, found: Tensor) -> float:
        if self.measure == "kl":
            return total_kl(original, found)
        return float((found.double() - original.double()).square().sum())

    def _output(self, batch: dict[str, Any], kept: frozenset[str]) -> Tensor:
        """Logits, or else the first output, at the real positions: [N, size]."""
        self._layers.keep(kept)
        try:
            result = self._model(**without_cache(self._model, batch))
        except Exception as error:
            raise InputError(f"the model does not run on a batch: {type(error).__name__}: {error}") from error
        logits = getattr(result, "logits", None)
        self.measure = "distance" if logits is None else "kl"
        outputs = [x for x in floats(result) if x.dim() > 1] if logits is None else [logits]
        if not outputs:
            raise InputError(
                f"{type(self._model).__name__} gives neither logits nor hidden states to compare"
            )
        first = outputs[0]
        first = first if first.dim() == 2 else first[self._real(first, batch)].flatten(1)
        if bool(first.isnan().any()):
            raise InputError("the model gives NaN on these batches: its weights or inputs are broken")
        return first

    def _real(self, output: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """bool, the first two axes of `output`: False at padding, as far as the inputs tell."""
        if getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
            if mask is None and labels is not None:
                mask = labels != IGNORED
        else:
            mask = batch.get("attention_mask")
        if mask is None or mask.shape != output.shape[:2]:
            return torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)
        return mask.bool()
