"""Arguments kept for the backward of an autograd function: tensors where autograd sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def save(ctx: Any, inputs: Sequence[Any], output: Any = None) -> None:
    """Keep all arguments; also a `setup_context` for `register_autograd`."""
    ctx.is_tensor = [isinstance(item, Tensor) for item in inputs]
    ctx.others = [None if isinstance(item, Tensor) else item for item in inputs]
    ctx.save_for_backward(*(item for item in inputs if isinstance(item, Tensor)))


def saved(ctx: Any) -> list[Any]:
    """The arguments that `save` kept, in order."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if there else other for there, other in zip(ctx.is_tensor, ctx.others, strict=True)]
