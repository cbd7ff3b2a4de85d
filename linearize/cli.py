"""The command line: `linearize demo | inspect | convert | generate | export | train-heads | build-library |
mechanisms | version`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import __version__
from .errors import CheckpointError, ConfigError, InputError, LinearizeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .generation import Run

app = typer.Typer(
    help="Find any softmax attention in a model, prove it, and rewrite it to linear attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DTYPES = ("auto", "float32", "bfloat16", "float16")
CALIBRATION_LENGTH = 512
"""Tokens of a piece of text that `convert --calibrate` runs."""
Source = Annotated[str, typer.Argument(help="a folder with a transformers model, a Hub name, or `demo`")]
Mechanism = Annotated[
    str, typer.Option(help="what takes the softmax's place; `linearize mechanisms` lists what there is")
]
Option = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="a setting of the mechanism; repeat for several"),
]
Augmentation = Annotated[
    bool | None,
    typer.Option(
        "--augmentation/--no-augmentation",
        help="add the convolution over values, or leave it out; the mechanism's own choice unless said",
        show_default=False,
    ),
]
Group = Annotated[int, typer.Option(help="tokens per group of the local part")]
Taps = Annotated[int, typer.Option(help="tokens that the convolution over values sees")]
Approximate = Annotated[
    list[str] | None, typer.Option(help="a part of the attention that may be dropped; repeat for several")
]


def main() -> None:
    """Entry point. An error made by the package is one line on stderr and exit code 1."""
    from transformers.utils import logging

    # The bars of weights being read are noise in a terminal and worse in a pipe; this is our process.
    logging.disable_progress_bar()
    try:
        app()
    except LinearizeError as error:
        # soft_wrap: one line in a pipe too, whatever width is assumed for it.
        text = f"error: {error}"
        Console(stderr=True).print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def version() -> None:
    """Print the versions that matter for a bug report."""
    import torch
    import transformers

    typer.echo(f"linearize {__version__}, torch {torch.__version__}, transformers {transformers.__version__}")


@app.command()
def demo(
    threads: Annotated[int, typer.Option(help="torch threads; 0 keeps torch's choice")] = 0,
) -> None:
    """The whole story on the small decoder that ships with the package. Offline, under three minutes."""
    import torch

    from .walkthrough import run

    if threads:
        torch.set_num_threads(threads)
    run(Console(width=None if sys.stdout.isatty() else 120))


@app.command()
def inspect(
    model: Source,
    json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    html: Annotated[Path | None, typer.Option(help="also write a page to this file")] = None,
    mechanism: Mechanism = "augmented",
    group_size: Group = 64,
    conv_taps: Taps = 32,
    option: Option = None,
    augmentation: Augmentation = None,
    approximate: Approximate = None,
) -> None:
    """List every candidate attention site: where it is, what it means, what becomes of it or why not."""
    from .config import LinearizeConfig
    from .report import inspect as inspect_model

    config = LinearizeConfig(
        mechanism=mechanism,
        group_size=group_size,
        conv_taps=conv_taps,
        options=_options(option or ()),
        augmentation=augmentation,
        approximate=tuple(approximate or ()),
    )
    report = inspect_model(load_source(find_source(model)), config=config)
    if html is not None:
        try:
            html.write_text(report.to_html(), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot write {html}: {error}") from error
    if json:
        typer.echo(report.to_json())
    else:
        # A pipe or file has no width of its own; the table needs about this much.
        Console(width=None if sys.stdout.isatty() else 160).print(report)


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="the folder to write")],
    mechanism: Mechanism = "augmented",
    group_size: Group = 64,
    conv_taps: Taps = 32,
    option: Option = None,
    augmentation: Augmentation = None,
    layers: Annotated[str, typer.Option(help="only these layer indices, such as 0,1,5; empty is all")] = "",
    keep_softmax: Annotated[
        list[str] | None, typer.Option(help="layer index or module path to leave; repeat for several")
    ] = None,
    on_refusal: Annotated[str, typer.Option(help="error: all or nothing; keep: what can be")] = "error",
    approximate: Approximate = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="text file, or folder of them, to fit the new parameters on; repeat for several"),
    ] = None,
) -> None:
    """Convert a transformers model and write it, tokenizer and all, to a folder."""
    from .api import linearize
    from .checkpoint import save, state_of
    from .config import LinearizeConfig

    config = LinearizeConfig(
        mechanism=mechanism,
        group_size=group_size,
        conv_taps=conv_taps,
        options=_options(option or ()),
        augmentation=augmentation,
        layers=_indices(layers),
        keep_softmax=tuple(int(item) if item.isdigit() else item for item in keep_softmax or ()),
        on_refusal=on_refusal,
        approximate=tuple(approximate or ()),
    )
    folder = find_source(source)
    if target.resolve() == folder.resolve():
        raise CheckpointError(f"{target} is the model to convert; write to another folder")
    model = linearize(load_source(folder), config=config)
    if calibrate:
        from .calibration import TOKENS
        from .calibration import calibrate as fit
        from .text import text_tokens

        texts = text_tokens(calibrate, _tokenizer(folder), TOKENS, CALIBRATION_LENGTH, seed=0)
        pieces = [piece[None] for ids in texts for piece in ids.split(CALIBRATION_LENGTH)]
        Console(width=None if sys.stdout.isatty() else 160).print(fit(model, pieces))
    save(model, target)
    for path in companions(folder):
        if not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
    count = len(state_of(model).plan.sites)
    typer.echo(f"{count} attention modules rewritten to {mechanism}, written to {target}")


@app.command()
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
    from .generation import check_decoder, speculation_of
    from .generation import generate as continue_text

    text = _prompt(prompt, file)
    model, tokenizer = _decoder(source, dtype, device)
    if text and _is_demo(source):
        text = f"{tokenizer.bos_token}{text}"  # as in its training; its tokenizer does not add it
    speculation = None
    if speculative is not None:
        small = None
        if draft is not None:
            small = _on(load_source(find_source(draft), dtype), device)
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


@app.command()
def mechanisms() -> None:
    """List what can take a softmax's place: formula, options with defaults, and the kinds of site it fits.

    The column augmentation says whether the convolution over values is added unless asked otherwise.
    """
    from .mechanisms import available

    kinds = ("causal", "bidirectional", "cross")
    table = Table("mechanism", "formula", "options", "augmentation", *kinds)
    for mechanism in available().values():
        options = [
            f"{name}={option.default} ({option.expected}): {option.meaning}"
            for name, option in mechanism.options.items()
        ]
        augmentation = {True: "yes", False: "no", None: "never"}[mechanism.augmentation]
        fits = ["yes" if kind in mechanism.supports else "no" for kind in kinds]
        texts = Text(mechanism.formula), Text("\n".join(options))  # their brackets are no markup
        table.add_row(mechanism.name, *texts, augmentation, *fits)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


@app.command()
def export(
    source: Source,
    target: Annotated[
        Path, typer.Argument(help="a file *.onnx, or a folder for model.onnx and what it needs")
    ],
    opset: Annotated[int, typer.Option(help="ONNX opset of the standard operators")] = 20,
    dtype: Annotated[str, typer.Option(help="float32 or float16")] = "float32",
    bits: Annotated[int, typer.Option(help="8 or 4 for quantised weights, 0 for none")] = 0,
    last_logits: Annotated[
        bool, typer.Option(help="a decoder's last token's logits alone: long prompts are faster")
    ] = False,
) -> None:
    """Write a model, converted or not, as ONNX that stock onnxruntime runs, state in and state out."""
    from .onnx.command import run

    folder = find_source(source)
    options = dict(opset=opset, dtype=dtype, last_logits=last_logits)
    run(load_source(folder), target, companions(folder), options, bits=bits, write=typer.echo)


@app.command()
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
    from .speculative import fit_tree
    from .speculative import train_heads as train
    from .speculative.medusa import NODES
    from .text import text_tokens

    target = out
    if target is None:
        if _is_demo(source):
            raise ConfigError("name the folder to write the heads to: --out DIR")
        target = find_source(source)
    model, tokenizer = _decoder(source)
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
    Console(width=None if sys.stdout.isatty() else 120).print(table)
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


def _decoder(
    source: str, dtype: str = "auto", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder and its tokenizer; the demo's is converted here, and writes badly untuned."""
    from .api import linearize
    from .generation import check_decoder

    folder = find_source(source)
    # The demo is stored in bfloat16 and meant to run in float32, as `load_demo` has it.
    model = load_source(folder, "float32" if dtype == "auto" and _is_demo(source) else dtype)
    check_decoder(model, source)
    tokenizer = _tokenizer(folder)
    if _is_demo(source):
        linearize(model)
        typer.echo(
            "converted now and not tuned: it computes exactly what it should, and writes badly", err=True
        )
    return _on(model, device), tokenizer


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"cannot load the tokenizer in {folder}: {error}") from error


