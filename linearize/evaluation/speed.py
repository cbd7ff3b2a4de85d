"""Times of models side by side in one run, and the bytes that their caches hold."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.running import without_cache

ROUNDS = 3
SECONDS = 0.5
"""A call is timed this often, and until this long was spent on it, whichever is more; the median counts."""
_MOST = 50


def interleaved(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Median seconds of each call. Turn by turn, every second turn backwards: a slower moment of the machine
    meets all of them. Each runs once untimed before."""
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in calls]
    spent = 0.0
    for turn in range(_MOST):
        if turn >= ROUNDS and spent >= SECONDS * len(calls):
            break
        for index in _order(len(calls), turn):
            times[index].append(_seconds(calls[index], device))
            spent += times[index][-1]
    return [statistics.median(found) for found in times]


def forward_rates(models: Sequence[nn.Module], ids: Tensor) -> list[float]:
    """Tokens per second of one pass over int64 `[1, T]` by each model, without a cache."""

    def run(model: nn.Module) -> Callable[[], object]:
        inputs = without_cache(model, {"input_ids": ids.to(device_of(model))})
        return lambda: model(**inputs)

    seconds = interleaved([run(model) for model in models], device_of(models[0]))
    return [ids.numel() / second for second in seconds]


def decode_rates(
    models: Sequence[nn.Module], ids: Tensor, steps: int
) -> tuple[list[float | None], list[int | None]]:
    """Tokens per second of greedy decoding by each model, and the bytes of its cache at the end.

    ids: int64 `[1, T]`; all but the last `steps` are the prompt, so that the cache ends with T tokens. The
    models take turns token by token; the median step counts. None for a model that keeps no cache.
    """
    prompt = ids[:, : ids.shape[1] - steps]
    runs = [Decoding.start(model, prompt) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for turn in range(steps):
        for index in _order(len(runs), turn):
            run = runs[index]
            if run is not None:
                times[index].append(_seconds(run.step, run.token.device))
    rates = [1 / statistics.median(found) if found else None for found in times]
    return rates, [None if run is None else cache_bytes(run.cache) for run in runs]


class Decoding:
    """A sequence that is being continued: the likeliest next token, and the model's own cache."""

    def __init__(self, model: nn.Module, token: Tensor, cache: Any) -> None:
        self.model, self.token, self.cache = model, token, cache

    @classmethod
    def start(cls, model: nn.Module, prompt: Tensor) -> Decoding | None:
        """After the prompt int64 `[1, T]`; None for a model that gives no cache back."""
        inputs: dict[str, Any] = {"input_ids": prompt.to(device_of(model)), "use_cache": True}
        if "use_cache" not in without_cache(model, {}):
            return None
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1
        out = model(**inputs)
        cache = getattr(out, "past_key_values", None)
        return None if cache is None else cls(model, _likeliest(out), cache)

    def step(self) -> None:
        out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True)
        self.token, self.cache = _likeliest(out), out.past_key_values


def cache_bytes(cache: Any) -> int:
    """Bytes of memory behind all tensors that a cache holds on to, each counted once."""
    storages = {}
    for tensor in _tensors(cache, set()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), str(tensor.device)] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors within an object: in its attributes, and in lists, tuples and dicts. Not those of modules."""
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
    """Where the inputs of `model` belong."""
    tensor = next(model.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _order(count: int, turn: int) -> list[int]:
    return list(range(count))[:: -1 if turn % 2 else 1]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return max(time.perf_counter() - began, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _likeliest(out: Any) -> Tensor:
    return out.logits[:, -1:].argmax(-1)
