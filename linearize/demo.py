"""The small decoder that ships with the package, for demos and tests without a download.

It was trained by `examples/train_demo.py` on the Python standard library's source; `demo_model/training.json`
records how.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_FOLDER = Path(__file__).parent / "demo_model"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def load_demo() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The demo decoder, a new copy at each call, and its tokenizer.

    The model is an ordinary `LlamaForCausalLM` on the CPU, in float32 (the file has bfloat16), in eval mode.
    It writes Python: give it the beginning of a module and it continues. In training every file followed
    `tokenizer.bos_token`, which the tokenizer does not add by itself.

    Raises:
        FileNotFoundError: files of the model are missing from the installed package.
    """
    missing = [name for name in _FILES if not (_FOLDER / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the demo model is incomplete: {', '.join(missing)} missing from {_FOLDER}; "
            "reinstall linearize, or train it again with `python examples/train_demo.py --out <that folder>`"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_FOLDER, local_files_only=True)
    model = LlamaForCausalLM.from_pretrained(_FOLDER, dtype=torch.float32, local_files_only=True)
    return model.eval(), tokenizer
