"""`linearize eval | lm-eval`: how good a model is, and how fast."""

from __future__ import annotations

import json as codec
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, InvalidModelError, MissingExtraError
from .options import numbers
from .sources import Source, find_source, hide_bars, is_demo, load_source, load_tokenizer, to_device
from .terminal import console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXTS = 1000
"""Lines of the data that an encoder compares: pairs grow with the square."""


def evaluate(
    source: Source,
    data: Annotated[
        list[Path],
        typer.Option(
            help="a text file, or a folder of them; repeat for several. An encoder takes each line as a text"
        ),
    ],
    reference: Annotated[
        str | None, typer.Option(help="the original, to compare with: a folder, a Hub name, or `demo`")
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(help="tokens of a context, such as 128,512,2048; what there is room for unless said"),
    ] = "",
    tokens: Annotated[int, typer.Option(help="tokens of the data to use")] = 32_768,
    speed: Annotated[bool, typer.Option(help="also take times and memory")] = True,
    name: Annotated[
        str | None, typer.Option(help="what to call the data in the card; its file names unless said")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the curves to this .png, .svg or .pdf")] = None,
    json: Annotated[Path | None, typer.Option(help="write the figures to this file")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="put the figures into the model's folder and its README.md")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: as stored")] = "auto",
    device: Annotated[str, typer.Option(help="where it runs, such as cpu or cuda")] = "cpu",
    seed: Annotated[int, typer.Option(help="of the choice of text")] = 0,
) -> None:
    """Measure a model, beside its original if given: perplexity by length, agreement, speed and memory."""
    from ..common.files import write_whole
    from ..common.text import text_lines, text_tokens
    from ..evaluation import evaluate as measure
    from ..evaluation.compared import kind_of
    from ..evaluation.perplexity import LENGTHS

    if card and dtype != "auto":
        raise ConfigError("--card is about the weights as they are stored: leave out --dtype")
    model = _load(source, dtype, device)
    if card:
        _check_card(source, model)
    other = None if reference is None else _load(reference, dtype, device)
    tokenizer = load_tokenizer(find_source(source))
    wanted = numbers(lengths, "lengths")
    kind = kind_of(model)
    if kind == "encoder-decoder":
        raise InvalidModelError(
            f"{source} is an encoder-decoder, which needs pairs of texts: call linearize.evaluate with dicts "
            "of its inputs and labels"
        )
    texts: list[Any]
    if kind == "decoder":
        texts = list(text_tokens(data, tokenizer, tokens, max(wanted or LENGTHS), seed))
    else:
        texts = text_lines(data, TEXTS)
    evaluation = measure(
        model,
        texts,
        reference=other,
        tokenizer=tokenizer,
        lengths=wanted,
        max_tokens=tokens,
        speed=speed,
        name=", ".join(path.name for path in data) if name is None else name,
    )
    console(160).print(evaluation)
    if json is not None:
        write_whole(json, codec.dumps(evaluation.to_dict(), indent=2) + "\n")
    if plot is not None:
        evaluation.plot(plot)
    if card:
        from ..evaluation.card import update_folder

        evaluation.attach(model)
        if not update_folder(model, Path(source)):
            typer.echo(f"{source}/README.md is not ours and stays; the figures are in config.json", err=True)


def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness, with all its own arguments; started here, it can read converted models."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise MissingExtraError(
            "lm-evaluation-harness is not installed: pip install 'linearize[eval]'"
        ) from error
    hide_bars()
    sys.argv = ["lm-eval", *context.args]
    cli_evaluate()


def _load(source: str, dtype: str, device: str) -> PreTrainedModel:
    # The demo is stored in bfloat16 and meant to run in float32, as `load_demo` has it.
    demo = dtype == "auto" and is_demo(source)
    return to_device(load_source(find_source(source), "float32" if demo else dtype), device)


def _check_card(source: str, model: PreTrainedModel) -> None:
    from ..planning.state import state_of

    if not Path(source).is_dir():
        raise ConfigError(f"--card writes into the model's folder, and {source} is none")
    state_of(model)
