"""`linearize generate | train-heads`: texts from decoders, and what drafts them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import ConfigError, InputError
from .sources import find_source, is_demo, load_decoder, load_source, to_device
from .terminal import console

if TYPE_CHECKING:
    from ..generation.run import Run


def generate(
    source: Annotated[
        str, typer.Argument(help="a folder with a decoder, converted or not, or `demo`, converted on the way")
    ],
    prompt: Annotated[str | None, typer.Option(help="the text to continue")] = None,
    file: Annotated[Path | None, typer.Option(help="a file with the text to continue")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to stop after")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; above: sampled")] = 0.0,
    top_p: Annotated[float, typer.Option(help="sample from the likeliest tokens of this probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    speculative: Annotated[
        str | None, typer.Option(help="draft tokens: medusa, draft, lookup, or medusa+lookup")
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(help="folder with Medusa heads; the model's own unless said")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="folder with the small model that drafts")] = None,
    nodes: Annotated[int | None, typer.Option(help="most tokens a drafter drafts per pass")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto: as stored")] = "auto",
    device: Annotated[str, typer.Option(help="where it runs, such as cpu or cuda")] = "cpu",
) -> None:
    """Continue a text: the text on stdout as it comes, then what it took on stderr."""
    from ..generation.run import check_decoder, speculation_of
    from ..generation.run import generate as continue_text

    text = _prompt(prompt, file)
    model, tokenizer = load_decoder(source, dtype, device)
    if text and is_demo(source):
        text = f"{tokenizer.bos_token}{text}"  # as in its training; its tokenizer does not add it
    speculation = None
    if speculative is not None:
        small = None
        if draft is not None:
            small = to_device(load_source(find_source(draft), dtype), device)
            check_decoder(small, draft)
        own = find_source(source) if heads is None else heads
        speculation = speculation_of(speculative, model, heads=own, draft=small, nodes=nodes)
    elif heads is not None or draft is not None or nodes is not None:
        raise ConfigError("--heads, --draft and --nodes go with --speculative medusa, draft or lookup")

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    run = continue_text(
        model,
        tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        speculation=speculation,
        write=write,
    )
    sys.stdout.write("\n")
    sys.stdout.flush()
    _tell(run)


def train_heads(
    source: Annotated[
        str, typer.Argument(help="a folder with a decoder, converted or not, or `demo`, converted on the way")
    ],
    data: Annotated[list[Path], typer.Option(help="a text file, or a folder of them; repeat for several")],
    out: Annotated[Path | None, typer.Option(help="folder to write; the model's own unless said")] = None,
    num_heads: Annotated[int, typer.Option(help="tokens to guess ahead")] = 4,
    targets: Annotated[
        str, typer.Option(help="what heads learn: generated (what the model writes), model or text")
    ] = "generated",
    max_tokens: Annotated[
        int, typer.Option(help="tokens of the data to use; memory and time go by them")
    ] = 60_000,
    context: Annotated[int, typer.Option(help="tokens that are read at once")] = 512,
    epochs: Annotated[float, typer.Option(help="times that the data is gone through")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="pieces of `context` tokens per step")] = 1,
    learning_rate: Annotated[float, typer.Option(help="of AdamW, at its highest")] = 2e-3,
    own_layers: Annotated[bool, typer.Option(help="an output layer for each head, as in Medusa-1")] = False,
    checkpoints: Annotated[Path | None, typer.Option(help="folder for a checkpoint every epoch")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the last of these checkpoints")] = False,
    seed: Annotated[int, typer.Option(help="of the choice and the order of the data")] = 0,
) -> None:
    """Train Medusa heads on a frozen decoder, for `generate --speculative medusa`."""
    from ..common.text import text_tokens
    from ..generation.speculative import fit_tree
    from ..generation.speculative import train_heads as train
    from ..generation.speculative.medusa import NODES

    target = out
    if target is None:
        if is_demo(source):
            raise ConfigError("name the folder to write the heads to: --out DIR")
        target = find_source(source)
    model, tokenizer = load_decoder(source)
    heads = train(
        model,
        text_tokens(data, tokenizer, max_tokens, context, seed),
        num_heads=num_heads,
        targets=targets,
        context=context,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        own_layers=own_layers,
        output_dir=checkpoints,
        resume=resume,
        progress=sys.stderr.isatty(),
        seed=seed,
    )
    heads.save(target)
    rates = heads.rates or []
    table = Table("held-out text, right by rank", *(f"{rank + 1}" for rank in range(len(rates[0]))))
    for head, row in enumerate(rates):
        table.add_row(f"head {head + 1}", *(f"{rate:.1%}" for rate in row))
    console(120).print(table)
    typer.echo(f"{num_heads} heads written to {target}")
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


def _tell(run: Run) -> None:
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
