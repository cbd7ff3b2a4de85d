"""The attention layers of a model, switched between softmax and linear forms, and what each set costs.

Every figure is about a model that a user can have: layers are rewritten, and calibrated if asked for, as
`linearize` and `calibrate` do it. Calibration fits each layer to what it gets in the original, whatever the
other layers become. So the layers are converted once for each setting, and then switched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.calibrate import calibrate, forward
from ..common.progress import Tick
from ..common.running import floats, quiet_run
from ..common.text import IGNORED
from ..convert.linearize import linearize
from ..errors import ConfigError, InputError, InvalidModelError, RefusedError
from ..evaluation.quality import total_kl
from ..planning.config import LinearizeConfig
from ..planning.plan import Plan
from ..planning.state import state_of
from ..rewrite.apply import apply_owners
from ..rewrite.snapshot import Snapshot
from .data import is_encoder_decoder
from .influence import influence

SOFTMAX = 0
"""The form of a layer that is the original's. Form k is linear, by the k-th setting."""
Forms = Mapping[str, int]
"""The form of each layer, by the path of its owner."""


class Layers:
    """The attention owners of a model, each switched between its forms.

    Attributes:
        plan: Of the conversion.
        configs: The settings of the linear forms. Those whose conversion was refused are not among them.
        calibrated: Whether the linear forms are calibrated.
        paths: Of the owners, in the order of execution.
    """

    def __init__(
        self,
        plan: Plan,
        configs: Sequence[LinearizeConfig],
        forms: Mapping[str, Sequence[Snapshot]],
        calibrated: bool,
    ) -> None:
        self.plan, self.configs, self.calibrated = plan, tuple(configs), calibrated
        self.paths = tuple(plan.owners)
        self._forms = forms
        self._now = dict.fromkeys(self.paths, 1)

    def put(self, forms: Forms) -> None:
        """Give every layer its form."""
        for path, form in forms.items():
            if self._now[path] != form:
                self._forms[path][form].restore()
                self._now[path] = form

    def all(self, form: int) -> dict[str, int]:
        """Every layer in one form."""
        return dict.fromkeys(self.paths, form)

    def names(self) -> dict[str, int | str]:
        """How `keep_softmax` names each layer: by its index, or by its path if the index is not unique."""
        index = {path: sites[0].layer_index for path, sites in self.plan.owners.items()}
        same = list(index.values())
        return {p: p if i is None or same.count(i) > 1 else i for p, i in index.items()}


@contextlib.contextmanager
def switchable(
    model: nn.Module,
    inputs: Any,
    configs: Sequence[LinearizeConfig],
    batches: Sequence[dict[str, Any]] | None,
) -> Iterator[Layers]:
    """Put the model into evaluation mode, every layer linear by the first setting; afterwards restore it.

    batches: to calibrate the linear forms on; None leaves them as converted.
    A later setting that is refused is left out. Raises what `linearize` raises by the first.
    """
    before = Snapshot(model)
    try:
        linearize(model, inputs, configs[0], progress=False)
        plan = state_of(model).plan
        taken, children, calibrated = [configs[0]], [_fitted(model, plan, batches)], True
        for config in configs[1:]:
            try:
                linearize(model, config=config, progress=False)
            except RefusedError:
                continue
            taken.append(config)
            children.append(_fitted(model, plan, batches))
        calibrated = all(fitted for fitted, _ in children)
        before.restore()
        with quiet_run(model):
            forms = {path: [Snapshot(model.get_submodule(path), inside=False)] for path in plan.owners}
            # Compact masks are for models without any softmax.
            apply_owners(model, dataclasses.replace(plan, compact_masks=False), configs[0])
            for _, modules in reversed(children):  # the first setting is what is there at the end
                for site, child in zip(plan.sites, modules, strict=True):
                    model.get_submodule(site.path)._modules[site.child] = child
                for path, found in forms.items():
                    found.insert(1, Snapshot(model.get_submodule(path), inside=False))
            yield Layers(plan, taken, forms, calibrated)
    finally:
        before.restore()


def _fitted(
    model: nn.Module, plan: Plan, batches: Sequence[dict[str, Any]] | None
) -> tuple[bool, list[nn.Module]]:
    """Calibrate a converted model if there are batches: whether that was done, and its attention modules."""
    calibrated = batches is not None
    if batches is not None:
        try:
            calibrate(model, batches, sequential=False, progress=False)
        except InvalidModelError:  # the mechanism has nothing to fit
            calibrated = False
    return calibrated, [model.get_submodule(site.name).eval() for site in plan.sites]