def _on(model: PreTrainedModel, device: str) -> PreTrainedModel:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"cannot run on {device!r}: {str(error).splitlines()[0]}") from error


def _tell(run: Run) -> None:
    """What a generation took, on stderr: stdout holds nothing but the text."""
    from .generation import LONG

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
    Console(stderr=True, width=None if sys.stderr.isatty() else 120).print(table)


@app.command()
def build_library(
    include: Annotated[
        Path | None, typer.Option(help="folder with onnxruntime's C++ headers; the usual places unless said")
    ] = None,
    cuda: Annotated[
        Path | None,
        typer.Option(help="an exported file: the kernels of its nodes for CUDA instead (never run on a GPU)"),
    ] = None,
    arch: Annotated[
        list[int] | None,
        typer.Option(
            help="compute capability for --cuda, 90 for 9.0; repeat it; 80, 90 and 100 unless given"
        ),
    ] = None,
) -> None:
    """Compile the kernels with which onnxruntime runs exported files faster. Needs a C++ compiler."""
    from . import onnx

    made = onnx.build_cuda_library(cuda, include, architectures=arch) if cuda else onnx.build_library(include)
    typer.echo(f"wrote {made}")


def _options(given: Iterable[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; values that read as an int or a float are one."""
    options: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not (equals and name) or name in options:
            wrong = "is there twice" if name in options else "is not NAME=VALUE"
            raise ConfigError(f"--option {item!r} {wrong}")
        options[name] = _value(text)
    return options


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _indices(text: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else None
    except ValueError as error:
        raise ConfigError(f"layers must be numbers separated by commas, got {text!r}") from error


def _is_demo(name: str) -> bool:
    return name == "demo" and not Path(name).is_dir()


def find_source(name: str) -> Path:
    """The folder of a model: an existing one, the shipped demo, or a download from the Hub."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if _is_demo(name):
        return Path(__file__).parent / "demo_model"
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except Exception as error:
        raise CheckpointError(
            f"{name} is no folder here and could not be fetched from the Hub: {error}"
        ) from error


def load_source(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    """The model of a folder, converted or not, by the class its config names. dtype: "auto" is as stored."""
    import transformers
    from safetensors import SafetensorError

    from .checkpoint import read_json

    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    architectures = read_json(folder / "config.json").get("architectures") or []
    cls = getattr(transformers, architectures[0], None) if architectures else None
    try:
        loader = cls or transformers.AutoModel
        return loader.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot load the model in {folder}: {error}") from error


def companions(folder: Path) -> list[Path]:
    """The files that belong to a model besides config and weights: tokenizer, processor, licence."""
    own = {"config.json", "generation_config.json", "training.json"}
    weights = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot"}
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name not in own
        and path.suffix not in weights
        and not path.name.endswith(".index.json")
        and not path.name.startswith(".")
    ]
