"""Times of models that take turns, and the memory of their caches."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..common.running import without_cache

Result = TypeVar("Result")
ROUNDS = 3
SECONDS = 0.5
"""A call is timed at least this often, and until this long was spent on it. The median counts."""
_MOST = 50


def interleaved(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The median seconds of each call, after one call that is not timed.

    They take turns, every second turn in reverse order, so that a slow moment of the machine hits all.
    """
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    spent = 0.0
    for turn in range(_MOST):
        if turn >= ROUNDS and spent >= SECONDS * len(calls):
            break
        for index in in_turn(len(calls), turn):
            times[index].append(_seconds(calls[index], device))
            spent += times[index][-1]
    return [statistics.median(found) for found in times]


def forward_rates(models: Sequence[nn.Module], ids: Tensor) -> list[float]:
    """Tokens per second of a forward pass over int64 `[1, T]` by each model, without a cache."""

    def forward(model: nn.Module) -> Callable[[], object]:
        inputs = without_cache(model, {"input_ids": ids.to(device_of(model))})
        return lambda: model(**inputs)

    seconds = interleaved([forward(model) for model in models], device_of(models[0]))
    return [ids.numel() / second for second in seconds]


def decode_rates(
    models: Sequence[nn.Module], ids: Tensor, steps: int
) -> tuple[list[float | None], list[int | None]]:
    """Time greedy decoding. The models take turns token by token, and the median step counts.

    Args:
        models: The models.
        ids: int64 `[1, T]`. All but the last `steps` tokens are the prompt, so the cache ends with T tokens.
        steps: How many tokens to decode.

    Returns:
        Tokens per second of each model, and the bytes of its cache at the end; None for a model without one.
    """
    prompt = ids[:, : ids.shape[1] - steps]
    running = [Decoding.start(model, prompt) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for turn in range(steps):
        for index in in_turn(len(running), turn):
            decoding = running[index]
            if decoding is not None:
                times[index].append(_seconds(decoding.step, decoding.token.device))
    rates = [1 / statistics.median(found) if found else None for found in times]
    return rates, [None if decoding is None else cache_bytes(decoding.cache) for decoding in running]


class Decoding:
    """A sequence during greedy decoding: its next token, and its cache."""

    def __init__(self, model: nn.Module, token: Tensor, cache: Any) -> None:
        self.model, self.token, self.cache = model, token, cache

    @classmethod
    def start(cls, model: nn.Module, prompt: Tensor) -> Decoding | None:
        """Process the prompt int64 `[1, T]`. None for a model that returns no cache."""
        inputs: dict[str, Any] = {"input_ids": prompt.to(device_of(model)), "use_cache": True}
        if "use_cache" not in without_cache(model, {}):
            return None
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1
        out = model(**inputs)
        cache = getattr(out, "past_key_values", None)
        return None if cache is None else cls(model, _likeliest(out), cache)

    def step(self) -> None:
        """Decode one token."""
        out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        self.token, self.cache = _likeliest(out), out.past_key_values


def cache_bytes(cache: Any) -> int:
    """The bytes of memory behind all tensors of a cache, each counted once."""
    storages = {}
    for tensor in _tensors(cache, set()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), str(tensor.device)] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in an object: in its attributes, and in lists, tuples and dicts. Not those of modules."""
    if id(value) in seen or isinstance(value, (nn.Module, type, str, int, float)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, seen)
    elif not callable(value):
        for item in getattr(value, "__dict__", {}).values():
            yield from _tensors(item, seen)


def device_of(model: nn.Module) -> torch.device:
    """The device that the inputs of `model` must be on."""
    tensor = next(model.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def in_turn(count: int, turn: int) -> list[int]:
    """The order of `count` things in a turn: every second one is in reverse."""
    return list(range(count))[:: -1 if turn % 2 else 1]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    return timed(call, device)[1]


def timed(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a call gives, and the seconds it took on a device."""
    _wait(device)
    began = time.perf_counter()
    result = call()
    _wait(device)
    return result, max(time.perf_counter() - began, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _likeliest(out: Any) -> Tensor:
    return out.logits[:, -1:].argmax(-1)