class Meter:
    """Measures the divergence of a model from its original on batches, by the forms of its layers.

    Attributes:
        measure: "kl" or "distance", see `Sensitivity`.
        positions: How many positions were measured.

    Args:
        model: The model that `layers` are of.
        layers: Its layers.
        batches: What to measure on.
        lengths: Cut the batches to each of these numbers of tokens; divergence is the mean over lengths.
            None: the batches as they are.
        tick: Is told of every batch that was run.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        batches: Sequence[dict[str, Any]],
        lengths: Sequence[int] | None = None,
        tick: Tick = lambda count: None,
    ) -> None:
        self._tick = tick
        self._model, self._layers = model, layers
        self._groups = [batches] if lengths is None else [_cut(batches, length) for length in lengths]
        self.measure, self.positions = "", 0

    def divergences(self, asked: Sequence[Forms]) -> list[float]:
        """The divergence with the layers in each of these forms."""
        self.positions = 0
        each = [self._of_group(group, asked) for group in self._groups]
        return [sum(found) / len(each) for found in zip(*each, strict=True)]

    def estimates(self, forms: Sequence[int]) -> dict[str, list[float]]:
        """The divergence with each layer alone in each of these forms, estimated from gradients."""
        paths, original = self._layers.paths, self._layers.all(SOFTMAX)
        put = [functools.partial(self._layers.put, self._layers.all(form)) for form in forms]
        each: list[dict[str, list[float]]] = []
        for group in self._groups:
            totals, positions, size = {path: [0.0] * len(forms) for path in paths}, 0, 0.0
            for batch in itertools.chain.from_iterable(map(_rows, group)):
                self._layers.put(original)
                self._model.requires_grad_(False)  # which saves memory; `switchable` restores it
                run = functools.partial(self._output, batch, original)
                output, found = influence(self._model, paths, put, run, self._draw)
                self._tick(1)
                positions += len(output)
                size += float(output.double().square().sum())
                for path, costs in found.items():
                    totals[path] = [a + b for a, b in zip(totals[path], costs, strict=True)]
            each.append({p: [self._mean(x, positions, size) for x in found] for p, found in totals.items()})
        return {p: [sum(x) / len(each) for x in zip(*(one[p] for one in each), strict=True)] for p in paths}

    def _draw(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """A number of which the variance under a change of the output is what the change costs, summed.

        KL is, to second order, half the variance of the log-probability's change for tokens drawn from the
        original. The squared distance is that of the change along a random direction.
        """
        if self.measure == "kl":
            chances = output.detach().float().softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0]
            return -nn.functional.cross_entropy(output.float(), drawn, reduction="sum") / math.sqrt(2)
        shape, device = output.shape, output.device
        return (output.float() * torch.randn(shape, generator=generator, device=device)).sum()

    def _mean(self, total: float, positions: int, size: float) -> float:
        """The divergence, from its sum over positions; size: the squared size of the original's outputs."""
        if self.measure == "kl":
            return total / positions
        return math.sqrt(total / size) if size else 0.0

    def _of_group(self, batches: Sequence[dict[str, Any]], asked: Sequence[Forms]) -> list[float]:
        positions, totals, size = 0, [0.0] * len(asked), 0.0
        for batch in batches:
            original = self._output(batch, self._layers.all(SOFTMAX))
            positions += len(original)
            size += float(original.double().square().sum())
            for index, forms in enumerate(asked):
                totals[index] += self._between(original, self._output(batch, forms))
                self._tick(1)
        if positions == 0:
            raise InputError("the batches have nothing but padding")
        if not all(map(math.isfinite, totals)):
            raise InputError("the divergence on these batches is not finite")
        self.positions += positions
        return [self._mean(total, positions, size) for total in totals]

    def _between(self, original: Tensor, found: Tensor) -> float:
        if self.measure == "kl":
            return total_kl(original, found)
        return float((found.double() - original.double()).square().sum())

    def _output(self, batch: dict[str, Any], forms: Forms) -> Tensor:
        """The logits, or else the first output, at the positions that are not padding: `[N, size]`."""
        self._layers.put(forms)
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


def _rows(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The sequences of a batch one by one, to save memory, where all of its tensors have one for each."""
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
    counts = {x.shape[0] if x.dim() else 0 for x in tensors.values()}
    if len(counts) > 1 or 0 in counts:
        return [batch]
    return [{**batch, **{n: x[i : i + 1] for n, x in tensors.items()}} for i in range(counts.pop())]


def _cut(batches: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """The first `length` tokens of every sequence of the batches that are as long.

    Raises ConfigError where none is, InputError for batches whose sequences cannot be cut.
    """
    found = []
    for batch in batches:
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise InputError("lengths= cuts batches by their input_ids [B, T], and these have none")
        if ids.shape[1] < length:
            continue
        square = [name for name, x in batch.items() if isinstance(x, Tensor) and x.dim() > 2]
        if square:
            raise InputError(f"lengths= cannot cut {square[0]!r}, which has more than the axes [B, T]")
        whole = ids.shape
        cut = {n: x[:, :length] for n, x in batch.items() if isinstance(x, Tensor) and x.shape == whole}
        found.append({**batch, **cut})
    if not found:
        raise ConfigError(f"lengths: no batch has {length} tokens in a row")
    return found
