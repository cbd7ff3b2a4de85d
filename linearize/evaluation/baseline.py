"""The simplest thing of the same size: exact softmax over a window and the first tokens, nothing else.

What we recommend must beat it, so it stands beside every figure.
"""

from __future__ import annotations

from collections import Counter

import torch

from .. import mechanisms
from ..planning.build import build_attention
from ..planning.config import LinearizeConfig
from ..planning.plan import Plan

MECHANISM = "augmented"
FIRST = 4
"""First tokens of the sequence that the baseline keeps, as StreamingLLM does."""


def state_bytes(plan: Plan, config: LinearizeConfig, dtype: torch.dtype) -> int | None:
    """Bytes of the states of one sequence, of all causal sites of a plan; None if a site would have none.

    dtype: of keys and values. Layers that stay softmax are not in the plan, and not counted.
    """
    total = 0
    causal = [site for site in plan.sites if site.spec.causal]
    kinds = Counter((site.spec, config.at(site.path, site.layer_index)) for site in causal)
    for (spec, own), count in kinds.items():
        with torch.random.fork_rng(devices=[]):  # random features draw numbers
            module = build_attention(spec, own).to(dtype)
        state = module.new_state(1, dtype=dtype, device=torch.device("cpu"))
        if state is None:
            return None
        total += count * state.nbytes
    return total


def baseline_of(plan: Plan, config: LinearizeConfig, dtype: torch.dtype) -> LinearizeConfig | None:
    """The settings of a window with the first `FIRST` tokens whose states have the bytes of `config`'s.

    It is the widest window that needs no more bytes; a window of 0, which still sees the tokens of its own
    block, where none does. The same layers stay softmax. None where `config` has no state.
    """
    size = state_bytes(plan, config, dtype)
    if not size:
        return None
    empty, one = (state_bytes(plan, _window(config, window), dtype) or 0 for window in (0, 1))
    return _window(config, max(0, (size - empty) // (one - empty)))


def _window(config: LinearizeConfig, window: int) -> LinearizeConfig:
    """Of `augmented`, all parts but the window and the first tokens left out."""
    options = {k: v for off in mechanisms.get(MECHANISM).parts.values() for k, v in off.items()}
    options |= {"window": window, "sinks": FIRST}
    which = {name: getattr(config, name) for name in ("layers", "keep_softmax", "on_refusal", "approximate")}
    return LinearizeConfig(mechanism=MECHANISM, options=options, augmentation=False, **which)


def title(config: LinearizeConfig) -> str:
    """A config in a few words: what differs from the defaults of its mechanism."""
    words = [config.mechanism, *(f"{name}={value}" for name, value in config.options.items())]
    words += [f"own options in {len(config.layer_options)} layers"] if config.layer_options else []
    default = LinearizeConfig(mechanism=config.mechanism)
    for name in ("group_size", "conv_taps", "local_scale"):
        if getattr(config, name) != getattr(default, name):
            words.append(f"{name}={getattr(config, name)}")
    if config.augments != default.augments:
        words.append("with convolution" if config.augments else "no convolution")
    return ", ".join([" ".join(words), *_layers(config)])


def baseline_title(config: LinearizeConfig) -> str:
    """A baseline in a few words."""
    return ", ".join([f"the last {config.option('window')} tokens", f"the first {FIRST}", *_layers(config)])


def _layers(config: LinearizeConfig) -> list[str]:
    """What is rewritten only in part."""
    words = []
    if config.layers is not None:
        words.append(f"only layers {' '.join(map(str, config.layers))}")
    if config.keep_softmax:
        words.append(f"softmax in {' '.join(map(str, config.keep_softmax))}")
    if config.approximate:
        words.append(f"without {' '.join(config.approximate)}")
    return words
