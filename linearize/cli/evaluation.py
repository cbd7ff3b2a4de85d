"""`linearize eval | lm-eval`: how good a model is, and how fast."""

from __future__ import annotations

import json as codec
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, InvalidModelError, MissingExtraError
from .options import Device, Dtype, numbers
from .sources import Source, find_source, hide_bars, load_model, load_tokenizer
from .terminal import console

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation import Evaluation

TEXTS = 1000
"""Lines of the data that an encoder compares: pairs grow with the square."""


@dataclass(frozen=True)
class Outputs:
    """Where the figures go besides the terminal."""

    name: Annotated[
        str | None, typer.Option(help="what to call the data in the card; its file names unless said")
    ] = None
    plot: Annotated[Path | None, typer.Option(help="draw the curves to this .png, .svg or .pdf")] = None
    json: Annotated[Path | None, typer.Option(help="write the figures to this file")] = None
    card: Annotated[
        bool, typer.Option("--card", help="put the figures into the model's folder and its README.md")
    ] = False

    def check(self, source: str, model: PreTrainedModel) -> None:
        """Raises ConfigError or InvalidModelError where a card cannot be written: before all measuring."""
        from ..planning.state import state_of

        if self.card:
            if not Path(source).is_dir():
                raise ConfigError(f"--card writes into the model's folder, and {source} is none")
            state_of(model)

    def write(self, evaluation: Evaluation, source: str, model: PreTrainedModel) -> None:
        """Write what was asked for; the terminal has the table already."""
        from ..common.files import write_whole

        if self.json is not None:
            write_whole(self.json, codec.dumps(evaluation.to_dict(), indent=2) + "\n")
        if self.plot is not None:
            evaluation.plot(self.plot)
        if self.card:
            from ..evaluation.card import update_folder

            evaluation.attach(model)
            if not update_folder(model, Path(source)):
                typer.echo(
                    f"{source}/README.md is not ours and stays; the figures are in config.json", err=True
                )


def evaluate(
    source: Source,
    data: Annotated[
        list[Path],
        typer.Option(
            help="a text file, or a folder of them; repeat for several. An encoder takes each line as a text"
        ),
    ],
    *,
    reference: Annotated[
        str | None, typer.Option(help="the original, to compare with: a folder, a Hub name, or `demo`")
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(help="tokens of a context, such as 128,512,2048; what there is room for unless said"),
    ] = "",
    tokens: Annotated[int, typer.Option(help="tokens of the data to use")] = 32_768,
    speed: Annotated[bool, typer.Option(help="also take times and memory")] = True,
    outputs: Outputs,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="of the choice of text")] = 0,
) -> None:
    """Measure a model, beside its original if given: perplexity by length, agreement, speed and memory."""
    from ..evaluation import evaluate as measure

    if outputs.card and dtype != "auto":
        raise ConfigError("--card is about the weights as they are stored: leave out --dtype")
    model = load_model(source, dtype, device)
    outputs.check(source, model)
    other = None if reference is None else load_model(reference, dtype, device)
    tokenizer = load_tokenizer(find_source(source))
    wanted = numbers(lengths, "lengths")
    evaluation = measure(
        model,
        _texts(model, source, tokenizer, data, tokens, wanted, seed),
        reference=other,
        tokenizer=tokenizer,
        lengths=wanted,
        max_tokens=tokens,
        speed=speed,
        name=", ".join(path.name for path in data) if outputs.name is None else outputs.name,
    )
    console(160).print(evaluation)
    outputs.write(evaluation, source, model)


def _texts(
    model: PreTrainedModel,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    data: list[Path],
    tokens: int,
    lengths: tuple[int, ...] | None,
    seed: int,
) -> list[Any]:
    """What the model is measured on: token ids of a decoder's files, the lines of an encoder's."""
    from ..common.text import text_lines, text_tokens
    from ..evaluation.compared import kind_of
    from ..evaluation.perplexity import LENGTHS

    kind = kind_of(model)
    if kind == "encoder-decoder":
        raise InvalidModelError(
            f"{source} is an encoder-decoder, which needs pairs of texts: call linearize.evaluate with dicts "
            "of its inputs and labels"
        )
    if kind == "encoder":
        return list(text_lines(data, TEXTS))
    return list(text_tokens(data, tokenizer, tokens, max(lengths or LENGTHS), seed))


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
