"""Models in GGUF files, read by transformers and made ordinary: dense weights, not called quantized."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(
    path: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder and its tokenizer from a GGUF file.

    transformers reads the file and turns its weights into dense ones; which architectures it knows is said in
    its documentation. The model is then as any other: it can be converted, trained and saved.

    Args:
        path: The file, or a folder that holds exactly one.
        dtype: Of the dense weights.

    Returns:
        The model, in evaluation mode on the CPU, and its tokenizer.

    Raises:
        MissingExtraError: The package `gguf` is not installed.
        CheckpointError: There is no such file, more than one, or transformers cannot read it.
    """
    file = find_file(Path(path))
    check_reader()
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, local_files_only=True
        )
    except Exception as error:  # the reader raises whatever it meets in the file
        raise CheckpointError(f"cannot read {file}: {type(error).__name__}: {error}") from error
    make_dense(model)
    return model.eval(), load_tokenizer(file)


def load_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file. Raises CheckpointError and MissingExtraError as `load_gguf`."""
    check_reader()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"cannot read the tokenizer in {file}: {type(error).__name__}: {error}"
        ) from error


def find_file(path: Path) -> Path:
    """The GGUF file that is meant by a path to it, or to the folder it lies in. Raises CheckpointError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(f"{path}: name one GGUF file; this folder holds {names}")
    return files[0]


def check_reader() -> None:
    """Raise MissingExtraError unless transformers can read GGUF files here."""
    if find_spec("gguf") is None:
        raise MissingExtraError("GGUF files need the package gguf: pip install 'linearize[gguf]'")


def make_dense(model: Any) -> None:
    """Remove what calls the weights quantized: they are dense, and could not be saved with it."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
