"""`compare`: several settings for one model side by side, and what they must beat.

The model is searched and proved once. Each setting is then a change in place of a copy that shares the
weights (`change.py`), so a setting costs seconds before it is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..calibration.calibrate import calibrate as calibrate_model
from ..common.checks import several
from ..common.copies import sharing_copy
from ..common.running import quiet_run
from ..common.tables import Grid, Printed
from ..errors import ConfigError, InvalidModelError, RefusedError
from ..evaluation.baseline import MECHANISM, baseline_of, baseline_title, state_bytes, title
from ..evaluation.compared import Compared, kind_of
from ..evaluation.figures import Figures
from ..evaluation.measure import TOKENS, check_settings, setting_of
from ..evaluation.perplexity import joined, measure_side_by_side
from ..planning.config import LinearizeConfig
from ..planning.state import state_of
from .change import converted_here
from .linearize import linearize, resolve_config


@dataclass(frozen=True)
class ComparedSetting:
    """One line of a comparison.

    Attributes:
        name: What was measured, in words.
        config: The settings to give to `lz.linearize`; None for the model as it was given.
        state_bytes: Bytes of the constant-size states of one sequence; None without such states.
        figures: What was measured, by length. Their `cache_bytes` include the keys and values of layers that
            stay softmax.
        baseline: Name of the line with a window and the first tokens in as many bytes; None without one.
    """

    name: str
    config: LinearizeConfig | None
    state_bytes: int | None
    figures: Mapping[int, Figures]
    baseline: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """A dict that can be written as JSON."""
        return {
            "name": self.name,
            "config": None if self.config is None else self.config.to_dict(),
            "state_bytes": self.state_bytes,
            "figures": {str(length): vars(figures) for length, figures in self.figures.items()},
            "baseline": self.baseline,
        }


@dataclass(frozen=True)
class Comparison(Printed):
    """What `compare` found. It prints as a table.

    Attributes:
        rows: The original first, then every setting, each baseline after the first setting of its size.
        lengths: Tokens of context.
        tokens: How many tokens were scored at each length.
        setting: The dtype, device and threads of the run.
    """

    rows: tuple[ComparedSetting, ...]
    lengths: tuple[int, ...]
    tokens: int
    setting: str

    def row(self, name: str) -> ComparedSetting:
        """The line of that name. Raises ConfigError if there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise ConfigError(f"no line {name!r}; there are {', '.join(row.name for row in self.rows)}")

    def closed(self, row: ComparedSetting, length: int) -> float | None:
        """The share of its baseline's distance from the original, in log-perplexity, that a line closes.

        None for a line without a baseline, and where the baseline is no worse than the original.
        """
        if row.baseline is None:
            return None
        found, plain, original = (
            math.log(x.figures[length].perplexity or math.nan)
            for x in (row, self.row(row.baseline), self.rows[0])
        )
        return 1 - (found - original) / (plain - original) if plain > original else None

    def to_dict(self) -> dict[str, Any]:
        """A dict that can be written as JSON."""
        return {
            "version": 1,
            "lengths": list(self.lengths),
            "tokens": self.tokens,
            "setting": self.setting,
            "rows": [
                {**row.to_dict(), "closed": {str(n): self.closed(row, n) for n in self.lengths}}
                for row in self.rows
            ],
        }

    def blocks(self) -> Iterator[Grid | str]:
        longest = self.lengths[-1]
        fast = any(row.figures[longest].forward_tokens_per_second for row in self.rows)
        headings = (*(f"perplexity at {n:,}" for n in self.lengths), "gap closed", "state bytes")
        if fast:
            speeds = ("prefill tokens/s", "decode tokens/s", "cache bytes")
            headings = (*headings, *(f"{heading} at {longest:,}" for heading in speeds))
        rows: list[list[str]] = []
        for row in self.rows:
            last, closed = row.figures[longest], self.closed(row, longest)
            cells = [f"{row.figures[n].perplexity:.2f}" for n in self.lengths]
            cells += ["" if closed is None else f"{closed:.0%}", _count(row.state_bytes)]
            if fast:
                rates = last.forward_tokens_per_second, last.decode_tokens_per_second
                cells += [_count(rates[0]), _count(rates[1], 1), _count(last.cache_bytes)]
            rows.append([row.name, *cells])
        yield Grid(("attention", *headings), rows)
        yield (
            f"{self.tokens:,} tokens scored at each length, the same ones; measured in {self.setting}, in "
            f"turns. Gap closed: of the distance, in log-perplexity at {longest:,}, between the original and "
            "a window with the first tokens in as many bytes."
        )


