"""One search for all models that are built alike: torch.export is most of what a conversion costs.

`linearize()` and `inspect()` capture the model and look for attention in the graph. What they read from the
report is names, shapes and source lines, none of which differ between two models of one class, one config
and the same buffers, on the same examples. Hundreds of tests convert the same few small models, so each test
process searches each kind of model once. Everything else of a conversion is done anew: the run on the
examples, the plan, the rewrite, both proofs.

A model of which not everything is known gets its own search, and so does every model in a test that asks for
`monkeypatch`: what it patches may be what is searched with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

Search = Callable[[nn.Module, Sequence[Mapping[str, Any]]], Any]
_SIMPLE = (
    bool,
    int,
    float,
    str,
    type(None),
    torch.dtype,
    torch.device,
    type,
    FunctionType,
    BuiltinFunctionType,
)
# Of a module: what the key has in another form, and what no forward pass reads.
_SKIPPED = {"_parameters", "_buffers", "_modules", "generation_config", "_non_persistent_buffers_set"}


class Unknown(Exception):
    """Something that may matter to a trace and has no key."""


def shared(search: Search, allowed: Callable[[], bool]) -> Search:
    """The search, with its results kept by what the model and its examples are made of."""
    known: dict[Hashable, Any] = {}

    def found(model: nn.Module, examples: Sequence[Mapping[str, Any]]) -> Any:
        try:
            key = (_of_model(model), _of_value(dict(examples[-1])), torch.get_default_dtype())
        except Unknown:
            return search(model, examples)
        if not allowed():
            return search(model, examples)
        if key not in known:
            known[key] = search(model, examples)
        return known[key]

    return found


def _of_model(model: nn.Module) -> Hashable:
    if sum(parameter.numel() for parameter in model.parameters()) > 1_000_000:
        raise Unknown("its graph would be kept, and its weights with it")
    order: dict[int, int] = {}  # tied tensors and modules have one number
    parts: list[Hashable] = []
    for name, module in model.named_modules(remove_duplicate=False):
        parts.append((name, type(module), order.setdefault(id(module), len(order))))
        parts.append(tuple(_of_attributes(vars(module))))
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for own, x in tensors.items():
                if x is None:
                    parts.append((kind, own))
                    continue
                if type(x) not in (Tensor, nn.Parameter):
                    raise Unknown("a subclass of Tensor")
                parts.append((kind, own, order.setdefault(id(x), len(order)), x.requires_grad))
                parts.append(_of_tensor(x, values=kind == "buffer"))
    return tuple(parts)


def _of_attributes(attributes: Mapping[str, Any]) -> Iterable[Hashable]:
    for name, value in sorted(attributes.items()):
        if name in _SKIPPED:
            continue
        if "hook" in name:
            if value:
                raise Unknown("hooks")
            continue
        yield name, _of_value(value)


def _of_value(value: Any) -> Hashable:
    if isinstance(value, _SIMPLE):
        return type(value), value
    if isinstance(value, PretrainedConfig):
        kept = {k: v for k, v in vars(value).items() if k.startswith("_attn")}
        return (
            type(value),
            json.dumps(value.to_dict(), sort_keys=True, default=str),
            str(sorted(kept.items())),
        )
    if isinstance(value, Mapping):
        return type(value), tuple((_of_value(k), _of_value(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(_of_value, value))
    if isinstance(value, (set, frozenset)):
        return type(value), tuple(sorted(map(str, value)))
    if type(value) is Tensor:
        return _of_tensor(value, values=True)
    raise Unknown(type(value).__name__)


def _of_tensor(x: Tensor, values: bool) -> Hashable:
    facts = (tuple(x.shape), x.stride(), x.dtype, x.device)
    if not values:
        return facts
    if x.is_meta:
        raise Unknown("no values")
    return *facts, x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
