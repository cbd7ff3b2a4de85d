"""The interface of drafters, and the model's output layer that they share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ...errors import ConfigError, InputError

Draft = tuple[list[int], list[int]]
"""A tree: its tokens, and the index of the parent of each, -1 for those that come first. Parents come before
their children."""


class Drafter(Protocol):
    """Guesses how sequences continue. With exact acceptance this changes the speed, never the result."""

    @property
    def needs_hidden(self) -> bool:
        """Whether `propose` needs hidden states."""
        ...

    def start(self, model: Any) -> None:
        """Prepare for a new generation. Raises InputError when the drafter does not fit the model."""
        ...

    def propose(self, ids: Sequence[Tensor], hidden: Tensor | None) -> list[Draft]:
        """Guess what follows each sequence.

        Args:
            ids: One int64 `[n]` per sequence, without padding, in the same order in every call. A sequence
                that is done no longer changes, and its draft is not used.
            hidden: `[B, hidden_size]`, the hidden states from which the last tokens were chosen; None unless
                `needs_hidden`.

        Returns:
            One tree per sequence; it may be empty.
        """
        ...


def merge(branches: Iterable[Sequence[int]]) -> Draft:
    """Join token sequences to one tree, in which every shared beginning occurs once."""
    return union((list(branch), list(range(-1, len(branch) - 1))) for branch in branches)


class Several:
    """Several drafters. Their drafts are joined to one tree, in which equal guesses occur once."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if not drafters:
            raise ConfigError("give at least one drafter")
        self.drafters = tuple(drafters)
        self.needs_hidden = any(drafter.needs_hidden for drafter in self.drafters)

    def start(self, model: Any) -> None:
        for drafter in self.drafters:
            drafter.start(model)

    def propose(self, ids: Sequence[Tensor], hidden: Tensor | None) -> list[Draft]:
        proposals = [d.propose(ids, hidden if d.needs_hidden else None) for d in self.drafters]
        return [union(drafts) for drafts in zip(*proposals, strict=True)]


def union(drafts: Iterable[Draft]) -> Draft:
    """Join trees to one, in which every shared beginning occurs once."""
    tokens: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}
    for draft in drafts:
        joined = [-1]  # index in the union of the parent of first tokens, and then of each node
        for token, parent in zip(*draft, strict=True):
            key = joined[parent + 1], token
            if key not in known:
                known[key] = len(tokens)
                tokens.append(token)
                parents.append(key[0])
            joined.append(known[key])
    return tokens, parents


def output_size(model: Any) -> int:
    """The number of tokens that the model's output layer scores."""
    return int(output_layer(model).weight.shape[0])


def output_layer(model: Any) -> Any:
    """The module that turns hidden states into logits. Raises InputError for a model without one."""
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if get is not None else None
    if layer is None or getattr(layer, "weight", None) is None:
        raise InputError(
            f"{type(model).__name__} has no output layer that turns hidden states into logits; give a "
            "decoder with its language-modelling head, such as AutoModelForCausalLM loads"
        )
    return layer
