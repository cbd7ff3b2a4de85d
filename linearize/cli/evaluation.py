"""`linearize eval | lm-eval`: how good a model is, and how fast."""

from __future__ import annotations

import json as codec
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.files import write_whole
from ..common.replacing import read_entry
from ..errors import ConfigError, InvalidModelError, LinearizeError, MissingExtraError
from .before import check_file, check_folder, check_plot, check_texts
from .options import SEEDS, Device, Dtype, numbers
from .results import stopping
from .session import bars
from .sources import Source, find_source, hide_bars, load_model, load_tokenizer
from .terminal import console

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.recall import Recall

TEXTS = 1000
"""Lines of the data that an encoder compares: pairs grow with the square."""


@dataclass(frozen=True)
class More:
    """What else is measured of a decoder."""

    parts: Annotated[
        bool,
        typer.Option("--parts", help="also what each part of a converted decoder gives, added one by one"),
    ] = False
    recall: Annotated[
        bool,
        typer.Option(
            "--recall",
            help="whether it finds again what stood far back, in 4096 tokens or the longest of --lengths",
        ),
    ] = False

    def check_data(self, data: list[Path] | None) -> None:
        """Raise ConfigError where there is nothing to measure on: before a model is loaded."""
        if not data and not self.recall:
            raise ConfigError("there is nothing to measure on: give --data; only --recall needs none")
        if not data and self.parts:
            raise ConfigError("--parts needs --data")

    def check(self, model: PreTrainedModel) -> None:
        """Raise InvalidModelError for what cannot be measured of a model: before all measuring."""
        from ..evaluation.compared import kind_of
        from ..planning.state import state_of

        if self.parts:
            state_of(model)  # raises for a model that is not converted
        if (self.parts or self.recall) and kind_of(model) != "decoder":
            raise InvalidModelError(f"--parts and --recall are for decoders; this is an {kind_of(model)}")


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

    def check(self, source: str, data: list[Path] | None, lengths: tuple[int, ...] | None) -> None:
        """Raise a LinearizeError where something cannot be written: before a model is loaded."""
        if self.plot is not None and not data:
            raise ConfigError("--plot needs --data")
        if self.plot is not None and lengths is not None and len(set(lengths)) < 2:
            raise ConfigError("--plot draws curves against length: give two --lengths or more")
        check_plot(self.plot)
        check_file(self.json)
        if self.card:
            if not Path(source).is_dir():
                raise ConfigError(f"--card writes into the model's folder, and {source} is none")
            check_folder(Path(source))
            record = read_entry(Path(source) / "config.json", "linearize")
            if record is None:
                raise InvalidModelError(
                    f"--card is for converted models, and {source} is not converted; "
                    "`linearize convert` makes one"
                )

    def write(self, found: Mapping[str, Any], source: str, model: PreTrainedModel) -> None:
        """Write what was asked for; the terminal has the tables already.

        found: "evaluation", "parts" and "recall", those that there are. The file has the first as it is, and
        the others under their names beside it.
        """
        problems = []
        for write in (self._write_json, self._write_plot, self._write_card):
            try:
                write(found, source, model)
            except LinearizeError as error:  # one that cannot be written is no reason to lose the others
                problems.append(error)
        if problems:
            raise problems[0]

    def _write_json(self, found: Mapping[str, Any], source: str, model: PreTrainedModel) -> None:
        if self.json is not None:
            parts = {name: result.to_dict() for name, result in found.items()}
            data = {**parts.pop("evaluation", {}), **parts}
            write_whole(self.json, codec.dumps(data, indent=2) + "\n")

    def _write_plot(self, found: Mapping[str, Any], source: str, model: PreTrainedModel) -> None:
        if self.plot is not None and "evaluation" in found:
            found["evaluation"].plot(self.plot)

    def _write_card(self, found: Mapping[str, Any], source: str, model: PreTrainedModel) -> None:
        if self.card:
            from ..evaluation.card import update_folder

            for result in found.values():
                result.attach(model)
            if not update_folder(model, Path(source)):
                typer.echo(
                    f"{source}/README.md is not ours and stays; the figures are in config.json", err=True
                )


def evaluate(
    source: Source,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="a text file, or a folder of them; repeat for several. An encoder takes each line as a text"
        ),
    ] = None,
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
    more: More,
    outputs: Outputs,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="of the choice of text", **SEEDS)] = 0,
) -> None:
    """Measure a model, beside its original if given: perplexity by length, agreement, speed and memory."""
    from ..evaluation import evaluate as measure

    if outputs.card and dtype != "auto":
        raise ConfigError("--card is about the weights as they are stored: leave out --dtype")
    wanted = numbers(lengths, "lengths")
    outputs.check(source, data, wanted)
    check_texts(data)
    more.check_data(data)
    if reference is not None:
        find_source(reference)
    model = load_model(source, dtype, device)
    more.check(model)
    other = None if reference is None else load_model(reference, dtype, device)
    tokenizer = load_tokenizer(find_source(source))
    shared: dict[str, Any] = dict(reference=other, tokenizer=tokenizer, lengths=wanted, max_tokens=tokens)
    found: dict[str, Any] = {}

    def tell(name: str, result: Any) -> None:
        found[name] = result
        console(160).print(result)

    with stopping(lambda: _measured_so_far(found, outputs, source, model)):
        if data:
            shared["name"] = ", ".join(path.name for path in data) if outputs.name is None else outputs.name
            texts = _texts(model, source, tokenizer, data, tokens, wanted, seed)
            tell("evaluation", measure(model, texts, **shared, speed=speed, progress=bars()))
            if more.parts:
                from ..convert.parts import measure_parts

                tell("parts", measure_parts(model, texts, **shared))
        if more.recall:
            tell("recall", _recalled(model, tokenizer, other, wanted, seed))
    outputs.write(found, source, model)


def _measured_so_far(found: Mapping[str, Any], outputs: Outputs, source: str, model: PreTrainedModel) -> str:
    """Write what was measured before a stop, and say so."""
    if not found:
        return "nothing was measured yet, so nothing was written"
    outputs.write(found, source, model)
    return f"what was measured until now ({', '.join(found)}) is written; the rest is not"


def _recalled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: PreTrainedModel | None,
    lengths: tuple[int, ...] | None,
    seed: int,
) -> Recall:
    """At the longest of the lengths, or at 4096 tokens where the models have room for as many."""
    from ..evaluation.compared import positions
    from ..evaluation.recall import recall

    room = min(positions(live) for live in (model, reference) if live is not None)
    length = max(lengths) if lengths else min(4096, room)
    return recall(model, tokenizer, reference, length=length, seed=seed, progress=bars())


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
