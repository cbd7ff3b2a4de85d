"""A snapshot of a live model, to restore when something fails."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

Keep = Literal["structure", "tensors", "values"]


class Snapshot:
    """A module as it is now; `restore` makes it that again, as often as needed.

    Always restored, for the module and for every module inside it: class, attributes, children, hooks,
    config, and which parameters require gradients. `keep` says what is restored of the parameters' contents.
    As a context manager it restores when the block raises, and only then.

    Args:
        model: The module.
        keep: "structure" restores no contents: for changes that never touch them. "tensors" restores which
            tensor each parameter holds: for changes that replace tensors (`parameter.data = new`, as PEFT's
            merge does) and write into none. "values" also copies the parameters that require gradients to
            the CPU: for training, which writes into tensors, moves them and may shard them. Restored
            parameters are on the device and in the dtype that they had, without a gradient.
        inside: Whether the modules inside `model` are part of the snapshot.
    """

    def __init__(self, model: nn.Module, keep: Keep = "structure", *, inside: bool = True) -> None:
        self._keep = keep
        modules = list(model.modules()) if inside else [model]
        self._modules = [(module, type(module), dict(module.__dict__)) for module in modules]
        # Contents of plain dicts alone. The graphs of a rewritten owner are in a dict of another type: they
        # stay right whatever becomes of the module.
        self._contents = [
            (value, dict(value))
            for _, _, attributes in self._modules
            for value in attributes.values()
            if type(value) in (dict, OrderedDict)
        ]
        configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
        self._configs = [(c, dict(vars(c))) for c in configs.values() if hasattr(c, "__dict__")]
        # By all of its names: a parameter that is tied here may come back with two values.
        self._parameters = dict(model.named_parameters(recurse=inside, remove_duplicate=False))
        self._requires_grad = {name: p.requires_grad for name, p in self._parameters.items()}
        self._places = {name: (p.device, p.dtype) for name, p in self._parameters.items()}
        self._values: dict[str, Tensor] = {}
        self._merged: list[tuple[list[Any], list[Any]]] = []
        if keep != "structure":
            self._values = {name: self._value(p) for name, p in model.named_parameters(recurse=inside)}
            # Where PEFT says which adapters are already added to the weights.
            lists = (getattr(module, "merged_adapters", None) for module in modules)
            self._merged = [(merged, list(merged)) for merged in lists if isinstance(merged, list)]

    def _value(self, parameter: nn.Parameter) -> Tensor:
        if self._keep == "values" and parameter.requires_grad:
            return parameter.detach().to("cpu", copy=True)
        return parameter.data

    def restore(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Make the module what it was.

        Args:
            values: Tensors by parameter name, which these parameters hold afterwards instead of what they
                held. They are moved to the parameter's device and dtype, and not copied if they are there.
        """
        for module, kind, attributes in self._modules:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for value, content in self._contents:
            # In place: the handle of a hook knows the very dict that the hook is to be removed from.
            value.clear()
            value.update(content)
        for config, state in self._configs:
            vars(config).clear()
            vars(config).update(state)
        for merged, before in self._merged:
            merged[:] = before
        for name, tensor in {**self._values, **(values or {})}.items():
            parameter = self._parameters[name]
            device, dtype = self._places[name]
            parameter.data = tensor.to(device=device, dtype=dtype)
            if self._keep == "values":
                parameter.grad = None
        for name, parameter in self._parameters.items():
            if parameter.requires_grad != self._requires_grad[name]:
                parameter.requires_grad_(self._requires_grad[name])

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.restore()
