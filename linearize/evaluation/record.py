"""What a converted model carries of its evaluations, and how it is known that they are of these weights."""

from __future__ import annotations

import hashlib
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..apply import carry
from ..checkpoint import state_of
from ..errors import InputError
from .result import Evaluation

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def describe(model: nn.Module) -> str:
    """Class and mechanism, such as `LlamaForCausalLM, softmax_window`."""
    state = getattr(model, "_linearize", None)
    name = type(model).__name__
    return f"{name}, softmax" if state is None else f"{name}, {state.config.mechanism}"


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights and their names, in whatever order or on whatever device they are summed."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            found.update(_row_sums(tensor).numpy().tobytes())
    return found.hexdigest()[:16]


def _row_sums(tensor: Tensor) -> Tensor:
    """Sums of each row's bits, read as integers: int64 `[rows]`. Exact, so the order of summing is free."""
    flat = tensor.detach().contiguous()
    flat = flat.reshape(flat.shape[0] if flat.dim() > 1 else 1, -1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.int8)
    return flat.view(_BITS[flat.element_size()]).sum(1, dtype=torch.int64).cpu()


def attach(evaluation: Evaluation, model: nn.Module) -> None:
    """See `Evaluation.attach`."""
    if evaluation.weights != fingerprint(model):
        raise InputError("the weights are not those that were measured: evaluate the model again")
    others = [found for found in measured(model) if found.name != evaluation.name]
    carry(model, [found.to_dict() for found in (*others, evaluation)])


def measured(model: nn.Module) -> list[Evaluation]:
    """The evaluations that a converted model carries, as far as they are of its present weights and can be
    read."""
    records = state_of(model).measured
    if not records:
        return []
    weights = fingerprint(model)
    found = []
    for record in records:
        # One that another release wrote is no reason to lose a checkpoint.
        with suppress(InputError):
            found.append(Evaluation.from_dict(record))
    return [evaluation for evaluation in found if evaluation.weights == weights]
