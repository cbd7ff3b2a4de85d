"""`linearize generate | train-heads`: texts from decoders, and what drafts them."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import ConfigError, InputError
from .before import check_extra, check_folder, check_resume, check_texts
from .options import SEEDS, Device, Dtype
from .results import save_or_rescue, stopping
from .session import bars
from .sources import find_source, is_demo, load_decoder, load_source, to_device
from .terminal import console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..generation.run import GenerationStats
    from ..generation.speculative import MedusaHeads, TreeSpeculation


Decoder = Annotated[
    str, typer.Argument(help="a folder with a decoder, converted or not, or `demo`, converted on the way")
]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: Annotated[int, typer.Option(help="tokens to stop after")] = 128
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; above: sampled")] = 0.0
    top_p: Annotated[float, typer.Option(help="sample from the likeliest tokens of this probability")] = 1.0
    seed: Annotated[int, typer.Option(help="of sampling", **SEEDS)] = 0


@dataclass(frozen=True)
class Drafting:
    """What drafts tokens, if anything does."""

    speculative: Annotated[
        str | None, typer.Option(help="draft tokens: medusa, draft, lookup, or medusa+lookup")
    ] = None
    heads: Annotated[
        Path | None, typer.Option(help="folder with Medusa heads; the model's own unless said")
    ] = None
    draft: Annotated[str | None, typer.Option(help="folder with the small model that drafts")] = None
    nodes: Annotated[int | None, typer.Option(help="most tokens a drafter drafts per pass")] = None

    def of(self, model: PreTrainedModel, source: str, dtype: str, device: str) -> TreeSpeculation | None:
        """The speculation for a model; None where none was asked for. Raises ConfigError."""
        from ..generation.run import check_decoder, speculation_of

        if self.speculative is None:
            if (self.heads, self.draft, self.nodes) != (None, None, None):
                raise ConfigError(
                    "--heads, --draft and --nodes go with --speculative medusa, draft or lookup"
                )
            return None
        small = None
        if self.draft is not None:
            small = to_device(load_source(find_source(self.draft), dtype), device)
            check_decoder(small, self.draft)
        own = find_source(source) if self.heads is None else self.heads
        return speculation_of(self.speculative, model, heads=own, draft=small, nodes=self.nodes)


@dataclass(frozen=True)
class Training:
    """How heads are trained; the fields are arguments of `linearize.train_heads`."""

    num_heads: Annotated[int, typer.Option(help="tokens to guess ahead")] = 4
    targets: Annotated[
        str, typer.Option(help="what heads learn: generated (what the model writes), model or text")
    ] = "generated"
    context: Annotated[int, typer.Option(help="tokens that are read at once")] = 512
    epochs: Annotated[float, typer.Option(help="times that the data is gone through")] = 3.0
    batch_size: Annotated[int, typer.Option(help="pieces of `context` tokens per step")] = 1
    learning_rate: Annotated[float, typer.Option(help="of AdamW, at its highest")] = 2e-3
    own_layers: Annotated[bool, typer.Option(help="an output layer for each head, as in Medusa-1")] = False
    resume: Annotated[bool, typer.Option(help="go on from the last of these checkpoints")] = False
    seed: Annotated[int, typer.Option(help="of the choice and the order of the data", **SEEDS)] = 0


def generate(
    source: Decoder,
    *,
    prompt: Annotated[str | None, typer.Option(help="the text to continue")] = None,
    file: Annotated[Path | None, typer.Option(help="a file with the text to continue")] = None,
    sampling: Sampling,
    drafting: Drafting,
    dtype: Dtype = "auto",
    device: Device = "cpu",
) -> None:
    """Continue a text: the text on stdout as it comes, then what it took on stderr."""
    from ..generation.run import generate as continue_text

    text = _prompt(prompt, file)
    model, tokenizer = load_decoder(source, dtype, device)
    if text and is_demo(source):
        text = f"{tokenizer.bos_token}{text}"  # as in its training; its tokenizer does not add it

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    speculation = drafting.of(model, source, dtype, device)
    settings = dataclasses.asdict(sampling)
    with stopping(lambda: "what was written above is all of it"):
        run = continue_text(model, tokenizer, text, speculation=speculation, write=write, **settings)
    write("\n")
    _tell(run)


def train_heads(
    source: Decoder,
    data: Annotated[list[Path], typer.Option(help="a text file, or a folder of them; repeat for several")],
    *,
    out: Annotated[Path | None, typer.Option(help="folder to write; the model's own unless said")] = None,
    max_tokens: Annotated[
        int, typer.Option(help="tokens of the data to use; memory and time go by them")
    ] = 60_000,
    training: Training,
    device: Device = "cpu",
    checkpoints: Annotated[Path | None, typer.Option(help="folder for a checkpoint every epoch")] = None,
) -> None:
    """Train Medusa heads on a frozen decoder, for `generate --speculative medusa`."""
    from ..common.text import text_tokens
    from ..generation.speculative import train_heads as train

    target = out
    if target is None:
        if is_demo(source):
            raise ConfigError("name the folder to write the heads to: --out DIR")
        target = find_source(source)
    check_folder(target)
    check_texts(data)
    check_resume(training.resume, checkpoints)
    check_extra("train", "accelerate")
    go_on = "nothing was kept" if checkpoints is None else f"--resume goes on from those in {checkpoints}"
    with stopping(lambda: f"no heads were written to {target}; {go_on}"):
        model, tokenizer = load_decoder(source, device=device)
        heads = train(
            model,
            text_tokens(data, tokenizer, max_tokens, training.context, training.seed),
            output_dir=checkpoints,
            progress=bars(),
            **dataclasses.asdict(training),
        )
        save_or_rescue(heads.save, target)
    _tell_heads(heads, target)


def _tell_heads(heads: MedusaHeads, target: Path) -> None:
    """How often heads are right, by rank of their guesses, and what a tree of them should give."""
    from ..generation.speculative import fit_tree
    from ..generation.speculative.medusa import NODES

    rates = heads.rates or []
    table = Table("held-out text, right by rank", *(f"{rank + 1}" for rank in range(len(rates[0]))))
    for head, row in enumerate(rates):
        table.add_row(f"head {head + 1}", *(f"{rate:.1%}" for rate in row))
    console(120).print(table)
    typer.echo(f"{heads.num_heads} heads written to {target}")
    if any(rates[0]):
        tree = fit_tree(rates, NODES)
        typer.echo(
            f"a tree of {len(tree)} nodes should give about {tree.expected_tokens:.2f} tokens per pass"
        )


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise ConfigError("give the text to continue, either as --prompt TEXT or as --file FILE")
    if file is None:
        return prompt or ""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompt in {file}: {error}") from error


def _tell(run: GenerationStats) -> None:
    """What a generation took, on stderr: stdout holds nothing but the text."""
    from ..generation.run import LONG

    text = f"{run.tokens} tokens: {run.tokens_per_second:.1f} per second, {run.tokens_per_pass:.2f} per pass"
    if run.acceptance is not None:
        text += f", {run.acceptance:.0%} of the drafted depth accepted"
    typer.echo(f"{text}; {run.prompt} tokens of prompt in {run.first:.2f} s", err=True)
    now, memory = run.length, run.memory
    table = Table("memory in bytes", *(f"at {length:,} tokens" for length in (now, LONG)))
    if memory.held == memory.softmax:
        table.add_row("KV cache (this model is not converted)", *(f"{memory.at(n):,}" for n in (now, LONG)))
    else:
        table.add_row("this model's state", *(f"{memory.at(n):,}" for n in (now, LONG)))
        table.add_row("a KV cache instead", *(f"{memory.softmax_at(n):,}" for n in (now, LONG)))
    console(120, stderr=True).print(table)
