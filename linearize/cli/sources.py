"""Where a command takes its model from: a folder, a GGUF file, the Hub or the shipped demo."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.files import reason, shown
from ..errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS = frozenset(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .onnx .ot .gguf .npz .tflite .mlmodel .pdparams".split()
)
"""What files of weights are called: none is copied beside those of the converted model."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
Source = Annotated[
    str,
    typer.Argument(
        help="a folder with a transformers model, a GGUF file, a Hub name (with @ and a revision), or `demo`"
    ),
]


def is_demo(name: str) -> bool:
    """Whether `demo` means the shipped decoder: a folder of that name goes first."""
    return name == "demo" and not Path(name).is_dir()


def hide_bars() -> None:
    """Let transformers draw no progress bars in this process: noise in a terminal, and worse in a pipe."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def find_source(name: str) -> Path:
    """The folder of a model, existing, of the shipped demo, or downloaded from the Hub; or a GGUF file."""
    if not name:
        raise CheckpointError("the name of a model is empty; `.` is the current folder")
    folder = Path(name)
    if os.path.isdir(folder) or (os.path.isfile(folder) and _is_gguf(folder)):
        return folder
    if _is_gguf(folder):
        raise CheckpointError(f"{name}: no such file")
    if is_demo(name):
        from ..demo import MODEL

        return MODEL
    from ..checkpoint.hub import fetch, is_name

    repository, _, revision = name.partition("@")
    if not is_name(repository):
        raise CheckpointError(f"{shown(folder)}: no such folder")
    hide_bars()
    return fetch(repository, revision or None)


def load_model(source: str, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """The model that a user named, on a device. dtype: "auto" is as stored, but float32 for the demo.

    The demo is stored in bfloat16 and meant to run in float32, as `load_demo` has it.
    """
    demo = dtype == "auto" and is_demo(source)
    return to_device(load_source(find_source(source), "float32" if demo else dtype), device)


def load_source(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    """The model of a folder, converted or not, by the class its config names, or of a GGUF file.

    dtype: "auto" is as stored, float32 for GGUF.
    """
    import transformers

    from ..checkpoint.checking import config_of, known_class

    hide_bars()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if _is_gguf(folder):
        import torch

        from ..checkpoint.gguf import load_gguf

        return load_gguf(folder, dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype))[0]
    loader: Any = known_class(config_of(folder)) or transformers.AutoModel
    try:
        return loader.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    # Files from anywhere can make any line of transformers raise anything.
    except Exception as error:
        raise CheckpointError(f"cannot load the model in {shown(folder)}: {error}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder or GGUF file. Raises CheckpointError when none can be read."""
    from transformers import AutoTokenizer

    if _is_gguf(folder):
        from ..checkpoint import gguf

        return gguf.load_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise CheckpointError(f"cannot load the tokenizer in {shown(folder)}: {error}") from error


def load_decoder(
    source: str, dtype: str = "auto", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder and its tokenizer; the demo's is converted here, and writes badly untuned."""
    from ..convert.linearize import linearize
    from ..generation.run import check_decoder

    model = load_model(source, dtype)
    check_decoder(model, source)
    tokenizer = load_tokenizer(find_source(source))
    if is_demo(source):
        linearize(model)
        typer.echo(
            "converted now and not tuned: it computes exactly what it should, and writes badly", err=True
        )
    return to_device(model, device), tokenizer


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


def to_device(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model, moved. Raises ConfigError for a device that is not there."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"cannot run on {device!r}: {str(error).splitlines()[0]}") from error


def companions(folder: Path) -> list[Path]:
    """The files that belong to a model besides config and weights: tokenizer, processor, licence.

    None for a GGUF file, which holds all that it has.
    """
    if _is_gguf(folder):
        return []
    own = {"config.json", "generation_config.json", "training.json"}
    return [
        path
        for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*.jinja")])
        if path.is_file()
        and path.name not in own
        and path.suffix not in _WEIGHTS
        and not path.name.endswith((".index.json", ".onnx.data", ".onnx_data"))
        and not path.name.startswith(".")
    ]


def copy_companions(folder: Path, target: Path, there: Path | None = None) -> None:
    """Put the files that belong to the model of `folder` beside the model in `target`.

    For a GGUF file that is its tokenizer. there: the folder that the files are for, where none is replaced;
    `target` unless given. Raises CheckpointError when a file cannot be written.
    """
    home = target if there is None else there
    try:
        if _is_gguf(folder):
            load_tokenizer(folder).save_pretrained(target)
        for path in companions(folder):
            name = path.relative_to(folder)
            if not (target / name).exists() and not (home / name).exists():
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target / name)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot write to {shown(home)}: {reason(error)}") from error
