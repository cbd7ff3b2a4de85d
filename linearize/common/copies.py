"""Copies of models that cost no memory for weights."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def sharing_copy(model: Model) -> Model:
    """A copy with modules of its own and the very parameters and buffers of `model`.

    What is rewritten in the copy is not in the model; what is written into a shared tensor is in both.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)
