"""Running a model of any kind on inputs of any kind, quietly."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def quiet_run(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, random state and training flags restored afterwards.

    `nn.TransformerEncoder` packs padded input into nested tensors, which nothing here can read: not inside.
    """
    training = [(module, module.training) for module in model.modules()]
    nesting = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            for encoder in nesting:
                encoder.use_nested_tensor = False
            yield
    finally:
        for encoder in nesting:
            encoder.use_nested_tensor = True
        for module, flag in training:
            module.training = flag


def without_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with `use_cache=False` where the model takes it."""
    parameters = inspect.signature(model.forward).parameters
    kinds = {p.kind for p in parameters.values()}
    # Some heads pass `use_cache` on to their decoder without naming it.
    takes = "use_cache" in parameters or (
        "past_key_values" in parameters and inspect.Parameter.VAR_KEYWORD in kinds
    )
    if kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        # A wrapper (PEFT) that passes on whatever it is given.
        takes = hasattr(getattr(model, "config", None), "use_cache")
    return {**inputs, "use_cache": False} if takes else dict(inputs)


def call(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call with keyword inputs; positional ones are under integer-like names `0`, `1`, ..."""
    positional = [inputs[name] for name in sorted((n for n in inputs if n.isdigit()), key=int)]
    return model(*positional, **{name: value for name, value in inputs.items() if not name.isdigit()})


def generates(model: nn.Module) -> bool:
    """Whether the model decodes with a cache, as transformers has it."""
    return bool(getattr(model, "can_generate", lambda: False)())


def shapes(inputs: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}: {tuple(value.shape) if isinstance(value, Tensor) else value!r}"
        for name, value in inputs.items()
    )


def floats(output: Any) -> tuple[Tensor, ...]:
    """The floating tensors of a model's output, in order; caches are left out."""
    if isinstance(output, Tensor):
        return (output,) if output.is_floating_point() else ()
    if isinstance(output, Mapping):
        return tuple(t for key, value in output.items() if "past" not in str(key) for t in floats(value))
    if isinstance(output, (tuple, list)):
        return tuple(t for value in output for t in floats(value))
    return ()


def shortened(error: BaseException, limit: int = 360) -> str:
    """An exception as one line of at most `limit` characters: its class, how it begins and how it ends."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    head, gap = limit * 2 // 3, " [...] "
    return text if len(text) <= limit else text[:head] + gap + text[head + len(gap) - limit :]


def vocabulary_size(model: Any) -> int | None:
    """How many token ids a model has embeddings for; None for a model that does not take token ids."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
    # A vision model's "embeddings" are a convolution over patches.
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else None
