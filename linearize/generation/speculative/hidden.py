"""What the output layer sees: the model's last hidden states, whatever the architecture calls them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .drafter import output_layer


class Tap:
    """`hidden`: input of the output layer in the last call of the model, `[B, T, hidden_size]`."""

    hidden: Tensor

    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:
        self.hidden = args[0]


@contextmanager
def tapped(model: Any, wanted: bool = True) -> Iterator[Tap]:
    """A `Tap` on the model while the context lasts; not wanted: one that stays empty."""
    tap = Tap()
    handle = output_layer(model).register_forward_pre_hook(tap) if wanted else None
    try:
        yield tap
    finally:
        if handle is not None:
            handle.remove()
