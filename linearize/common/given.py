"""Running a model on what a user gave it, and why it does not run on that, in a sentence to act on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, LinearizeError
from .checks import excerpt
from .running import call, floats, shapes, shortened, vocabulary_size, without_cache

IDS = ("input_ids", "decoder_input_ids", "labels", "0")
"""Where token ids stand; "0" is the first argument by position."""
_ALIKE = 0.85
"""How alike a misspelt name is to the right one, as `difflib` counts."""


def run_model(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Floating outputs of one forward pass. Raises InputError when the model does not run on the inputs."""
    try:
        # Inside `quiet_run`, which restores it: some models draw masks even in evaluation.
        torch.manual_seed(0)
        return floats(call(model, without_cache(model, inputs)))
    except LinearizeError:
        raise
    except Exception as error:
        why = cause(model, inputs, error)
        raise InputError(f"{type(model).__name__} does not run on the example inputs: {why}") from error


def check_names(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise InputError for a name that is nearly that of an argument, which `**kwargs` would swallow."""
    names = _named(model)
    for name in inputs:
        if name not in names and not name.isdigit():
            close = get_close_matches(name, [n for n in names if n not in inputs], n=1, cutoff=_ALIKE)
            if close:
                raise InputError(
                    f"{name!r} is no argument of {type(model).__name__}.forward; did you mean {close[0]!r}?"
                )


def cause(model: nn.Module, inputs: Mapping[str, Any], error: Exception) -> str:
    """What is wrong with `inputs` that made `model` raise `error`: its own words where nothing is known."""
    return _wrong_names(model, inputs) or _wrong_ids(model, inputs) or _raised(inputs, error)


def _raised(inputs: Mapping[str, Any], error: Exception) -> str:
    given = shapes(inputs)
    return f"{shortened(error, 150)} (given {given if len(given) <= 80 else given[:76] + '...'})"


def _named(model: nn.Module) -> list[str]:
    """The arguments of the forward; none where it only passes on what it gets."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _wrong_names(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    known = _named(model)
    wrong = [name for name in inputs if known and name not in known and not name.isdigit()]
    if not wrong:
        return ""
    close = get_close_matches(wrong[0], known, n=1)
    listed = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    nearest = f"did you mean {close[0]!r}? it" if close else "it"
    return f"{wrong[0]!r} is no argument of its forward; {nearest} takes {listed}"


def _wrong_ids(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    size = vocabulary_size(model)
    if size is None:
        return ""
    for name in IDS:
        ids = inputs.get(name)
        where = "token ids" if name == "0" else name
        if isinstance(ids, str) or (isinstance(ids, list | tuple) and any(isinstance(x, str) for x in ids)):
            return f"{where} are a text; give token ids: tokenizer(text, return_tensors='pt')"
        if isinstance(ids, list | tuple):
            return f"{where} must be a tensor, int64 [batch, tokens]; torch.tensor({excerpt(ids)}) makes one"
        if not isinstance(ids, Tensor):
            continue
        if ids.is_floating_point() or ids.dtype == torch.bool:
            return f"{where} must be integers, got {str(ids.dtype).removeprefix('torch.')}"
        if ids.dim() == 1:
            return f"{where} must be [batch, tokens], got {list(ids.shape)}; ids[None] makes a batch of one"
        if not ids.numel():
            return f"{where} are empty: {list(ids.shape)}"
        low, high = int(ids.min()), int(ids.max())
        if high >= size or (low < 0 and name != "labels"):
            wrong = high if high >= size else low
            return f"{where} hold {wrong}, and the vocabulary has {size} ids: another model's tokenizer?"
    return ""
