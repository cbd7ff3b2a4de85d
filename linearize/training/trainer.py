"""One stage of training on transformers' Trainer: its settings, how it runs, and what it reports."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.checkpoints import newest_checkpoint
from ..common.checks import require_number, require_whole, unknown
from ..common.progress import shows
from ..common.running import shortened
from ..common.tables import Grid, Printed
from ..errors import ConfigError, MissingExtraError, TrainingError
from ..rewrite.snapshot import Snapshot
from .data import Collate, TrainingData

_EVALUATIONS = 32
"""The most rows that the loss is measured on, unless `held_out` asks for a larger share."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a stage is trained; `lz.transfer` and `lz.tune` take these fields as keyword arguments.

    Attributes:
        epochs: How often the data is gone through.
        max_steps: The number of optimizer steps, instead of `epochs`.
        batch_size: Rows per process and step.
        gradient_accumulation: Batches per optimizer step.
        learning_rate: The highest learning rate of AdamW.
        new_learning_rate: That of the parameters that conversion added, which start near zero and have far to
            go; None for the same.
        warmup: The share of the steps in which the learning rate rises.
        schedule: How it falls afterwards: a name of transformers' `SchedulerType`.
        weight_decay: That of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        bf16: Compute in bfloat16.
        gradient_checkpointing: Compute activations twice instead of storing them.
        held_out: The share of the rows, the last ones, that is not trained on and gives the losses before and
            after.
        output_dir: Folder for checkpoints; None writes none.
        save_steps: Optimizer steps between checkpoints; None writes one at the end of each epoch.
        save_total_limit: How many checkpoints are kept, the newest ones.
        resume: Continue from the newest complete checkpoint in `output_dir`, or start if there is none.
        progress: Whether to show a progress bar; on terminals and in notebooks by default.
        report_to: That of `TrainingArguments`, such as "tensorboard".
        logging_steps: Optimizer steps between logged losses.
        seed: Seed of the order of the rows.
        trainer_args: Other fields of `TrainingArguments`; they override the settings here.
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
    progress: bool | None = None
    report_to: Any = "none"
    logging_steps: int = 10
    seed: int = 0
    trainer_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "save_total_limit", "logging_steps"):
            require_whole(name, getattr(self, name))
        for name in ("max_steps", "save_steps"):
            require_whole(name, getattr(self, name), optional=True)
        for name in ("epochs", "learning_rate", "new_learning_rate"):
            value = getattr(self, name)
            fine = name == "new_learning_rate"
            require_number(name, value, "a number above 0", lambda x: 0 < x < math.inf, optional=fine)
        for name, of in (("warmup", "steps"), ("held_out", "rows")):
            share = f"a share of the {of}, 0 or more and below 1"
            require_number(name, getattr(self, name), share, lambda x: 0 <= x < 1)
        if self.resume and self.output_dir is None:
            raise ConfigError("resume continues from a checkpoint in output_dir: give output_dir=")

    @classmethod
    def of(cls, settings: Mapping[str, Any], **defaults: Any) -> TrainingSettings:
        """Make settings from keyword arguments. Raises ConfigError for an unknown one."""
        known = [one.name for one in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(unknown("setting", name, known))
        return cls(**{**defaults, **settings})


@dataclass(frozen=True)
class Stage(Printed):
    """What one stage of training did.

    Attributes:
        name: "transfer" or "tune".
        tokens: How many tokens it was trained on, repetitions included.
        steps: Optimizer steps.
        seconds: Time, with the measurement of the losses.
        before: The loss on held-out rows before training; on the first training rows where none are held out.
        after: The loss on the same rows afterwards.
        model: The trained model.
    """

    name: str
    tokens: int
    steps: int
    seconds: float
    before: float
    after: float
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def blocks(self) -> Iterator[Grid | str]:
        yield table_of([self])


def table_of(stages: Sequence[Stage]) -> Grid:
    rows = [
        (x.name, f"{x.tokens:,}", f"{x.steps:,}", f"{x.seconds:.1f}", f"{x.before:.4g}", f"{x.after:.4g}")
        for x in stages
    ]
    return Grid(("stage", "tokens", "steps", "seconds", "loss before", "after"), rows)


def train(
    name: str,
    module: nn.Module,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor],
    is_new: Callable[[str], bool],
    rows: TrainingData,
    collate: Collate,
    settings: TrainingSettings,
) -> Stage:
    """Train the parameters of `module` that require gradients, in place.

    Args:
        name: The name of the stage.
        module: What is trained. If this raises, it is as it was before.
        loss: The loss of a batch, from `module` (which may be wrapped) and the batch.
        is_new: Says by a parameter's name whether it learns at `new_learning_rate`.
        rows: The data, held-out rows included.
        collate: Joins rows to a batch.
        settings: The settings of the stage.

    Raises:
        TrainingError: The loss is not finite, or a checkpoint cannot be written.
        ConfigError: `output_dir` has checkpoints of another run, or `TrainingArguments` refuse a setting.
        MissingExtraError: accelerate is not installed.
    """
    trainer_class, arguments_class = _trainer_classes()
    training, held_out = _split(rows, settings)
    with contextlib.ExitStack() as stack:
        if settings.output_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = Path(settings.output_dir)
        checkpoint = newest_checkpoint(folder) if settings.resume else None
        arguments = _arguments(arguments_class, settings, folder)
        if settings.output_dir is not None:
            _check_folder(folder, settings.resume)
        trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        with Snapshot(module, keep="values") as before:
            trainer = trainer_class(
                module,
                arguments,
                train_dataset=training,
                eval_dataset=held_out,
                data_collator=collate,
                objective=loss,
                is_new=is_new,
                new_learning_rate=settings.new_learning_rate or settings.learning_rate,
            )
            if not shows(settings.progress):
                _silence(trainer)
            began = time.perf_counter()
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            after = trainer.evaluate()["eval_loss"]
            seconds = time.perf_counter() - began
            values = _parameters(trainer)
        before.restore({name: values[name] for name in trained})
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    epochs = trainer.state.epoch or 0.0
    return Stage(name, round(training.tokens * epochs), trainer.state.global_step, seconds, losses[0], after)


