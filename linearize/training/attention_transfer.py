"""Attention transfer: each new attention learns to give the output of the softmax it replaced.

As in LoLCATs (arXiv 2410.10254, stage 1): the model runs with exact softmax, and each linear module is shown
the same query, key, value and mask and learns to give the same output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.observers import real_queries, watching, why_unseen
from ..common.running import without_cache
from ..errors import InputError, InvalidModelError
from ..planning.state import state_of
from ..rewrite.snapshot import Flags
from .data import Collate, is_pair, rows_of
from .trainer import Run, Stage, train

DEFAULTS: dict[str, Any] = dict(learning_rate=1e-2, batch_size=4)


def transfer(model: nn.Module, data: Any, *, tokenizer: Any = None, context: int = 512, **run: Any) -> Stage:
    """Train the new parameters of a converted `model` to match its softmax attention, in place.

    data, tokenizer, context: see `rows_of`; labels are not used. run: the fields of `Run`, with a learning
    rate of 1e-2 unless given. The loss is the sum over sites of the squared distance between the two outputs,
    relative to softmax's own square, at tokens that are no padding. Only parameters of the attention modules
    are trained; nothing else changes, and the softmax is that of the model's present weights, so this comes
    before any tuning.

    Returns how it went. Raises InvalidModelError for a model that is not converted or whose attention has
    nothing to train, InputError for the data, ConfigError for settings, TrainingError when the loss is no
    number or a checkpoint cannot be written, MissingExtraError without accelerate; the model is then as it
    was.
    """
    settings = Run.of(run, **DEFAULTS)
    sites = state_of(model).plan.sites
    watchers = {site: _Student(model.get_submodule(site.name)) for site in sites}
    reasons = {site: _why_not(watcher.module, site) for site, watcher in watchers.items()}
    watchers = {site: watcher for site, watcher in watchers.items() if not reasons[site]}
    if not watchers:
        raise InvalidModelError(f"nothing can be transferred: {'; '.join(sorted(set(reasons.values())))}")
    rows = rows_of(model, data, tokenizer, context)
    trained = [p for watcher in watchers.values() for p in watcher.module.parameters()]
    flags = Flags(model)
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        with watching(model, watchers):
            stage = train(
                "transfer",
                _Transfer(model, list(watchers.values())),
                lambda module, inputs: module(**inputs)["loss"],
                lambda name: True,
                rows,
                Collate.of(model),
                settings,
            )
    finally:
        flags.restore()
    return dataclasses.replace(stage, model=model)


class _Student:
    """One site's linear module, and how far it was from softmax at the calls since `reset`."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.losses: list[Tensor] = []

    def see(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        target: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> None:
        """See `Watcher`. The tensors carry no gradient: the model runs without."""
        real = real_queries(key_mask, query, key, query_start, self.module.spec.cross)[:, None, :, None]
        with torch.enable_grad():
            out = self.module(query, key, value, key_mask=key_mask, query_start=query_start)
            wanted = torch.where(real, target.float(), 0.0)
            distance = (torch.where(real, out.float(), 0.0) - wanted).square().sum()
            tiny = torch.finfo(torch.float32).tiny
            self.losses.append(distance / wanted.square().sum().clamp_min(tiny))


class _Transfer(nn.Module):
    """What the Trainer trains: the modules, by a model that is frozen and runs softmax in their place."""

    def __init__(self, model: nn.Module, students: Sequence[_Student]) -> None:
        super().__init__()
        self.model = model
        self.sites = nn.ModuleList(student.module for student in students)
        self._students = students
        self._pair = is_pair(model)
        # By whose names accelerate shards a model.
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        self._keys_to_ignore_on_save = None

    def train(self, mode: bool = True) -> _Transfer:
        """The frozen part is always in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        for student in self._students:
            student.losses.clear()
        if not self._pair:  # which makes its decoder's inputs of them
            inputs.pop("labels", None)
        with torch.no_grad():
            self.model(**without_cache(self.model, inputs))
        silent = [i for i, student in enumerate(self._students) if not student.losses]
        if silent:
            raise InputError("the data never reaches some of the model's attention: give complete inputs")
        losses = [torch.stack(student.losses).mean() for student in self._students]
        # On short rows a parameter may have no part in the output: it gets a gradient of zero, not none.
        nothing = torch.stack([parameter.sum() * 0 for parameter in self.sites.parameters()]).sum()
        return {"loss": torch.stack(losses).sum() + nothing}

    def state_dict(self, *args: Any, **settings: Any) -> Any:
        """The trained modules alone: the rest does not change."""
        if args or "destination" in settings:  # a part of a sharded whole, which wants all of it
            return super().state_dict(*args, **settings)
        return {f"sites.{name}": value for name, value in self.sites.state_dict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **settings: Any) -> Any:
        return self.sites.load_state_dict(
            {name.removeprefix("sites."): value for name, value in state_dict.items()}
        )


def _why_not(module: Any, site: Any) -> str:
    if next(module.parameters(), None) is None:
        return "the mechanism has no parameters (augmentation=True adds taps)"
    return why_unseen(module, site)
