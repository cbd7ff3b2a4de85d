"""The Medusa heads that the paper released beside its LLaMA-2 checkpoints, as `MedusaHeads`.

`medusa_lm_head.pt` (Medusa's own format; `experiments/medusa/model/medusa_model.py` of the reference code at
273274e) is the state of a list of heads, each a residual block and an output layer of its own:

    head k of h = output_k(h + silu(W_k h + b_k))     keys k.0.linear.weight, k.0.linear.bias, k.1.weight
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..generation.speculative import MedusaHeads
from .weight_files import Source, read

FILE = "medusa_lm_head.pt"
KEYS = ("0.linear.weight", "0.linear.bias", "1.weight")


def load_released_heads(source: Source, model: Any) -> MedusaHeads:
    """Load Medusa heads in the format of the Medusa project, for the decoder that they were trained on.

    Args:
        source: A folder with `medusa_lm_head.pt`, such a file, or its tensors by name: per head k
            `k.0.linear.weight` `[hidden, hidden]`, `k.0.linear.bias` `[hidden]`, `k.1.weight`
            `[vocabulary, hidden]`.
        model: The decoder.

    Returns:
        The heads, in the model's dtype and evaluation mode. They have no measured rates: give `Medusa` a
        tree, or call `heads.acceptance(model, tokens)`.

    Raises:
        CheckpointError: A tensor is missing, unknown or of another shape; the message names it.
    """
    if not isinstance(source, Mapping) and Path(source).is_dir():
        source = Path(source) / FILE
    (tensors,) = read(source)
    for name in tensors:
        if not re.fullmatch(r"\d+\.(" + "|".join(map(re.escape, KEYS)) + ")", name):
            raise CheckpointError(
                f"{name} is no part of a Medusa head with one residual block: those are k.{', k.'.join(KEYS)}"
            )
    count = 1 + max((int(name.partition(".")[0]) for name in tensors), default=-1)
    if not count:
        raise CheckpointError("the file holds no heads")
    heads = MedusaHeads(model, count, sees_token=False, own_layers=True)
    assert heads.output is not None
    with torch.no_grad():
        for k in range(count):
            places = (heads.weight[k], heads.bias[k, 0], heads.output[k])
            for key, place in zip(KEYS, places, strict=True):
                tensor = tensors.get(f"{k}.{key}")
                if tensor is None:
                    raise CheckpointError(f"{k}.{key} is missing, though there are {count} heads")
                if tensor.shape != place.shape:
                    raise CheckpointError(
                        f"{k}.{key} is {tuple(tensor.shape)}, and this model needs {tuple(place.shape)}: "
                        "these are another model's heads"
                    )
                place.copy_(tensor)
    return heads.eval()