def _split(rows: TrainingData, settings: TrainingSettings) -> tuple[TrainingData, TrainingData]:
    """The rows to train on, and the rows to measure the loss on."""
    if settings.held_out == 0:
        return rows, TrainingData(rows.rows[:_EVALUATIONS])
    training, held_out = rows.split(settings.held_out)
    if len(held_out) > _EVALUATIONS and settings.held_out <= TrainingSettings.held_out:
        held_out = TrainingData(held_out.rows[-_EVALUATIONS:])
    return training, held_out


def _parameters(trainer: Any) -> dict[str, Tensor]:
    """The parameters of a Trainer's model by name; complete in every process even if they are sharded."""
    if not trainer.is_fsdp_enabled:
        return {name: p.data for name, p in trainer.model.named_parameters()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found: dict[str, Any] = get_model_state_dict(
        trainer.model, options=StateDictOptions(full_state_dict=True)
    )
    return found


def is_main_process() -> bool:
    """Whether this is the one of a launcher's processes that writes files and prints."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def check_ready(settings: TrainingSettings) -> None:
    """Raise what `train` would raise of its settings, before there is anything to train.

    Raises ConfigError, TrainingError or MissingExtraError.
    """
    _, arguments_class = _trainer_classes()
    _arguments(arguments_class, settings, Path(settings.output_dir or tempfile.gettempdir()))
    if settings.output_dir is not None:
        _check_folder(Path(settings.output_dir), settings.resume)


def _check_folder(folder: Path, resume: bool) -> None:
    if not resume and newest_checkpoint(folder) is not None:
        raise ConfigError(
            f"{folder} has checkpoints of an earlier run: continue from them with resume=True, or name "
            "another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"checkpoints cannot be written to {folder}: {error}") from error


def _arguments(arguments_class: Any, settings: TrainingSettings, folder: Path) -> Any:
    saves = "no" if settings.output_dir is None else "steps" if settings.save_steps else "epoch"
    chosen: dict[str, Any] = dict(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        eval_on_start=True,
        eval_strategy="no",
        prediction_loss_only=True,
        save_strategy=saves,
        save_steps=settings.save_steps or 500,
        save_total_limit=settings.save_total_limit,
        logging_steps=settings.logging_steps,
        disable_tqdm=not shows(settings.progress),
        report_to=settings.report_to,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Without this, the processes of a launcher on a machine without an accelerator do not find each
        # other, and each of them trains alone.
        use_cpu=not torch.accelerator.is_available(),
        seed=settings.seed,
    )
    _check_names(arguments_class, settings)
    try:
        return arguments_class(**{**chosen, **settings.trainer_args})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"transformers' TrainingArguments refuse these settings: {shortened(error, 200)}"
        ) from error


def _check_names(arguments_class: Any, settings: TrainingSettings) -> None:
    """Raise ConfigError for a schedule, a field or a place for metrics that transformers does not know."""
    from transformers import SchedulerType

    schedules = [kind.value for kind in SchedulerType]
    if settings.schedule not in schedules:
        raise ConfigError(unknown("schedule", settings.schedule, schedules), "schedule")
    for name in settings.trainer_args:
        if name not in inspect.signature(arguments_class).parameters:
            fields = [field.name for field in dataclasses.fields(arguments_class)]
            raise ConfigError(f"trainer_args: {unknown('field of TrainingArguments', name, fields)}")
    check_report(settings.report_to)


def check_report(names: Any) -> None:
    """Raise ConfigError unless metrics can be sent to what is named, as transformers' Trainer does."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as known

    for name in [names] if isinstance(names, str) else names:
        if name not in ("none", "all", *known):
            raise ConfigError(unknown("report_to", name, ("none", "all", *sorted(known))), "report_to")


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
