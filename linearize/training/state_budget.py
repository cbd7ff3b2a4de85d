"""How to spend a number of state bytes on layers: which get more tokens, and which stay softmax."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import mechanisms
from ..errors import ConfigError
from ..evaluation.baseline import state_bytes
from ..planning.config import LinearizeConfig
from ..planning.plan import Plan
from .layers import SOFTMAX, Forms, Layers, Meter
from .sensitivity import Choice, LayerSensitivity, LayerSize

FACTORS = (1, 0.25, 0.5, 2, 4)
"""What each size given is multiplied by, each in its turn with each of the others; as given comes first."""


def sizes_of(config: LinearizeConfig) -> list[LinearizeConfig]:
    """The settings in all sizes, those given first. Raises ConfigError where the mechanism has no sizes.

    A layer that looks far back and one that looks at few tokens need different shares of window and salient
    tokens, so all pairs are tried.
    """
    names = mechanisms.get(config.mechanism).sizes
    if not any(config.option(name) for name in names):
        raise ConfigError(
            f"state_bytes: mechanism {config.mechanism!r} has no sizes to choose "
            f"({'all of them are 0' if names else 'its state has one size'})"
        )
    if config.layer_options:
        raise ConfigError("state_bytes chooses the options of each layer: give it no layer_options")
    tried = [
        [max(1, round(size * factor)) for factor in FACTORS] if size else [0]
        for size in map(config.option, names)
    ]
    found = [
        dataclasses.replace(config, options={**config.options, **dict(zip(names, sizes, strict=True))})
        for sizes in itertools.product(*tried)
    ]
    return list(dict.fromkeys(found))


class Budget:
    """The costs of all layers in all sizes, and what to make of them.

    Attributes:
        layers: What was measured of each layer.
        choices: The best with one size for all layers, where one fits, and the best found.
        config: The settings of the best found.

    Args:
        meter: Of the model.
        layers: Its layers, whose forms are the sizes.
        limit: Bytes of all states together.
        most: How many layers may stay softmax.
        longest: Tokens that a layer which stays softmax keeps.
        dtype: Of keys and values.

    Raises:
        ConfigError: The smallest sizes need more bytes.
    """

    def __init__(
        self, meter: Meter, layers: Layers, limit: int, most: int, longest: int, dtype: torch.dtype
    ) -> None:
        self._layers = layers
        self._names = mechanisms.get(layers.configs[0].mechanism).sizes
        # By the form: 0 is softmax, k the k-th size.
        self._bytes = {path: _bytes_of(layers, path, longest, dtype) for path in layers.paths}
        self._order = sorted(
            range(1, len(layers.configs) + 1), key=lambda form: self._total(layers.all(form))
        )
        least = self._total(layers.all(self._order[0]))
        if least > limit:
            raise ConfigError(
                f"state_bytes={limit:,} is too little: the smallest sizes tried need {least:,} bytes; "
                "give smaller options"
            )
        found = meter.estimates(self._order)
        self._cost = {
            p: {SOFTMAX: 0.0, **dict(zip(self._order, found[p], strict=True))} for p in layers.paths
        }
        alike, spent = self._alike(limit), self._spend(limit, most)
        divergences = meter.divergences([*alike, spent])
        simple = min(zip(divergences[:-1], alike, strict=True), key=lambda choice: choice[0])
        choices = [simple] if simple[0] <= divergences[-1] else [simple, (divergences[-1], spent)]
        self.choices = tuple(self._choice(forms, divergence) for divergence, forms in choices)
        self.config = self._config(choices[-1][1])
        self.layers = tuple(self._layer(path, name) for path, name in layers.names().items())

    def _total(self, forms: Forms) -> int:
        return sum(self._bytes[path][form] for path, form in forms.items())

    def _alike(self, limit: int) -> list[Forms]:
        """Every layer in one size, of those that fit: in that given, and in the one estimated to be best."""
        fit = [form for form in self._order if self._total(self._layers.all(form)) <= limit]
        best = min(fit, key=lambda form: sum(cost[form] for cost in self._cost.values()))
        return [self._layers.all(form) for form in dict.fromkeys([*({1} & set(fit)), best])]

    def _spend(self, limit: int, most: int) -> dict[str, int]:
        """From the smallest size on, step by step what takes off most divergence for a byte."""
        forms = self._layers.all(self._order[0])
        while True:
            left = limit - self._total(forms)
            kept = sum(form == SOFTMAX for form in forms.values())
            steps = [step for step in self._steps(forms, kept < most) if step[1] <= left and step[0] > 0]
            if not steps:
                return forms
            # What costs no bytes comes first.
            _, _, path, form = max(steps, key=lambda step: (step[1] <= 0, step[0] / max(step[1], 1)))
            forms[path] = form

    def _steps(self, forms: Forms, softmax: bool) -> Iterator[tuple[float, int, str, int]]:
        """What each change of one layer takes off, what it costs in bytes, and what it is."""
        for path, now in forms.items():
            for form in (*self._order, *([SOFTMAX] if softmax else [])):
                gain = self._cost[path][now] - self._cost[path][form]
                yield gain, self._bytes[path][form] - self._bytes[path][now], path, form

    def _options(self, form: int) -> dict[str, Any]:
        config = self._layers.configs[form - 1]
        return {name: config.option(name) for name in self._names}

    def _choice(self, forms: Forms, divergence: float) -> Choice:
        kept = tuple(path for path, form in forms.items() if form == SOFTMAX)
        options = {path: self._options(form) for path, form in forms.items() if form != SOFTMAX}
        return Choice(kept, divergence, options, self._total(forms))

    def _config(self, forms: Forms) -> LinearizeConfig:
        """The options of most layers, and what differs from them."""
        names = self._layers.names()
        linear = {path: form for path, form in forms.items() if form != SOFTMAX}
        usual = Counter(linear.values()).most_common(1)[0][0]
        config = self._layers.configs[usual - 1]
        own = {names[path]: self._options(form) for path, form in linear.items() if form != usual}
        kept = (*config.keep_softmax, *(names[path] for path in forms if path not in linear))
        return dataclasses.replace(config, layer_options=own, keep_softmax=kept)

    def _layer(self, path: str, name: int | str) -> LayerSensitivity:
        cost = self._cost[path]
        sizes = (LayerSize(self._options(f), self._bytes[path][f], cost[f]) for f in self._order)
        return LayerSensitivity(path, name, cost[1], tuple(sizes))


def _bytes_of(layers: Layers, path: str, longest: int, dtype: torch.dtype) -> list[int]:
    """Bytes of a layer in each of its forms. Raises ConfigError where it has no state."""
    sites = layers.plan.owners[path]
    found = [sum(_key_value_bytes(site.spec, longest, dtype) for site in sites if site.spec.causal)]
    for config in layers.configs:
        size = state_bytes(Plan(sites), config, dtype)
        if not size:
            raise ConfigError(f"state_bytes: {path} has no state of constant size under these settings")
        found.append(size)
    return found


def _key_value_bytes(spec: Any, tokens: int, dtype: torch.dtype) -> int:
    return spec.num_key_value_heads * (spec.head_dim + spec.value_dim) * tokens * dtype.itemsize


def longest_of(batches: Sequence[dict[str, Any]], lengths: Sequence[int] | None) -> int:
    """Tokens of the longest sequence measured."""
    tensors = (x for batch in batches for x in batch.values() if isinstance(x, torch.Tensor) and x.dim() > 1)
    return max(lengths) if lengths else max(x.shape[1] for x in tensors)
