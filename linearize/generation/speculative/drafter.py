"""What a drafter is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ...errors import ConfigError, InputError

Draft = tuple[list[int], list[int]]
"""A tree of tokens, and the index of the parent of each; -1 for the parent of those that come first. Parents
come before children."""


class Drafter(Protocol):
    """Guesses how sequences go on. What it guesses never changes what is generated, only how fast."""

    @property
    def needs_hidden(self) -> bool:
        """Whether `propose` is given the hidden states."""
        ...

    def start(self, model: Any) -> None:
        """A generation with `model` begins. Raises InputError when the two do not fit together."""
        ...

    def propose(self, ids: Sequence[Tensor], hidden: Tensor | None) -> list[Draft]:
        """For every sequence a tree of guesses at what follows it; it may be empty.

        ids: int64 `[n]` each, without padding, always the same sequences in the same order; one that has
        ended stays as it was, and what is proposed for it is not used. hidden: `[B, hidden_size]`, what the
        model's output layer saw where it chose the last token of each; None unless `needs_hidden`.
        """
        ...


def merge(branches: Iterable[Sequence[int]]) -> Draft:
    """Continuations as one tree in which every shared beginning stands once: tokens and parents."""
    return union((list(branch), list(range(-1, len(branch) - 1))) for branch in branches)


class Several:
    """Drafters whose drafts are tried together, as one tree. What two of them expect stands in it once."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if not drafters:
            raise ConfigError("name one drafter at least")
        self.drafters = tuple(drafters)
        self.needs_hidden = any(drafter.needs_hidden for drafter in self.drafters)

    def start(self, model: Any) -> None:
        for drafter in self.drafters:
            drafter.start(model)

    def propose(self, ids: Sequence[Tensor], hidden: Tensor | None) -> list[Draft]:
        proposals = [d.propose(ids, hidden if d.needs_hidden else None) for d in self.drafters]
        return [union(drafts) for drafts in zip(*proposals, strict=True)]


def union(drafts: Iterable[Draft]) -> Draft:
    """Trees as one, in which every shared beginning stands once."""
    tokens: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}
    for draft in drafts:
        place = [-1]  # of each node in the union, after that of the parent of first tokens
        for token, parent in zip(*draft, strict=True):
            key = place[parent + 1], token
            if key not in known:
                known[key] = len(tokens)
                tokens.append(token)
                parents.append(key[0])
            place.append(known[key])
    return tokens, parents


def vocabulary(model: Any) -> int:
    """Tokens that the model's output layer scores."""
    return int(output_layer(model).weight.shape[0])


def output_layer(model: Any) -> Any:
    """The module that makes logits of hidden states. Raises InputError for a model without one."""
    get = getattr(model, "get_output_embeddings", None)
    layer = get() if get is not None else None
    if layer is None or getattr(layer, "weight", None) is None:
        raise InputError(
            f"{type(model).__name__} has no output layer that makes logits of hidden states; give a decoder "
            "with its language-modelling head, such as AutoModelForCausalLM loads"
        )
    return layer
