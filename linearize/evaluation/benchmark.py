"""`benchmark`: speed and memory of decoders against length, on the machine that it runs on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..common.checks import require, require_whole, several
from ..common.progress import bar
from ..common.running import quiet_run, vocabulary_size
from ..common.tables import Grid, Printed
from ..errors import InputError, InvalidModelError
from .compared import kind_of, positions
from .measure import setting_of
from .result import describe
from .speed import Decoding, decode_rates, device_of, interleaved

LENGTHS = (512, 2048, 8192)


@dataclass(frozen=True)
class Speed:
    """One model at one length.

    Attributes:
        model: Its class and the mechanism of its attention.
        length: Tokens of the sequence.
        prefill_tokens_per_second: The rate of reading a prompt of `length` tokens into a cache.
        decode_tokens_per_second: The rate of greedy decoding up to `length` tokens.
        cache_bytes: The memory of the cache then.
    """

    model: str
    length: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    cache_bytes: int | None


@dataclass(frozen=True)
class Benchmark(Printed):
    """What `benchmark` measured. It prints as a table.

    Attributes:
        rows: The models at each length, in turn.
        setting: The dtype, device and threads of the run.
    """

    rows: tuple[Speed, ...]
    setting: str

    def to_dict(self) -> dict[str, Any]:
        """A dict that can be written as JSON."""
        return {"version": 1, "setting": self.setting, "rows": [dataclasses.asdict(x) for x in self.rows]}

    def blocks(self) -> Iterator[Grid | str]:
        headings = ("length", "model", "prefill tokens/s", "decode tokens/s", "cache bytes")
        cells = [
            (
                f"{row.length:,}",
                row.model,
                f"{row.prefill_tokens_per_second:,.0f}",
                "" if row.decode_tokens_per_second is None else f"{row.decode_tokens_per_second:,.1f}",
                "" if row.cache_bytes is None else f"{row.cache_bytes:,}",
            )
            for row in self.rows
        ]
        yield Grid(headings, cells)
        yield f"Random tokens, one sequence; the models take turns. Measured in {self.setting}."


def benchmark(
    models: Mapping[str, nn.Module] | Sequence[nn.Module],
    *,
    lengths: Sequence[int] | int | None = None,
    decode_tokens: int = 32,
    progress: bool | None = None,
) -> Benchmark:
    """Measure how fast decoders read and write, and what their caches hold, at several lengths.

    Args:
        models: Decoders of transformers with one vocabulary, by the names to print or without.
        lengths: Tokens of a sequence; by default those of 512, 2048 and 8192 that the models have room for.
        decode_tokens: How many tokens are decoded.
        progress: Whether to show a progress bar; on terminals and in notebooks by default.

    Returns:
        The figures.

    Raises:
        InvalidModelError: A model is no decoder.
        ConfigError: A setting is out of range.
        InputError: The models have no room for a length.
    """
    named = dict(models) if isinstance(models, Mapping) else {describe(model): model for model in models}
    for model in named.values():
        if kind_of(model) != "decoder":
            raise InvalidModelError(
                f"a benchmark is of decoders; {type(model).__name__} is an {kind_of(model)}"
            )
    require_whole("decode_tokens", decode_tokens)
    room = min(map(positions, named.values()))
    wanted = several(lengths) or tuple(n for n in LENGTHS if n <= room) or (room,)
    whole = isinstance(wanted, tuple) and all(isinstance(n, int) and n > 1 for n in wanted)
    require(whole, "lengths", lengths, "2 or more tokens each")
    if max(wanted) > room:
        raise InputError(f"the models have room for {room} tokens: give lengths up to that")
    rows: list[Speed] = []
    with bar("bench", len(wanted), progress, "lengths") as tick:
        for length in sorted(set(wanted)):
            rows += _at(named, length, decode_tokens)
            tick(1)
    return Benchmark(tuple(rows), setting_of(next(iter(named.values()))))


def _at(named: Mapping[str, nn.Module], length: int, decode_tokens: int) -> list[Speed]:
    models = list(named.values())
    size = min(vocabulary_size(model) or 2 for model in models)
    ids = torch.randint(size, (1, length), generator=torch.Generator().manual_seed(0))
    found = []
    for model in models:
        with quiet_run(model):
            (seconds,) = interleaved([partial(Decoding.start, model, ids)], device_of(model))
            (rate,), (held,) = decode_rates([model], ids, min(decode_tokens, length - 1))
        found.append((length / seconds, rate, held))
    return [Speed(name, length, *figures) for name, figures in zip(named, found, strict=True)]
