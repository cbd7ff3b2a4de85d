"""Which attention layers to leave softmax: the cost of each when it is linear, and the best few to keep.

Every figure is about a model that a user can have: layers are rewritten and calibrated exactly as `linearize`
and `calibrate` do it, and calibration fits each layer to what it gets in the original, whatever the other
layers become. So the layers are converted once, and then switched between softmax and their linear form.
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
from ..calibration.calibrate import calibrate, forward, model_inputs, tokens_in
from ..common.running import floats, quiet_run
from ..common.text import IGNORED
from ..convert.linearize import check_model, linearize, resolve_config
from ..errors import ConfigError, InputError, InvalidModelError
from ..evaluation.quality import total_kl
from ..planning.config import LinearizeConfig
from ..planning.plan import Plan
from ..planning.state import state_of
from ..rewrite.apply import apply_owners
from ..rewrite.snapshot import Snapshot
from .data import is_encoder_decoder

MEASURED_TOKENS = 8192
"""The default number of tokens that divergences are measured on."""
SEARCHES = ("greedy", "ranking")


@dataclass(frozen=True)
class LayerSensitivity:
    """One attention layer.

    Attributes:
        path: The path of its module.
        keep: How `keep_softmax` names it.
        alone: The divergence of the model when only this layer is linear.
    """

    path: str
    keep: int | str
    alone: float


@dataclass(frozen=True)
class Choice:
    """A set of layers to leave softmax.

    Attributes:
        kept: Paths of these layers.
        divergence: The divergence of the model when all other layers are linear.
    """

    kept: tuple[str, ...]
    divergence: float


@dataclass(frozen=True)
class Sensitivity:
    """What `plan` found.

    Attributes:
        measure: "kl" for models with logits: mean `KL(original || converted)` in nats per position.
            "distance" for others: `|converted - original| / |original|` of the first output.
        tokens: The number of positions that were measured.
        calibrated: Whether the linear layers were calibrated first.
        layers: Every layer that can be rewritten, in the order of execution.
        choices: The best choice found for each number of softmax layers, from none on. The last is the
            answer.
        config: The settings to give to `lz.linearize`.
    """

    measure: str
    tokens: int
    calibrated: bool
    layers: tuple[LayerSensitivity, ...]
    choices: tuple[Choice, ...]
    config: LinearizeConfig

    @property
    def kept(self) -> tuple[str, ...]:
        """Paths of the layers to leave softmax, in the order of execution."""
        return self.choices[-1].kept

    @property
    def divergence(self) -> float:
        """The divergence, on the batches, of the model that `config` describes."""
        return self.choices[-1].divergence

    def to_dict(self) -> dict[str, Any]:
        """A dict that can be written as JSON."""
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
        heading = "KL" if self.measure == "kl" else "distance"
        table = Table("layer", f"{heading} if only it is linear", "becomes")
        for layer in self.layers:
            kept = layer.path in self.kept
            table.add_row(layer.path, f"{layer.alone:.4g}", "softmax" if kept else self.config.mechanism)
        yield table
        steps = Table("kept softmax", heading, "layers")
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
    """Find the layers of an unconverted model that are best left softmax. The model stays as it is.

    The search starts with every layer linear and makes one layer at a time softmax again: the one that lowers
    the divergence most. (What layers cost together is not the sum of what each costs alone.)

    Args:
        model: An unconverted model.
        batches: Dicts of the model's keyword arguments, or token ids int64 `[B, T]`. The linear layers are
            calibrated on them.
        budget: How many layers may stay softmax, besides those that `config` keeps: an int, or a float below
            1 for a share of the layers that `config` rewrites.
        max_divergence: Instead of a budget: use as few softmax layers as bring the divergence from the
            original down to this. See `Sensitivity.measure` for its unit.
        inputs: Example inputs, as in `lz.linearize`.
        config: The settings of the conversion, as in `lz.linearize`.
        search: "greedy" tries all remaining layers at each step. "ranking" takes them in the order of what
            each costs alone; this needs about as many passes over the batches as there are layers, and its
            choice is nearly as good.
        max_tokens: The divergence is measured on the first batches, up to this number of tokens.
        **overrides: Fields of `LinearizeConfig`, as in `lz.linearize`.

    Returns:
        The cost of each layer, the best choices, and the settings to give to `lz.linearize`.

    Raises:
        LinearizeError: Whatever `lz.linearize` raises.
        ConfigError: The budget leaves nothing to rewrite, or the divergence cannot be reached.
        InputError: The batches are empty, do not run, or give NaN.
    """
    settings = resolve_config(config, overrides)
    check_model(model)
    _check_limits(budget, max_divergence, max_tokens)
    if search not in SEARCHES:
        raise ConfigError(f"search must be {' or '.join(map(repr, SEARCHES))}, got {search!r}")
    given = _gather(batches)
    with _switchable(model, inputs, settings, given) as (layers, calibrated):
        most = _most(budget, len(layers.paths))
        meter = _Meter(model, layers, _first(given, max_tokens))
        wanted = -math.inf if max_divergence is None else max_divergence
        costs, choices = _search(meter, layers.paths, most, wanted, search == "greedy")
        if max_divergence is not None and choices[-1].divergence > max_divergence:
            raise ConfigError(
                f"max_divergence={max_divergence} cannot be reached: with {most} of {len(layers.paths)} "
                f"layers softmax it is {choices[-1].divergence:.4g}"
            )
        names = layers.names()
        keep = (*settings.keep_softmax, *(names[path] for path in choices[-1].kept))
        return Sensitivity(
            meter.measure,
            meter.positions,
            calibrated,
            tuple(LayerSensitivity(path, names[path], cost) for path, cost in costs.items()),
            choices,
            dataclasses.replace(settings, keep_softmax=keep),
        )


def _search(
    meter: _Meter, paths: Sequence[str], most: int, wanted: float, greedy: bool
) -> tuple[dict[str, float], tuple[Choice, ...]]:
    """What each layer costs alone, and the best choices of 0, 1, ... layers.

    There are at most `most` layers in a choice, and no choice follows one whose divergence is `wanted` or
    less.
    """
    everything = frozenset(paths)
    *alone, whole = meter.divergences([*(everything - {path} for path in paths), frozenset()])
    costs = dict(zip(paths, alone, strict=True))
    found = [(frozenset[str](), whole)]
    while len(found) <= most and found[-1][1] > wanted:
        rest = [path for path in paths if path not in found[-1][0]]
        # The layer that costs most alone, unless all of them are tried.
        candidates = rest if greedy else [max(rest, key=costs.__getitem__)]
        sets = [found[-1][0] | {path} for path in candidates]
        found.append(min(zip(sets, meter.divergences(sets), strict=True), key=lambda pair: pair[1]))
    return costs, tuple(Choice(tuple(p for p in paths if p in kept), d) for kept, d in found)


def _check_limits(budget: Any, max_divergence: Any, max_tokens: Any) -> None:
    """Raise ConfigError unless exactly one limit is given and all of them make sense."""
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
    """How many layers may stay softmax. Raises ConfigError unless one is left to rewrite."""
    if budget is None:
        return count - 1
    most = math.floor(budget * count) if isinstance(budget, float) else budget
    if most >= count:
        raise ConfigError(f"budget={budget!r} leaves none of {count} layers to rewrite; give a smaller one")
    return most


def _gather(batches: Iterable[Any]) -> list[dict[str, Any]]:
    """The batches that calibration reads. Raises InputError when there are none."""
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
    """The first batches that together have `tokens` tokens."""
    found: list[dict[str, Any]] = []
    for batch in batches:
        if tokens <= 0:
            break
        found.append(batch)
        tokens -= tokens_in(batch)
    return found


class _Layers:
    """The attention owners of a model, each switched between softmax and its linear form."""

    def __init__(self, plan: Plan, softmax: Mapping[str, Snapshot], linear: Mapping[str, Snapshot]) -> None:
        self.plan, self._softmax, self._linear = plan, softmax, linear
        self.paths = tuple(plan.owners)
        self._kept: frozenset[str] = frozenset()

    def keep(self, kept: frozenset[str]) -> None:
        """Make these layers softmax and all others linear."""
        for path in kept ^ self._kept:
            (self._softmax if path in kept else self._linear)[path].restore()
        self._kept = kept

    def names(self) -> dict[str, int | str]:
        """How `keep_softmax` names each layer: by its index, or by its path if the index is not unique."""
        index = {path: sites[0].layer_index for path, sites in self.plan.owners.items()}
        same = list(index.values())
        return {p: p if i is None or same.count(i) > 1 else i for p, i in index.items()}


@contextlib.contextmanager
def _switchable(
    model: nn.Module, inputs: Any, config: LinearizeConfig, batches: Sequence[dict[str, Any]]
) -> Iterator[tuple[_Layers, bool]]:
    """Put the model into evaluation mode with every layer linear; afterwards restore it.

    Yields:
        The layers, and whether their linear forms are calibrated.
    """
    before = Snapshot(model)
    try:
        linearize(model, inputs, config)
        plan = state_of(model).plan
        try:
            calibrate(model, batches, sequential=False)
            calibrated = True
        except InvalidModelError:  # the mechanism has nothing to fit
            calibrated = False
        children = {site: model.get_submodule(site.name).eval() for site in plan.sites}
        before.restore()
        with quiet_run(model):
            softmax = {path: Snapshot(model.get_submodule(path), inside=False) for path in plan.owners}
            # Compact masks are for models without any softmax.
            apply_owners(model, dataclasses.replace(plan, compact_masks=False), config)
            for site, child in children.items():
                model.get_submodule(site.path).add_module(site.child, child)
            linear = {path: Snapshot(model.get_submodule(path), inside=False) for path in plan.owners}
            yield _Layers(plan, softmax, linear), calibrated
    finally:
        before.restore()


class _Meter:
    """Measures the divergence of a model from its original on batches, with some of its layers softmax."""

    def __init__(self, model: nn.Module, layers: _Layers, batches: Sequence[dict[str, Any]]) -> None:
        self._model, self._layers, self._batches = model, layers, batches
        self.measure, self.positions = "", 0

    def divergences(self, sets: Sequence[frozenset[str]]) -> list[float]:
        """The divergence for each set of softmax layers."""
        self.positions = 0
        totals, size = [0.0] * len(sets), 0.0
        for batch in self._batches:
            original = self._output(batch, frozenset(self._layers.paths))
            self.positions += len(original)
            size += float(original.double().square().sum())
            for index, kept in enumerate(sets):
                totals[index] += self._between(original, self._output(batch, kept))
        if self.positions == 0:
            raise InputError("the batches have nothing but padding")
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
        """The logits, or else the first output, at the positions that are not padding: `[N, size]`."""
        self._layers.keep(kept)
        result = forward(self._model, batch)
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
        if is_encoder_decoder(self._model):
            mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
            if mask is None and labels is not None:
                mask = labels != IGNORED
        else:
            mask = batch.get("attention_mask")
        if mask is None or mask.shape != output.shape[:2]:
            return torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)
        return mask.bool()
