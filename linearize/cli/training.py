"""`linearize distill`: from a softmax model to a good linear one, by a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .before import check_extra, check_folder, check_report, check_resume, check_texts
from .options import SEEDS, Approximate, Augmentation, Data, Dtype, Option, given, option_values
from .results import save_or_rescue, stopping
from .session import bars
from .sources import (
    Source,
    copy_companions,
    find_source,
    load_model,
    load_source,
    load_tokenizer,
)
from .terminal import console


@dataclass(frozen=True)
class Changes:
    """What is to be converted otherwise than the recipe has it."""

    mechanism: Annotated[
        str | None, typer.Option(help="what takes the softmax's place; the recipe's unless said")
    ] = None
    option: Option = None
    augmentation: Augmentation = None
    approximate: Approximate = None

    def config(self, of_recipe: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's conversion with these changes; another mechanism takes none of its settings."""
        config = dict(of_recipe) if self.mechanism is None else {"mechanism": self.mechanism}
        return config | given(
            dict(
                options=option_values(self.option) if self.option else None,
                augmentation=self.augmentation,
                approximate=tuple(self.approximate) if self.approximate else None,
            )
        )


@dataclass(frozen=True)
class Tuning:
    """What is to be tuned otherwise than the recipe has it."""

    method: Annotated[
        str | None, typer.Option(help="what tuning trains: lora or full; the recipe's unless said")
    ] = None
    epochs: Annotated[float | None, typer.Option(help="times that tuning goes through the data")] = None
    max_steps: Annotated[int | None, typer.Option(help="steps of tuning, instead of epochs")] = None
    gradient_accumulation: Annotated[int | None, typer.Option(help="batches per step of tuning")] = None
    learning_rate: Annotated[float | None, typer.Option(help="of tuning, at its highest")] = None
    new_learning_rate: Annotated[
        float | None, typer.Option(help="of the parameters that conversion adds, in tuning")
    ] = None


@dataclass(frozen=True)
class Running:
    """How each stage of training runs."""

    batch_size: Annotated[int | None, typer.Option(help="rows per process and step")] = None
    checkpoints: Annotated[
        Path | None, typer.Option(help="folder for checkpoints while training, to go on from")
    ] = None
    save_steps: Annotated[int | None, typer.Option(help="steps between checkpoints; an epoch's end")] = None
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint")] = False
    bf16: Annotated[bool, typer.Option("--bf16", help="compute in bfloat16")] = False
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="less memory, more time")
    ] = False
    report_to: Annotated[str, typer.Option(help="where metrics go, such as tensorboard")] = "none"

    def settings(self) -> dict[str, Any]:
        """As `linearize.distill` takes them."""
        settings = given(dataclasses.asdict(self))
        checkpoints = settings.pop("checkpoints", None)
        return {**settings, "output_dir": checkpoints}

    def kept(self, out: Path) -> Callable[[], str]:
        """What is left of a training that was stopped, and how to go on."""

        def text() -> str:
            if self.checkpoints is None:
                return f"nothing was written to {out}; with --checkpoints DIR a stopped training can go on"
            if not any(self.checkpoints.glob("*/checkpoint-*")):
                return f"nothing was written to {out}, and there is no checkpoint yet; begin anew"
            return (
                f"nothing was written to {out}; the checkpoints in {self.checkpoints} are kept, and the same "
                "command with --resume goes on from the last one"
            )

        return text


def _placed(device: str | None) -> dict[str, Any]:
    """What keeps transformers' Trainer, which takes an accelerator where there is one, on the CPU."""
    return {"trainer_args": {"use_cpu": True}} if device == "cpu" else {}


TrainDevice = Annotated[
    str | None, typer.Option(help="cpu, or an accelerator; the accelerator unless said, where there is one")
]


def distill(
    source: Source,
    data: Data,
    out: Annotated[Path, typer.Option(help="the folder to write")],
    *,
    recipe: Annotated[str, typer.Option(help="quick, paper or lolcats-like")] = "quick",
    teacher: Annotated[
        str | None, typer.Option(help="the softmax original, if the model is converted already")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="tokens of the data to use; the recipe's number unless said")
    ] = None,
    context: Annotated[int | None, typer.Option(help="tokens per row; the recipe's unless said")] = None,
    changes: Changes,
    tuning: Tuning,
    running: Running,
    dtype: Dtype = "auto",
    device: TrainDevice = None,
    seed: Annotated[int, typer.Option(help="of the choice and the order of the data", **SEEDS)] = 0,
) -> None:
    """Convert a model, calibrate it, and train it by a recipe.

    On several GPUs or machines: `accelerate launch -m linearize distill ...`.
    """
    from ..checkpoint.saving import write_checkpoint
    from ..training import distill as train
    from ..training.files import read_files
    from ..training.recipes import recipe_of
    from ..training.trainer import is_main_process

    chosen = recipe_of(recipe)
    folder = find_source(source)
    check_folder(out, folder)
    check_texts(data)
    check_resume(running.resume, running.checkpoints)
    lora = chosen.tune is not None and (tuning.method or chosen.tune.get("method")) == "lora"
    check_extra("train", "accelerate", *(("peft",) if lora else ()))
    check_report(running.report_to)
    if teacher is not None:
        find_source(teacher)
    with stopping(running.kept(out)):
        model = load_model(source, dtype, device or "cpu")
        tokenizer = load_tokenizer(folder)
        most = chosen.tokens if tokens is None else tokens
        length = chosen.context(model) if context is None else context
        report = train(
            model,
            read_files(model, tokenizer, data, most, length, seed),
            recipe=chosen,
            tokenizer=tokenizer,
            teacher=None if teacher is None else load_source(find_source(teacher)),
            config=changes.config(chosen.config),
            tokens=most,
            context=length,
            progress=bars(),
            tune_settings=given(dataclasses.asdict(tuning)),
            seed=seed,
            **running.settings(),
            **_placed(device),
        )
        if is_main_process():
            console(120).print(report)
            save_or_rescue(
                lambda place: write_checkpoint(
                    model, place, lambda files: copy_companions(folder, files, place)
                ),
                out,
            )
            typer.echo(f"written to {out}")
