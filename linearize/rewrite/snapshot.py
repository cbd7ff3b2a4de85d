"""Pictures of a live model, to go back to when something fails."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Transaction:
    """A shallow picture of every module and config of a model, to go back to when something fails.

    Tensors are not copied: nothing on the way to a rewritten model changes one in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [Picture(module) for module in model.modules()]
        configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
        self._configs = [(c, dict(vars(c))) for c in configs.values() if hasattr(c, "__dict__")]

    def rollback(self) -> None:
        """Restore classes, attributes, children, parameters and configs as they were."""
        for picture in self._modules:
            picture.restore()
        for config, state in self._configs:
            vars(config).clear()
            vars(config).update(state)


class Picture:
    """A shallow picture of one module: its class, attributes, and which children and parameters it has."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._class = module, type(module)
        self._attributes = dict(module.__dict__)
        # A dict of another type (traced graphs) holds whatever the module has become since.
        self._contents = {
            name: dict(value)
            for name, value in self._attributes.items()
            if type(value) in (dict, OrderedDict)
        }

    def restore(self) -> None:
        """Make the module what it was; as often as wanted."""
        self._module.__class__ = self._class
        self._module.__dict__.clear()
        self._module.__dict__.update(self._attributes)
        for name, content in self._contents.items():
            # In place: the handle of a hook knows the very dict that it is to be removed from.
            self._attributes[name].clear()
            self._attributes[name].update(content)


class Undo(Transaction):
    """A Transaction that also takes back what replaces the contents of parameters, unless all goes well.

    Only for changes that leave the old tensors alone (`parameter.data = new`), as PEFT's safe merge does.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._values: list[tuple[Tensor, Tensor]] = [(p, p.data) for p in model.parameters()]
        self._merged = [
            (merged, list(merged))
            for module in model.modules()
            if isinstance(merged := getattr(module, "merged_adapters", None), list)
        ]

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.rollback()

    def rollback(self) -> None:
        super().rollback()
        for parameter, value in self._values:
            parameter.data = value
        for merged, before in self._merged:
            merged[:] = before


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
