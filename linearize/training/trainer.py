"""transformers' Trainer with our settings and guards: two learning rates, losses that must be numbers, and
checkpoints that are whole or not there."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

from ..errors import ConfigError, MissingExtraError, TrainingError
from ..rewrite.snapshot import Kept, trained_values
from .checkpoints import newest_checkpoint
from .data import Collate, Rows

_EVALUATIONS = 32
"""Rows at most that the loss is measured on, unless `held_out` asks for a larger share."""


@dataclass(frozen=True)
class Run:
    """How a stage is trained; what `transfer` and `tune` take as keyword arguments.

    epochs: times the data is gone through. max_steps: optimizer steps instead of epochs.
    batch_size: rows per process and step; gradient_accumulation: batches per optimizer step.
    learning_rate: the highest, of AdamW; new_learning_rate: of the parameters that conversion added, which
    start near zero and have far to go (None: the same). warmup: share of the steps in which the rate rises,
    after which `schedule` (a name of transformers' `SchedulerType`) takes it down. weight_decay;
    max_grad_norm: gradients are clipped to it.
    bf16: compute in bfloat16. gradient_checkpointing: compute activations twice instead of keeping them.
    held_out: share of the rows, the last, that is not trained on and gives the loss before and after.
    output_dir: where checkpoints go, every `save_steps` optimizer steps (None: at each epoch's end) and at
    the end, of which the newest `save_total_limit` are kept; without it there are none. resume: go on from
    the newest complete one; from the start when there is none.
    progress: show a bar. report_to: Trainer's, such as "tensorboard". seed: of the order of the rows.
    trainer_args: anything else of `TrainingArguments`, which goes before what is said here.
    """

    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    new_learning_rate: float | None = None
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    held_out: float = 0.02
    output_dir: str | Path | None = None
    save_steps: int | None = None
    save_total_limit: int = 2
    resume: bool = False
    progress: bool = False
    report_to: Any = "none"
    logging_steps: int = 10
    seed: int = 0
    trainer_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "save_total_limit", "logging_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(self.epochs > 0, "epochs", self.epochs, "above 0")
        for name in ("max_steps", "save_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "1 or more, or None")
        for name in ("learning_rate", "new_learning_rate"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, name, value, "a number above 0")
        _require(0 <= self.warmup < 1, "warmup", self.warmup, "a share of the steps, 0 or more and below 1")
        _require(0 <= self.held_out < 1, "held_out", self.held_out, "a share of the rows, below 1")
        if self.resume and self.output_dir is None:
            raise ConfigError("resume goes on from a checkpoint in output_dir: name that")

    @classmethod
    def of(cls, settings: Mapping[str, Any], **defaults: Any) -> Run:
        """From keyword arguments. Raises ConfigError for one that is unknown."""
        known = {one.name for one in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(
                f"unknown setting(s) {', '.join(unknown)}; there are {', '.join(sorted(known))}"
            )
        return cls(**{**defaults, **settings})


@dataclass(frozen=True)
class Stage:
    """One stage of training as it went.

    tokens: that were trained on, repetitions counted. before, after: the loss on held-out rows (on the first
    training rows where none could be held out). model: what was trained.
    """

    name: str
    tokens: int
    steps: int
    seconds: float
    before: float
    after: float
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield table_of([self])


def table_of(stages: list[Stage]) -> Table:
    table = Table("stage", "tokens", "steps", "seconds", "loss before", "after")
    for stage in stages:
        numbers = (f"{stage.before:.4g}", f"{stage.after:.4g}")
        table.add_row(stage.name, f"{stage.tokens:,}", f"{stage.steps:,}", f"{stage.seconds:.1f}", *numbers)
    return table


def train(
    name: str,
    module: nn.Module,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor],
    is_new: Callable[[str], bool],
    rows: Rows,
    collate: Collate,
    run: Run,
) -> Stage:
    """Train the parameters of `module` that require gradients, in place.

    loss: of `module`, possibly wrapped, and a batch. is_new: by a parameter's name, whether it learns at
    `new_learning_rate`. Raises TrainingError, as `tune` says; the module is then as it was.
    """
    trainer_class, arguments_class = _trainer_classes()
    training, held_out = rows.split(run.held_out)
    if run.held_out == 0:
        training, held_out = rows, Rows(rows.rows[:_EVALUATIONS])
    elif len(held_out) > _EVALUATIONS and run.held_out <= Run.held_out:
        held_out = Rows(held_out.rows[-_EVALUATIONS:])
    with contextlib.ExitStack() as stack:
        if run.output_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = Path(run.output_dir)
        checkpoint = newest_checkpoint(folder) if run.resume else None
        arguments = _arguments(arguments_class, run, folder)
        if run.output_dir is not None:
            _check_folder(folder, run.resume)
        kept = Kept(module)
        try:
            trainer = trainer_class(
                module,
                arguments,
                train_dataset=training,
                eval_dataset=held_out,
                data_collator=collate,
                objective=loss,
                is_new=is_new,
                new_learning_rate=run.new_learning_rate or run.learning_rate,
            )
            if not run.progress:
                _silence(trainer)
            began = time.perf_counter()
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            after = trainer.evaluate()["eval_loss"]
            seconds = time.perf_counter() - began
            values = trained_values(trainer)
        except BaseException:
            kept.undo()
            raise
        kept.take(values)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    epochs = trainer.state.epoch or 0.0
    return Stage(name, round(training.tokens * epochs), trainer.state.global_step, seconds, losses[0], after)


def is_main_process() -> bool:
    """Whether this is the one process, of those that a launcher started, that writes and prints."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def _check_folder(folder: Path, resume: bool) -> None:
    if not resume and newest_checkpoint(folder) is not None:
        raise ConfigError(
            f"{folder} holds checkpoints of an earlier run: go on from them with resume=True, or name "
            "another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"checkpoints cannot be written to {folder}: {error}") from error


def _arguments(arguments_class: Any, run: Run, folder: Path) -> Any:
    saves = "no" if run.output_dir is None else "steps" if run.save_steps else "epoch"
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        num_train_epochs=run.epochs,
        max_steps=run.max_steps or -1,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation,
        learning_rate=run.learning_rate,
        lr_scheduler_type=run.schedule,
        warmup_steps=run.warmup,
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
        bf16=run.bf16,
        activation_checkpointing=run.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if run.gradient_checkpointing else None,
        eval_on_start=True,
        eval_strategy="no",
        prediction_loss_only=True,
        save_strategy=saves,
        save_steps=run.save_steps or 500,
        save_total_limit=run.save_total_limit,
        logging_steps=run.logging_steps,
        disable_tqdm=not run.progress,
        report_to=run.report_to,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Said, because processes that a launcher started on a machine without an accelerator do not find each
        # other otherwise: each would train alone.
        use_cpu=not torch.accelerator.is_available(),
        seed=run.seed,
    )
    try:
        return arguments_class(**{**settings, **run.trainer_args})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"transformers' TrainingArguments refuse these settings: {error}") from error


def _silence(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _trainer_classes() -> tuple[Any, Any]:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("training needs the extra `train`: pip install 'linearize[train]'") from error
    from transformers import TrainingArguments

    from .guarded import GuardedTrainer

    return GuardedTrainer, TrainingArguments


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {expected}, got {value!r}")
