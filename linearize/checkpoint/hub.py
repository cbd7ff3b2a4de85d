"""Models on the Hugging Face Hub: which files of a repository are fetched, and where they then lie."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILES = [
    "*.json",  # configuration, tokenizer, index of weights
    "*.jinja",  # chat templates
    "*.txt",
    "*.model",
    "*.bpe",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
]
"""What belongs to a model besides its weights."""
_SAFETENSORS = ["model.safetensors", "model-*-of-*.safetensors"]
_PICKLED = ["pytorch_model.bin", "pytorch_model-*-of-*.bin"]
"""The weights that transformers reads. Many repositories hold them a second time, in other formats."""
_NOT = ["onnx/*", "openvino/*", "coreml/*", "original/*", "gguf/*"]


def is_name(text: str) -> bool:
    """Whether this can be the name of a repository, such as `gpt2` or `user/model`."""
    return _NAME.fullmatch(text) is not None


def fetch(name: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder, in the cache of the Hub, of a model's files; what is missing there is downloaded.

    Weights come in one format: safetensors, where there are any.

    Args:
        name: Of the repository.
        revision: A branch, tag or commit; the main branch unless given.
        token: As `huggingface_hub` takes it; the one of `hf auth login` unless given.

    Raises:
        CheckpointError: There is no such model, or it cannot be fetched.
    """
    import huggingface_hub

    def get(*weights: str) -> Path:
        found = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            allow_patterns=[*_FILES, *weights],
            ignore_patterns=_NOT,
        )
        return Path(str(found))

    try:
        folder = get(*_SAFETENSORS)
        return folder if any(folder.glob("*.safetensors")) else get(*_PICKLED)
    except Exception as error:  # of the network, of the Hub, of the cache
        at = f" at {revision!r}" if revision else ""
        first = (str(error).strip() or "no reason given").splitlines()[0][:160]
        raise CheckpointError(
            f"{name}{at} is no folder here, and the Hub does not give it: {type(error).__name__}: {first}"
        ) from error
