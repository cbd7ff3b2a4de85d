"""`distill`: a recipe from beginning to end."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from torch import nn

from ..calibration.calibrate import Calibration, calibrate
from ..convert.linearize import linearize
from ..errors import ConfigError, LinearizeError
from ..planning.state import LinearizeState
from .attention_transfer import transfer
from .data import Collate, Rows, is_encoder, is_pair, rows_of
from .recipes import Recipe, recipe_of
from .trainer import Stage, table_of
from .tuning import tune


@dataclass(frozen=True)
class Distillation:
    """What `distill` did. model: the one that was given, changed in place."""

    model: nn.Module
    stages: tuple[Stage, ...]
    calibration: Calibration | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield table_of(list(self.stages))


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
    progress: bool = False,
    transfer_settings: Mapping[str, Any] | None = None,
    tune_settings: Mapping[str, Any] | None = None,
    **run: Any,
) -> Distillation:
    """Convert `model` unless it is, then calibrate, transfer and tune it as `recipe` says, in place.

    recipe: a name of `RECIPES` or a `Recipe`. data, tokenizer: see `rows_of`. teacher: the softmax original,
    where the recipe learns from its answers, as an encoder without labels always does; a copy is kept when
    `model` is converted here, and only then is it calibrated. config: for the conversion, instead of the
    recipe's. tokens: most tokens of the data to use, instead of the recipe's number. context: tokens per row
    and calibrated sequence. output_dir, resume: checkpoints of the stages, in folders of their own
    below; going on, stages that were done are read and not repeated. run: fields of `Run` for both stages;
    transfer_settings, tune_settings: arguments of one of them.

    Raises what the stages raise, with the stage in the message; the model is as that stage found it.
    """
    recipe = recipe_of(recipe)
    length = recipe.context(model) if context is None else context
    shared = {**run, "context": length, "resume": resume, "progress": progress}
    # A stage without settings of its own is a stage too.
    transferring = _settings(recipe.transfer, shared, transfer_settings)
    tuning = _settings(recipe.tune, shared, tune_settings)
    converted = isinstance(vars(model).get("_linearize"), LinearizeState)
    with _stage("data"):
        rows = rows_of(model, data, tokenizer, length).first(recipe.tokens if tokens is None else tokens)
    if tuning is not None and is_encoder(model) and "labels" not in rows[0]:
        # There is nothing else to learn from.
        tuning = {**tuning, "distill_weight": tuning.get("distill_weight") or 1.0}
    if tuning is not None and tuning.get("distill_weight") and teacher is None:
        if converted:
            raise ConfigError(
                "this learns from the softmax original, which a converted model is no more: give teacher="
            )
        teacher = copy.deepcopy(model).eval()
    if not converted:
        with _stage("convert"), torch.random.fork_rng():
            torch.manual_seed(run.get("seed", 0))  # what is drawn is drawn alike by all processes
            linearize(model, config=recipe.config if config is None else config)
    calibration = None
    stages = []
    if recipe.calibrate and not converted:
        with _stage("calibrate"):
            calibration = calibrate(model, _batches(model, rows), max_tokens=recipe.calibrate)
    if transferring is not None:
        with _stage("transfer"):
            stages.append(transfer(model, rows, **transferring, **_folder(output_dir, "transfer")))
    if tuning is not None:
        with _stage("tune"):
            stages.append(tune(model, rows, teacher=teacher, **tuning, **_folder(output_dir, "tune")))
    return Distillation(model, tuple(stages), calibration)


def _settings(stage: Mapping[str, Any] | None, *more: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Those of a recipe's stage, overridden by `more`; None where the recipe leaves the stage out."""
    if stage is None:
        return None
    settings = dict(stage)
    for part in more:
        settings.update(part or {})
    return settings


@contextlib.contextmanager
def _stage(name: str) -> Iterator[None]:
    """Errors say which stage they are from."""
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


def _batches(model: nn.Module, rows: Rows) -> Iterator[dict[str, Any]]:
    """A few rows at a time, without labels where the model needs none to run."""
    collate = Collate.of(model)
    for i in range(0, len(rows), 2):
        batch = collate(rows.rows[i : i + 2])
        if not is_pair(model):
            batch.pop("labels", None)
        yield batch
