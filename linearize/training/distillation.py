"""`distill`: converting and training a model by a recipe."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.calibrate import Calibration, calibrate
from ..common.tables import Grid, Printed
from ..convert.linearize import check_live, linearize
from ..errors import ConfigError, LinearizeError
from ..planning.state import LinearizeState
from .attention_transfer import transfer
from .data import Collate, TrainingData, is_encoder, is_encoder_decoder, training_data
from .recipes import Recipe, recipe_of
from .trainer import Stage, TrainingSettings, check_ready, table_of
from .tuning import check_method, tune


@dataclass(frozen=True)
class Distillation(Printed):
    """What `distill` did.

    Attributes:
        model: The model that was given, converted and trained in place.
        stages: The stages of training, in order.
        calibration: What calibration did; None where it was left out.
    """

    model: nn.Module = field(repr=False)
    stages: tuple[Stage, ...]
    calibration: Calibration | None = None

    def blocks(self) -> Iterator[Grid | str]:
        yield table_of(self.stages)


def distill(
    model: nn.Module,
    data: Any,
    *,
    recipe: str | Recipe = "quick",
    tokenizer: Any = None,
    teacher: nn.Module | None = None,
    config: Any = None,
    tokens: int | None = None,
    context: int | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool | None = None,
    transfer_settings: Mapping[str, Any] | None = None,
    tune_settings: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Distillation:
    """Convert a model unless it is converted already, then calibrate, transfer and tune it, in place.

    If a stage raises, the message names the stage, and the model is as that stage found it.

    Args:
        model: An unconverted or converted model. Only an unconverted one is calibrated.
        data: Token ids int64 `[n]` or `[B, n]`, a list of these, texts, or dicts of the model's keyword
            arguments.
        recipe: A name in `lz.RECIPES`, or a `lz.Recipe`.
        tokenizer: The tokenizer of the model; needed for texts.
        teacher: The softmax original, for recipes that learn from its answers, as an encoder without labels
            always does. If the model is converted here, a copy of it is the default.
        config: The settings of the conversion, instead of the recipe's.
        tokens: How many tokens of the data to use at most, instead of the recipe's number.
        context: Tokens per row and per calibrated sequence, instead of the recipe's number.
        output_dir: Folder for the checkpoints; each stage gets a folder inside it.
        resume: Continue from the checkpoints in `output_dir`; finished stages are loaded, not repeated.
        progress: Whether to show a progress bar; on terminals and in notebooks by default.
        transfer_settings: Arguments of `lz.transfer` for that stage alone.
        tune_settings: Arguments of `lz.tune` for that stage alone.
        **settings: Fields of `linearize.training.TrainingSettings` for both stages.

    Returns:
        The model, with the losses of each stage.

    Raises:
        LinearizeError: Whatever `lz.linearize`, `lz.calibrate`, `lz.transfer` and `lz.tune` raise.
        ConfigError: The recipe is unknown, or it needs a teacher for a model that is already converted.
    """
    recipe = recipe_of(recipe)
    check_live(model)
    length = recipe.context(model) if context is None else context
    shared = {**settings, "context": length, "resume": resume, "progress": progress}
    transferring = _settings(recipe.transfer, shared, transfer_settings)
    tuning = _settings(recipe.tune, shared, tune_settings)
    _check_stages(transferring, tuning, output_dir)
    unconverted = not isinstance(vars(model).get("_linearize"), LinearizeState)
    with _stage("data"):
        most = recipe.tokens if tokens is None else tokens
        rows = training_data(model, data, tokenizer, length).first(most)
    if tuning is not None:
        tuning, teacher = _teaching(model, rows, tuning, teacher, unconverted)
    if unconverted:
        with _stage("convert"), torch.random.fork_rng():
            torch.manual_seed(settings.get("seed", 0))  # the same random numbers in every process
            linearize(model, config=recipe.config if config is None else config, progress=progress)
    calibration = None
    stages = []
    if recipe.calibrate and unconverted:
        with _stage("calibrate"):
            calibration = calibrate(
                model, _batches(model, rows), max_tokens=recipe.calibrate, progress=progress
            )
    if transferring is not None:
        with _stage("transfer"):
            stages.append(transfer(model, rows, **transferring, **_folder(output_dir, "transfer")))
    if tuning is not None:
        with _stage("tune"):
            stages.append(tune(model, rows, teacher=teacher, **tuning, **_folder(output_dir, "tune")))
    return Distillation(model, tuple(stages), calibration)


def _check_stages(
    transferring: Mapping[str, Any] | None, tuning: Mapping[str, Any] | None, output_dir: str | Path | None
) -> None:
    """Raise what the stages would raise of their settings, before the work of those before them."""
    for name, stage, given in (("transfer", transfer, transferring), ("tune", tune, tuning)):
        if given is None:
            continue
        own = inspect.signature(stage).parameters
        with _stage(name):
            fields = {key: value for key, value in given.items() if key not in own}
            check_ready(TrainingSettings.of({**fields, **_folder(output_dir, name)}))
            if "method" in own:
                check_method(given.get("method", own["method"].default), given.get("lora"))


def _teaching(
    model: nn.Module,
    rows: TrainingData,
    tuning: dict[str, Any],
    teacher: nn.Module | None,
    unconverted: bool,
) -> tuple[dict[str, Any], nn.Module | None]:
    """The settings of tuning, and the teacher that they need, if any."""
    if is_encoder(model) and "labels" not in rows[0]:
        # There is nothing else to learn from.
        tuning = {**tuning, "distill_weight": tuning.get("distill_weight") or 1.0}
    if tuning.get("distill_weight") and teacher is None:
        if not unconverted:
            raise ConfigError(
                "this learns from the softmax original, which a converted model is no longer: give teacher="
            )
        teacher = copy.deepcopy(model).eval()
    return tuning, teacher


def _settings(stage: Mapping[str, Any] | None, *more: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The settings of a stage of a recipe, overridden by `more`; None where the recipe leaves it out."""
    if stage is None:
        return None
    settings = dict(stage)
    for part in more:
        settings.update(part or {})
    return settings


@contextlib.contextmanager
def _stage(name: str) -> Iterator[None]:
    """Let errors say in which stage they happened."""
    try:
        yield
    except LinearizeError as error:
        error.args = (f"{name}: {error}", *error.args[1:])
        raise
    except Exception as error:
        error.add_note(f"in the stage {name!r} of distill")
        raise


def _folder(output_dir: str | Path | None, name: str) -> dict[str, Any]:
    return {} if output_dir is None else {"output_dir": Path(output_dir) / name}


def _batches(model: nn.Module, rows: TrainingData) -> Iterator[dict[str, Any]]:
    """Batches of two rows, without labels where the model runs without."""
    collate = Collate.of(model)
    for i in range(0, len(rows), 2):
        batch = collate(rows.rows[i : i + 2])
        if not is_encoder_decoder(model):
            batch.pop("labels", None)
        yield batch
