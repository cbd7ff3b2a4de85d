"""The small decoder that ships with the package, for demos and tests without a download.

It was trained by `examples/train_demo.py` on the Python standard library's source; `model/training.json`
records how.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_FOLDER = Path(__file__).parent / "model"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_LINEAR = "linear"


def load_demo(linear: bool = False) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The demo decoder, a new copy at each call, and its tokenizer.

    The model is an ordinary `LlamaForCausalLM` on the CPU, in float32 (the file has bfloat16), in eval mode.
    It writes Python: give it the beginning of a module and it continues. In training every file followed
    `tokenizer.bos_token`, which the tokenizer does not add by itself. linear: the same decoder converted to
    `augmented` and distilled by `examples/distill_demo.py`.

    Raises:
        FileNotFoundError: files of the model are missing from the installed package.
    """
    needed = [_FOLDER / name for name in _FILES]
    if linear:
        needed += [_FOLDER / _LINEAR / name for name in ("config.json", "model.safetensors")]
    missing = [path.name for path in needed if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"the demo model is incomplete: {', '.join(missing)} missing from {_FOLDER}; "
            "reinstall linearize, or train it again with `python examples/train_demo.py --out <that folder>`"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_FOLDER, local_files_only=True)
    folder = _FOLDER / _LINEAR if linear else _FOLDER
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), tokenizer


def linear_record() -> dict[str, Any]:
    """How the linear decoder was distilled: `examples/distill_demo.py` writes it."""
    return json.loads((_FOLDER / _LINEAR / "distillation.json").read_text(encoding="utf-8"))
