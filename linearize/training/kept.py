"""A picture of a model before a stage of training, to go back to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..apply import Transaction


class Kept(Transaction):
    """A Transaction that also keeps what is trained, what requires gradients, and where everything lies.

    `rollback` restores structure, flags and devices, but no values: trained weights stay. `undo` restores the
    values too.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__(model)
        self._flags = [(p, p.requires_grad, p.device) for p in model.parameters()]
        self._buffers = [(b, b.device) for b in model.buffers()]
        self._values = [(p, p.detach().to("cpu", copy=True)) for p in trained.values()]

    def rollback(self) -> None:
        super().rollback()
        for parameter, flag, device in self._flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
            if parameter.device != device:
                parameter.data = parameter.data.to(device)
        for buffer, device in self._buffers:
            if buffer.device != device:
                buffer.data = buffer.data.to(device)

    def undo(self) -> None:
        self.rollback()
        with torch.no_grad():
            for parameter, value in self._values:
                parameter.copy_(value)


def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of these names."""
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
