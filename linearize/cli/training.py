"""`linearize distill`: from a softmax model to a good linear one, by a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CheckpointError
from .options import Approximate, Augmentation, Option, option_values
from .sources import Source, check_target, copy_companions, find_source, is_demo, load_source, load_tokenizer
from .terminal import console


def distill(
    source: Source,
    data: Annotated[
        list[Path],
        typer.Option(
            help="a text file, or a folder of them; repeat for several. An encoder takes each line as a "
            "text, an encoder-decoder lines of JSON with input and target"
        ),
    ],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    recipe: Annotated[str, typer.Option(help="quick, paper or lolcats-like")] = "quick",
    teacher: Annotated[
        str | None, typer.Option(help="the softmax original, if the model is converted already")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="tokens of the data to use; the recipe's number unless said")
    ] = None,
    context: Annotated[int | None, typer.Option(help="tokens per row; the recipe's unless said")] = None,
    mechanism: Annotated[
        str | None, typer.Option(help="what takes the softmax's place; the recipe's unless said")
    ] = None,
    option: Option = None,
    augmentation: Augmentation = None,
    approximate: Approximate = None,
    method: Annotated[
        str | None, typer.Option(help="what tuning trains: lora or full; the recipe's unless said")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="times that tuning goes through the data")] = None,
    max_steps: Annotated[int | None, typer.Option(help="steps of tuning, instead of epochs")] = None,
    batch_size: Annotated[int | None, typer.Option(help="rows per process and step")] = None,
    gradient_accumulation: Annotated[int | None, typer.Option(help="batches per step of tuning")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="of tuning, at its highest")] = None,
    new_learning_rate: Annotated[
        float | None, typer.Option(help="of the parameters that conversion adds, in tuning")
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="folder for checkpoints while training, to go on from")
    ] = None,
    save_steps: Annotated[int | None, typer.Option(help="steps between checkpoints; an epoch's end")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="compute in bfloat16")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="less memory, more time")
    ] = False,
    report_to: Annotated[str, typer.Option(help="where metrics go, such as tensorboard")] = "none",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: as stored")] = "auto",
    seed: Annotated[int, typer.Option(help="of the choice and the order of the data")] = 0,
) -> None:
    """Convert a model, calibrate it, and train it by a recipe.

    On several GPUs or machines: `accelerate launch -m linearize distill ...`.
    """
    from ..checkpoint.saving import save
    from ..training import distill as train
    from ..training.files import read_files
    from ..training.recipes import recipe_of
    from ..training.trainer import is_main_process

    folder = find_source(source)
    if out.resolve() == folder.resolve():
        raise CheckpointError(f"{out} is the model to start from; write to another folder")
    check_target(out)
    chosen = recipe_of(recipe)
    # The demo is stored in bfloat16 and meant to run in float32, as `load_demo` has it.
    model = load_source(folder, "float32" if dtype == "auto" and is_demo(source) else dtype)
    tokenizer = load_tokenizer(folder)
    most = chosen.tokens if tokens is None else tokens
    length = chosen.context(model) if context is None else context
    config = dict(chosen.config)
    if mechanism is not None:
        config = {"mechanism": mechanism}
    given: dict[str, Any] = dict(
        options=option_values(option) if option else None,
        augmentation=augmentation,
        approximate=tuple(approximate) if approximate else None,
    )
    config |= {name: value for name, value in given.items() if value is not None}
    tuning: dict[str, Any] = dict(
        method=method,
        epochs=epochs,
        max_steps=max_steps,
        gradient_accumulation=gradient_accumulation,
        learning_rate=learning_rate,
        new_learning_rate=new_learning_rate,
    )
    shared: dict[str, Any] = dict(batch_size=batch_size, save_steps=save_steps)
    report = train(
        model,
        read_files(model, tokenizer, data, most, length, seed),
        recipe=chosen,
        tokenizer=tokenizer,
        teacher=None if teacher is None else load_source(find_source(teacher)),
        config=config,
        tokens=most,
        context=length,
        output_dir=checkpoints,
        resume=resume,
        progress=sys.stderr.isatty(),
        tune_settings={name: value for name, value in tuning.items() if value is not None},
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        report_to=report_to,
        seed=seed,
        **{name: value for name, value in shared.items() if value is not None},
    )
    if is_main_process():
        console(120).print(report)
        save(model, out)
        copy_companions(folder, out)
        typer.echo(f"written to {out}")