def _count(value: float | int | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _setting(config: LinearizeConfig | Mapping[str, Any] | str) -> LinearizeConfig:
    return LinearizeConfig(mechanism=config) if isinstance(config, str) else resolve_config(config, {})


def compare(
    model: nn.Module,
    batches: Any,
    configs: Iterable[LinearizeConfig | Mapping[str, Any] | str],
    *,
    tokenizer: Any = None,
    lengths: Sequence[int] | int | None = None,
    calibrate: Iterable[Any] | None = None,
    max_tokens: int = TOKENS,
    batch_tokens: int = 2048,
    speed: bool = True,
    decode_tokens: int = 32,
    inputs: Any = None,
    progress: bool | None = None,
) -> Comparison:
    """Measure what several settings make of a decoder: perplexity by length, state bytes, and speed.

    Beside each stands what it must beat: exact softmax over a window and the first four tokens, in a state of
    as many bytes. Perplexity is that of `lz.evaluate`, on the same tokens at every length. For speed the
    models take turns, batch by batch and token by token. The model stays as it is; the copies that are
    rewritten share its weights.

    Args:
        model: A transformers decoder, converted or not. Of a converted one, the first line is its weights
            with softmax and the second the model as it is.
        batches: Token ids int64 `[n]` or `[B, n]`, a list of these, texts, or dicts, as for `lz.evaluate`.
        configs: The settings, each as for `lz.linearize`, or the name of a mechanism with its defaults.
        tokenizer: The tokenizer of the model; needed for texts.
        lengths: Context lengths in tokens; by default those of 128, 512 and 2048 that there is room for.
        calibrate: Batches to calibrate each setting on; it is measured as converted without them. Settings
            with nothing to fit stay as converted.
        max_tokens: How many tokens of the data are used at most.
        batch_tokens: How many tokens run at once.
        speed: Whether to measure speed and memory.
        decode_tokens: How many tokens are decoded for that.
        inputs: Example inputs, as for `lz.linearize`.
        progress: Whether to show a progress bar; on terminals and in notebooks by default.

    Returns:
        The figures, which print as a table.

    Raises:
        LinearizeError: Whatever `lz.linearize` and `lz.evaluate` raise; before anything is measured, where a
            setting cannot be applied.
        ConfigError: There is no setting, or the same one twice.
    """
    if kind_of(model) != "decoder":
        raise InvalidModelError(
            f"compare measures decoders, and {type(model).__name__} is an {kind_of(model)}: convert it and "
            "call linearize.evaluate with its original as the reference"
        )
    asked = several(lengths)
    check_settings(asked, max_tokens, batch_tokens, decode_tokens)
    wanted = None if asked is None else sorted(set(asked))
    given: Any = [configs] if isinstance(configs, str | Mapping | LinearizeConfig) else configs
    settings = [_setting(config) for config in given]
    if not settings or len(set(settings)) < len(settings):
        raise ConfigError("give one or more different settings to compare")
    plain = Compared(model, None)
    stream = joined(plain, batches, tokenizer, max_tokens)
    fit = None if calibrate is None else list(calibrate)
    lines = _lines(model, settings, inputs, fit)
    models = [line.model for line in lines]
    with _quiet(models):
        found, tokens = measure_side_by_side(
            models, stream, wanted, batch_tokens, decode_tokens if speed else 0, progress
        )
    rows = tuple(
        ComparedSetting(line.name, line.config, line.state_bytes, figures, line.baseline)
        for line, figures in zip(lines, found, strict=True)
    )
    return Comparison(rows, tuple(found[0]), tokens, setting_of(model))


@dataclass(frozen=True)
class _Line:
    """A model to measure, and what is known of it before."""

    model: nn.Module
    name: str
    config: LinearizeConfig | None = None
    state_bytes: int | None = None
    baseline: str | None = None


def _lines(
    model: nn.Module, settings: Sequence[LinearizeConfig], inputs: Any, batches: Sequence[Any] | None
) -> list[_Line]:
    """Every model to measure: the original, then the settings with their baselines."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    given = converted_here(model)
    if given:
        base = sharing_copy(model)
        linearize(base, inputs, mechanism="softmax")
        state = state_of(model)
        size = state_bytes(state.plan, state.config, dtype)
        lines = [
            _Line(base, "softmax, these weights"),
            _Line(model, f"{title(state.config)}, as given", state.config, size),
        ]
    else:
        lines = [_Line(model, "softmax, original")]
        base = linearize(sharing_copy(model), inputs, mechanism="softmax", on_refusal="keep")
    plain: dict[LinearizeConfig, str] = {}
    for config in settings:
        live = _changed(base, config, None if given else model, inputs)
        if batches is not None:
            with contextlib.suppress(InvalidModelError):  # the mechanism has nothing to fit
                calibrate_model(live, batches)
        plan = state_of(live).plan
        simple = baseline_of(plan, config, dtype)
        name = _unique(title(config), [line.name for line in lines])
        line = _Line(live, name, config, state_bytes(plan, config, dtype))
        if simple is None or _same(config, simple):
            lines.append(line)
            continue
        added = []
        if simple not in plain:
            try:
                other = _changed(base, simple, None, inputs)
            except RefusedError:
                lines.append(line)
                continue
            plain[simple] = _unique(baseline_title(simple), [line.name for line in lines])
            size = state_bytes(plan, simple, dtype)
            added = [_Line(other, plain[simple], simple, size)]
        lines += [dataclasses.replace(line, baseline=plain[simple]), *added]
    return lines


def _changed(base: nn.Module, config: LinearizeConfig, original: nn.Module | None, inputs: Any) -> nn.Module:
    """A copy of `base` by other settings. original: what to convert, and be refused by, if that cannot be."""
    try:
        return linearize(sharing_copy(base), inputs, config=config)
    except InvalidModelError:
        if original is None:
            raise
        return linearize(sharing_copy(original), inputs, config=config)


def _same(config: LinearizeConfig, simple: LinearizeConfig) -> bool:
    """Whether `config` is its own baseline."""
    parts = {name: config.option(name) for name in simple.options} if config.mechanism == MECHANISM else None
    return parts == dict(simple.options) and not config.augments and not config.layer_options


def _unique(name: str, taken: Iterable[str]) -> str:
    return name if name not in set(taken) else _unique(f"{name}, again", taken)


@contextlib.contextmanager
def _quiet(models: Iterable[nn.Module]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(quiet_run(model))
        yield
