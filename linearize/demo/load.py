"""The small decoder that ships with the package, for demos and tests without a download.

It was trained by `examples/train_demo.py` on the Python standard library's source; `model/training.json`
records how.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ..common.checks import require
from . import MODEL

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_LINEAR = "linear"


def load_demo(linear: bool = False) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the small decoder that ships with the package, and its tokenizer. Needs no network.

    It writes Python: give it the beginning of a module and it continues. In training every file followed
    `tokenizer.bos_token`, which the tokenizer does not add by itself.

    Args:
        linear: Load the decoder that was converted to `augmented_paper` attention and distilled by
            `examples/distill_demo.py`, instead of the softmax original.

    Returns:
        A new `LlamaForCausalLM` on the CPU, in float32 (the file has bfloat16) and evaluation mode, and the
        tokenizer.

    Raises:
        FileNotFoundError: Files of the model are missing from the installed package.
    """
    require(isinstance(linear, bool), "linear", linear, "True or False")
    needed = [MODEL / name for name in _FILES]
    if linear:
        needed += [MODEL / _LINEAR / name for name in ("config.json", "model.safetensors")]
    missing = [path.name for path in needed if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"the demo model is incomplete: {', '.join(missing)} missing from {MODEL}; "
            "reinstall linearize, or train it again with `python examples/train_demo.py --out <that folder>`"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL, local_files_only=True)
    folder = MODEL / _LINEAR if linear else MODEL
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), tokenizer


def linear_record() -> dict[str, Any]:
    """How the linear decoder was distilled: `examples/distill_demo.py` writes it."""
    return json.loads((MODEL / _LINEAR / "distillation.json").read_text(encoding="utf-8"))
