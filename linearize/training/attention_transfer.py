"""Attention transfer: each new attention learns to give the output of the softmax that it replaced.

As in LoLCATs (arXiv 2410.10254, stage 1): the model runs with exact softmax, and each linear module gets the
same query, key, value and mask and learns to give the same output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.observers import Observation, watching, why_unseen
from ..common.running import without_cache
from ..errors import InputError, InvalidModelError
from ..planning.state import state_of
from ..rewrite.snapshot import Snapshot
from .data import Collate, is_encoder_decoder, training_data
from .trainer import Stage, TrainingSettings, train

DEFAULTS: dict[str, Any] = dict(learning_rate=1e-2, batch_size=4)


def transfer(
    model: nn.Module, data: Any, *, tokenizer: Any = None, context: int = 512, **settings: Any
) -> Stage:
    """Train the new parameters of a converted model to match its softmax attention, in place.

    The loss is a sum over attention sites: the squared distance between the outputs of the linear and the
    softmax attention, divided by the square of the softmax output, at tokens that are not padding. Only the
    parameters of the new attention modules change. The softmax uses the model's present weights, so do this
    before any tuning. If this raises, the model is as it was before.

    Args:
        model: A converted model.
        data: Token ids int64 `[n]` or `[B, n]`, a list of these, texts, or dicts of the model's keyword
            arguments. Labels are not used.
        tokenizer: The tokenizer of the model; needed for texts.
        context: Tokens per row.
        **settings: Fields of `linearize.training.TrainingSettings`, such as `epochs`, `batch_size`, `bf16` or
            `output_dir`. The learning rate is 1e-2 unless given.

    Returns:
        The losses before and after, and what it took.

    Raises:
        InvalidModelError: The model is not converted, or its attention has nothing to train.
        InputError: The data is empty, does not fit the model, or never reaches some attention.
        ConfigError: A setting is unknown or out of range.
        TrainingError: The loss is not finite, or a checkpoint cannot be written.
        MissingExtraError: accelerate is not installed.
    """
    run = TrainingSettings.of(settings, **DEFAULTS)
    sites = state_of(model).plan.sites
    watchers = {site: _Student(model.get_submodule(site.name)) for site in sites}
    reasons = {site: _why_not(watcher.module, site) for site, watcher in watchers.items()}
    watchers = {site: watcher for site, watcher in watchers.items() if not reasons[site]}
    if not watchers:
        raise InvalidModelError(f"nothing can be transferred: {'; '.join(sorted(set(reasons.values())))}")
    rows = training_data(model, data, tokenizer, context)
    trained = [p for watcher in watchers.values() for p in watcher.module.parameters()]
    before = Snapshot(model)
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
                run,
            )
    finally:
        before.restore()
    return dataclasses.replace(stage, model=model)


class _Student:
    """The linear module of one site, and its losses in the calls since they were last cleared."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.losses: list[Tensor] = []

    def see(self, call: Observation) -> None:
        """Add the loss of one call. Its tensors have no gradient, because the model runs without."""
        real = call.real_queries()[:, None, :, None]
        with torch.enable_grad():
            out = self.module(
                call.query, call.key, call.value, key_mask=call.key_mask, query_start=call.query_start
            )
            wanted = torch.where(real, call.target.float(), 0.0)
            distance = (torch.where(real, out.float(), 0.0) - wanted).square().sum()
            tiny = torch.finfo(torch.float32).tiny
            self.losses.append(distance / wanted.square().sum().clamp_min(tiny))


class _Transfer(nn.Module):
    """What the Trainer trains: the linear modules, while a frozen model runs softmax in their place."""

    def __init__(self, model: nn.Module, students: Sequence[_Student]) -> None:
        super().__init__()
        self.model = model
        self.sites = nn.ModuleList(student.module for student in students)
        self._students = students
        self._takes_labels = is_encoder_decoder(model)
        # accelerate shards a model by these names.
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        self._keys_to_ignore_on_save = None

    def train(self, mode: bool = True) -> _Transfer:
        """Set the mode of the trained modules; the frozen model stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, **inputs: Any) -> dict[str, Tensor]:
        for student in self._students:
            student.losses.clear()
        if not self._takes_labels:  # an encoder-decoder makes the inputs of its decoder from them
            inputs.pop("labels", None)
        with torch.no_grad():
            self.model(**without_cache(self.model, inputs))
        silent = [i for i, student in enumerate(self._students) if not student.losses]
        if silent:
            raise InputError("the data never reaches some of the model's attention: give complete inputs")
        losses = [torch.stack(student.losses).mean() for student in self._students]
        # On short rows a parameter may not take part in the output: its gradient is then zero, not None.
        zero = torch.stack([parameter.sum() * 0 for parameter in self.sites.parameters()]).sum()
        return {"loss": torch.stack(losses).sum() + zero}

    def state_dict(self, *args: Any, **settings: Any) -> Any:
        """The trained modules alone, because the rest does not change."""
        if args or "destination" in settings:  # called for a part of a sharded model, which needs everything
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
