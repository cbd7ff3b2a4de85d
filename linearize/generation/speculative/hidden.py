"""The hidden states that the output layer gets, whatever the architecture calls them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .drafter import output_layer


class HiddenStates:
    """`hidden`: the input of the output layer in the last call of the model, `[B, T, hidden_size]`."""

    hidden: Tensor

    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:
        self.hidden = args[0]


@contextmanager
def observe_hidden_states(model: Any, wanted: bool = True) -> Iterator[HiddenStates]:
    """The hidden states of every call of `model` inside the block; nothing is recorded unless `wanted`."""
    states = HiddenStates()
    handle = output_layer(model).register_forward_pre_hook(states) if wanted else None
    try:
        yield states
    finally:
        if handle is not None:
            handle.remove()
