"""What `plan` found: the cost of each layer, and the best choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common.tables import Grid, Printed
from ..planning.config import LinearizeConfig


@dataclass(frozen=True)
class LayerSize:
    """One size of the state of a layer.

    Attributes:
        options: Of the mechanism.
        state_bytes: Bytes of the layer's state of one sequence, in the dtype of the model.
        alone: The divergence of the model when only this layer is linear, in this size, estimated from
            gradients.
    """

    options: Mapping[str, Any]
    state_bytes: int
    alone: float


@dataclass(frozen=True)
class LayerSensitivity:
    """One attention layer.

    Attributes:
        path: The path of its module.
        keep: How `keep_softmax` and `layer_options` name it.
        alone: The divergence of the model when only this layer is linear, by the settings given; with a
            budget of bytes, the estimate of it.
        sizes: With a budget of bytes: what is known of all sizes, the smallest first.
    """

    path: str
    keep: int | str
    alone: float
    sizes: tuple[LayerSize, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What may become of the layers.

    Attributes:
        kept: Paths of the layers that stay softmax.
        divergence: The divergence of the model when all other layers are linear.
        options: With a budget of bytes: options of the mechanism, by the paths of the layers.
        state_bytes: With a budget of bytes: bytes of all states of one sequence; layers that stay softmax
            count with the keys and values of the longest sequence that was measured.
    """

    kept: tuple[str, ...]
    divergence: float
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    state_bytes: int | None = None


@dataclass(frozen=True)
class Sensitivity(Printed):
    """What `plan` found.

    Attributes:
        measure: "kl" for models with logits: mean `KL(original || converted)` in nats per position.
            "distance" for others: `|converted - original| / |original|` of the first output.
        tokens: The number of positions that were measured, of all lengths.
        lengths: Tokens of context that divergences are the mean over; None: as the batches are.
        calibrated: Whether the linear layers were calibrated first; with a budget of bytes they are not.
        layers: Every layer that can be rewritten, in the order of execution.
        choices: The best choice found for each number of softmax layers, from none on. With a budget of
            bytes: the best with one size for all layers, and the best found. The last is the answer.
        config: The settings to give to `lz.linearize`.
    """

    measure: str
    tokens: int
    calibrated: bool
    layers: tuple[LayerSensitivity, ...]
    choices: tuple[Choice, ...]
    config: LinearizeConfig
    lengths: tuple[int, ...] | None = None

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
            "lengths": None if self.lengths is None else list(self.lengths),
            "calibrated": self.calibrated,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "choices": [dataclasses.asdict(choice) for choice in self.choices],
            "kept": list(self.kept),
            "divergence": self.divergence,
            "config": self.config.to_dict(),
        }

    def blocks(self) -> Iterator[Grid | str]:
        heading = "KL" if self.measure == "kl" else "distance"
        sizes = self.layers[0].sizes
        yield self._sizes_grid(heading) if sizes else self._layers_grid(heading)
        if sizes:
            names = " / ".join(sizes[0].options)
            yield f"Sizes: {names}. {heading} by layer: estimated, for a model with only that layer linear."
        steps: list[list[str]] = []
        for choice in self.choices:
            if sizes:
                alike = not choice.kept and len({_size(own) for own in choice.options.values()}) == 1
                which = "one size for all" if alike else "sizes by layer"
                steps.append([f"{choice.state_bytes:,}", f"{choice.divergence:.4g}", which])
            else:
                kept = ", ".join(choice.kept) or "none"
                steps.append([str(len(choice.kept)), f"{choice.divergence:.4g}", kept])
        first, last = ("state bytes", "") if sizes else ("kept softmax", "layers")
        yield Grid((first, heading, last), steps)
        fitted = "calibrated" if self.calibrated else "as converted"
        at = (
            "" if self.lengths is None else f" at {', '.join(map(str, self.lengths))} tokens, equally weighed"
        )
        yield f"{self.tokens} positions{at}; linear layers are {fitted}"

    def _layers_grid(self, heading: str) -> Grid:
        softmax, linear = ("softmax", self.config.mechanism)
        rows = [(x.path, f"{x.alone:.4g}", softmax if x.path in self.kept else linear) for x in self.layers]
        return Grid(("layer", f"{heading} if only it is linear", "becomes"), rows)

    def _sizes_grid(self, heading: str) -> Grid:
        options = self.choices[-1].options
        rows = []
        for layer in self.layers:
            own = next((size for size in layer.sizes if size.options == options.get(layer.path)), None)
            becomes, cost = ("softmax", 0.0) if own is None else (_size(own.options), own.alone)
            rows.append((layer.path, f"{layer.alone:.4g}", becomes, f"{cost:.4g}"))
        return Grid(("layer", f"{heading} in the size given", "becomes", heading), rows)


def _size(options: Mapping[str, Any]) -> str:
    return " / ".join(map(str, options.values()))
