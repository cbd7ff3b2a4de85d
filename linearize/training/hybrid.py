"""Which attention layers to leave softmax, or to give more tokens: the search for what costs least."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..calibration.calibrate import TOKENS as CALIBRATION_TOKENS
from ..common.batches import batches_of, tokens_in
from ..common.checks import require, require_number, require_whole, several
from ..common.progress import bar
from ..convert.linearize import check_model, resolve_config
from ..errors import ConfigError, InputError
from ..planning.config import LinearizeConfig
from .layers import SOFTMAX, Forms, Layers, Meter, switchable
from .sensitivity import Choice, LayerSensitivity, Sensitivity
from .state_budget import Budget, longest_of, sizes_of

MEASURED_TOKENS = 8192
"""The default number of tokens that divergences are measured on."""
SEARCHES = ("greedy", "ranking")


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    budget: int | float | None = None,
    max_divergence: float | None = None,
    state_bytes: int | None = None,
    lengths: Sequence[int] | int | None = None,
    inputs: Any = None,
    config: LinearizeConfig | Mapping[str, Any] | None = None,
    search: str = "greedy",
    max_tokens: int = MEASURED_TOKENS,
    progress: bool | None = None,
    **overrides: Any,
) -> Sensitivity:
    """Find the layers that are best left softmax, or how best to spend bytes of state on the layers.

    The model stays as it is. The search starts with every layer linear and makes one layer at a time softmax
    again: the one that lowers the divergence most. (What layers cost together is not the sum of what each
    costs alone.)

    With `state_bytes` it estimates, from gradients, what each layer alone costs in several sizes: those given
    times 1/4, 1/2, 1, 2 and 4. Then it spends the bytes step by step on what takes off most divergence for a
    byte. The answer is that, or one size for all layers where that is measured to be better. The layers are
    as converted then, not calibrated.

    Args:
        model: An unconverted model.
        batches: Dicts of the model's keyword arguments, or token ids int64 `[B, T]`. Without `state_bytes`
            the linear layers are calibrated on them.
        budget: How many layers may stay softmax, besides those that `config` keeps: an int, or a float below
            1 for a share of the layers that `config` rewrites. With `state_bytes` it may be left out: none.
        max_divergence: Instead of a budget: use as few softmax layers as bring the divergence from the
            original down to this. See `Sensitivity.measure` for its unit.
        state_bytes: Bytes that the states of one sequence may have in all, in the dtype of the model. Layers
            that stay softmax count with the keys and values of the longest sequence that is measured. For
            mechanisms whose state has sizes, such as `window` and `salient` of "augmented".
        lengths: Tokens of context to measure at, each as important as the others: batches of token ids are
            cut to each of them. None: the batches as they are.
        inputs: Example inputs, as in `lz.linearize`.
        config: The settings of the conversion, as in `lz.linearize`.
        search: Without `state_bytes`: "greedy" tries all remaining layers at each step. "ranking" takes them
            in the order of what each costs alone; this needs about as many passes over the batches as there
            are layers, and its choice is nearly as good.
        max_tokens: The divergence is measured on the first batches, up to this number of tokens.
        progress: Whether to show a progress bar; on terminals and in notebooks by default.
        **overrides: Fields of `LinearizeConfig`, as in `lz.linearize`.

    Returns:
        The cost of each layer, the best choices, and the settings to give to `lz.linearize`.

    Raises:
        LinearizeError: Whatever `lz.linearize` raises.
        ConfigError: The budget leaves nothing to rewrite, or the divergence cannot be reached; no batch is as
            long as `lengths` says; the smallest sizes need more than `state_bytes`, or there are no sizes.
        InputError: The batches are empty, do not run, or give NaN.
    """
    settings = resolve_config(config, overrides)
    check_model(model)
    _check_limits(budget, max_divergence, state_bytes, max_tokens)
    wanted_lengths = _checked_lengths(lengths)
    require(search in SEARCHES, "search", search, " or ".join(map(repr, SEARCHES)))
    sizes = [settings] if state_bytes is None else sizes_of(settings)
    given = _gather(batches)
    measured = _first(given, max_tokens)
    with (
        bar("plan", None, progress, "batches") as tick,
        switchable(model, inputs, sizes, given if state_bytes is None else None) as layers,
    ):
        most = _most(budget, state_bytes, len(layers.paths))
        meter = Meter(model, layers, measured, wanted_lengths, tick)
        if state_bytes is not None:
            dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
            longest = longest_of(measured, wanted_lengths)
            spent = Budget(meter, layers, state_bytes, most, longest, dtype)
            found = spent.layers, spent.choices, spent.config
        else:
            found = _search(meter, layers, settings, most, max_divergence, search == "greedy")
        return Sensitivity(meter.measure, meter.positions, layers.calibrated, *found, wanted_lengths)


def _search(
    meter: Meter,
    layers: Layers,
    settings: LinearizeConfig,
    most: int,
    max_divergence: float | None,
    greedy: bool,
) -> tuple[tuple[LayerSensitivity, ...], tuple[Choice, ...], LinearizeConfig]:
    """What each layer costs alone, the best choices of 0, 1, ... softmax layers, and the last as settings.

    There are at most `most` layers in a choice, and no choice follows one that is good enough.
    """
    paths, names = layers.paths, layers.names()

    def keeping(kept: Collection[str]) -> Forms:
        return {path: SOFTMAX if path in kept else 1 for path in paths}

    sets = [*(set(paths) - {path} for path in paths), set[str]()]
    *alone, whole = meter.divergences([keeping(kept) for kept in sets])
    costs = dict(zip(paths, alone, strict=True))
    found = [(frozenset[str](), whole)]
    wanted = -math.inf if max_divergence is None else max_divergence
    while len(found) <= most and found[-1][1] > wanted:
        rest = [path for path in paths if path not in found[-1][0]]
        # The layer that costs most alone, unless all of them are tried.
        candidates = rest if greedy else [max(rest, key=costs.__getitem__)]
        tried = [found[-1][0] | {path} for path in candidates]
        divergences = meter.divergences([keeping(kept) for kept in tried])
        found.append(min(zip(tried, divergences, strict=True), key=lambda pair: pair[1]))
    choices = tuple(Choice(tuple(p for p in paths if p in kept), d) for kept, d in found)
    if max_divergence is not None and choices[-1].divergence > max_divergence:
        raise ConfigError(
            f"max_divergence={max_divergence} cannot be reached: with {most} of {len(paths)} "
            f"layers softmax it is {choices[-1].divergence:.4g}"
        )
    keep = (*settings.keep_softmax, *(names[path] for path in choices[-1].kept))
    told = tuple(LayerSensitivity(path, names[path], cost) for path, cost in costs.items())
    return told, choices, dataclasses.replace(settings, keep_softmax=keep)


def _check_limits(budget: Any, max_divergence: Any, state_bytes: Any, max_tokens: Any) -> None:
    """Raise ConfigError unless one limit is given, or bytes and a budget, and all of them make sense."""
    if state_bytes is None and (budget is None) == (max_divergence is None):
        raise ConfigError("give budget= or max_divergence=, one of the two, or state_bytes=")
    if state_bytes is not None and max_divergence is not None:
        raise ConfigError("give state_bytes= or max_divergence=, one of the two")
    whole = isinstance(state_bytes, int) and not isinstance(state_bytes, bool)
    require(state_bytes is None or (whole and state_bytes > 0), "state_bytes", state_bytes, "an int above 0")
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    share = isinstance(budget, float)
    good = budget is None or (number and (0 <= budget < 1 if share else budget >= 0))
    require(good, "budget", budget, "an int >= 0 or a float in [0, 1)")
    require_number(
        "max_divergence", max_divergence, "a number above 0", lambda value: value > 0, optional=True
    )
    require_whole("max_tokens", max_tokens)


def _checked_lengths(lengths: Sequence[int] | int | None) -> tuple[int, ...] | None:
    asked = several(lengths)
    if asked is None:
        return None
    require(isinstance(asked, tuple), "lengths", asked, "different ints above 0")
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in asked)
    if not asked or not whole or len(set(asked)) < len(asked):
        raise ConfigError(f"lengths must be different ints above 0, got {list(asked)}", "lengths")
    return tuple(asked)


def _most(budget: int | float | None, state_bytes: int | None, count: int) -> int:
    """How many layers may stay softmax. Raises ConfigError unless one is left to rewrite."""
    if budget is None:
        return 0 if state_bytes is not None else count - 1
    most = math.floor(budget * count) if isinstance(budget, float) else budget
    if most >= count:
        raise ConfigError(f"budget={budget!r} leaves none of {count} layers to rewrite; give a smaller one")
    return most


def _gather(batches: Iterable[Any]) -> list[dict[str, Any]]:
    """The batches that calibration reads. Raises InputError when there are none."""
    found: list[dict[str, Any]] = []
    tokens = 0
    for batch in batches_of(batches):
        found.append(batch)
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
