"""A picture of what is about to be trained, to go back to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..apply import Transaction


class Kept(Transaction):
    """A Transaction that also keeps the parameters' values, on the CPU those that require gradients.

    Training wraps modules, moves tensors to a device and may cut them into shards. Afterwards `take` or
    `undo` leaves the very modules and parameters that were there before, where they were.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._parameters = dict(module.named_parameters())
        self._places = {name: (p.device, p.dtype) for name, p in self._parameters.items()}
        self._values = {
            name: p.detach().to("cpu", copy=True) if p.requires_grad else p.data
            for name, p in self._parameters.items()
        }

    def take(self, trained: Mapping[str, Tensor]) -> None:
        """Everything as before, but parameters that require gradients have their `trained` values."""
        self.rollback()
        for name, parameter in self._parameters.items():
            value = trained[name] if parameter.requires_grad else self._values[name]
            device, dtype = self._places[name]
            parameter.data = value.to(device=device, dtype=dtype)
            parameter.grad = None

    def undo(self) -> None:
        """Everything as before."""
        self.take(self._values)


def trained_values(trainer: Any) -> dict[str, Tensor]:
    """Parameters of what a Trainer trained, whole ones on every process, however they are spread."""
    if not trainer.is_fsdp_enabled:
        return {name: p.data for name, p in trainer.model.named_parameters()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found: dict[str, Any] = get_model_state_dict(
        trainer.model, options=StateDictOptions(full_state_dict=True)
    )
    return found


class Flags:
    """Which parameters of a model require gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the parameters of these names."""
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
