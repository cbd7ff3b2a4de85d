"""`measure_parts`: what each part of a converted decoder gives, from the model itself.

Parts are left out by the options that the mechanism names for it (`Mechanism.parts`), in copies that share
the weights and change in place; the parameters of what is left are the model's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import mechanisms
from ..common.checks import several
from ..common.copies import sharing_copy
from ..common.running import quiet_run
from ..errors import InvalidModelError, RefusedError
from ..evaluation.baseline import baseline_of, baseline_title, state_bytes
from ..evaluation.compared import Compared, kind_of
from ..evaluation.measure import TOKENS, check_settings, setting_of
from ..evaluation.parts import Part, Parts
from ..evaluation.perplexity import joined, measure_side_by_side
from ..evaluation.result import fingerprint
from ..mechanisms.module import AttentionModule
from ..planning.config import LinearizeConfig
from ..planning.state import state_of
from .linearize import linearize


class _Silent(AttentionModule):
    """No attention: zero, whatever it is given."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **ignored: Any) -> Tensor:
        """As every attention module."""
        return value.new_zeros(*query.shape[:3], value.shape[3])


def measure_parts(
    model: nn.Module,
    data: Any,
    *,
    reference: nn.Module | None = None,
    tokenizer: Any = None,
    lengths: Sequence[int] | int | None = None,
    max_tokens: int = TOKENS,
    batch_tokens: int = 2048,
    inputs: Any = None,
    name: str = "",
) -> Parts:
    """Measure the perplexity of a converted decoder with its parts added one by one.

    The model stays as it is.

    Args:
        model: A converted transformers decoder.
        data: As for `lz.evaluate`.
        reference: The original; the model's own weights with softmax by default, which are the original's
            until they are trained.
        tokenizer: The tokenizer of the model; needed for texts.
        lengths: As for `lz.evaluate`.
        max_tokens: How many tokens of the data are used at most.
        batch_tokens: How many tokens run at once.
        inputs: Example inputs, as for `lz.linearize`.
        name: A name for the data.

    Returns:
        Perplexity by length of: the original; a window and the first four tokens in a state of as many bytes;
        each part added to those before, up to the model as it is; no attention where it was rewritten.

    Raises:
        LinearizeError: As `lz.evaluate`; InvalidModelError for a model that is no converted decoder.
    """
    state = state_of(model)
    compared = Compared(model, reference)
    if any(kind_of(live) != "decoder" for live in compared.all):
        raise InvalidModelError(
            f"parts are measured of decoders, and {type(model).__name__} is an {kind_of(model)}"
        )
    asked = several(lengths)
    check_settings(asked, max_tokens, batch_tokens, 1)
    wanted = None if asked is None else sorted(set(asked))
    stream = joined(compared, data, tokenizer, max_tokens)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    lines: list[tuple[str, nn.Module, LinearizeConfig | None]] = []
    if reference is None:
        softmax = linearize(sharing_copy(model), inputs, mechanism="softmax")
        lines.append(("softmax, these weights", softmax, None))
    else:
        lines.append(("original", reference, None))
    plain = baseline_of(state.plan, state.config, dtype)
    if plain is not None:
        with contextlib.suppress(RefusedError):
            simple = linearize(sharing_copy(model), inputs, config=plain)
            lines.append((baseline_title(plain), simple, plain))
    for words, config in stages(state.config):
        lines.append((words, _with(model, config, inputs), config))
    lines.append(("no attention", _silenced(model), None))
    with contextlib.ExitStack() as stack:
        for _, live, _ in lines:
            stack.enter_context(quiet_run(live))
        figures, tokens = measure_side_by_side(
            [live for _, live, _ in lines], stream, wanted, batch_tokens, 0
        )
    rows = []
    for (words, _, settings), found in zip(lines, figures, strict=True):
        size = None if settings is None else state_bytes(state.plan, settings, dtype)
        rows.append(Part(words, size, tuple(figure.perplexity or 0.0 for figure in found.values())))
    return Parts(name, tuple(figures[0]), tokens, tuple(rows), setting_of(model), fingerprint(model))


def stages(config: LinearizeConfig) -> Iterator[tuple[str, LinearizeConfig]]:
    """What to add, one after the other, and the settings with it and without what comes later.

    What has no part to leave out comes as a whole before its convolution. The last one is `config` itself.
    """
    parts = mechanisms.get(config.mechanism).parts
    there = [part for part, off in parts.items() if any(config.option(n) != x for n, x in off.items())]
    bare = False if config.augments else config.augmentation
    if not parts or not (there or config.augments):
        yield config.mechanism, dataclasses.replace(config, augmentation=bare)
    for count, part in enumerate(there, 1):
        off = {name: value for later in there[count:] for name, value in parts[later].items()}
        options = {**config.options, **off}
        own = {layer: {**some, **off} for layer, some in config.layer_options.items()}
        yield (
            f"+ {part}",
            dataclasses.replace(config, options=options, layer_options=own, augmentation=bare),
        )
    if config.augments:
        yield "+ convolution", config


def _with(model: nn.Module, config: LinearizeConfig, inputs: Any) -> nn.Module:
    """A copy by other settings, with the model's own parameters where it has such."""
    if config == state_of(model).config:
        return model
    changed = linearize(sharing_copy(model), inputs, config=config)
    for site in state_of(changed).plan.sites:
        child, own = changed.get_submodule(site.name), model.get_submodule(site.name).state_dict()
        known = child.state_dict()
        kept = {n: x for n, x in own.items() if n in known and x.shape == known[n].shape}
        child.load_state_dict(kept, strict=False)
    return changed


def _silenced(model: nn.Module) -> nn.Module:
    """A copy whose rewritten attention gives zero."""
    twin = sharing_copy(model)
    for site in state_of(model).plan.sites:
        setattr(twin.get_submodule(site.path), site.child, _Silent(site.spec))
    return twin
