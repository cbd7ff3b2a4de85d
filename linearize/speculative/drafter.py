"""What a drafter is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..errors import InputError

Draft = tuple[list[int], list[int]]
"""A tree of tokens, and the index of the parent of each; -1 for the parent of those that come first. Parents
come before children."""


class Drafter(Protocol):
    """Guesses how sequences go on. What it guesses never changes what is generated, only how fast."""

    needs_hidden: bool
    """Whether `propose` is given the hidden states."""

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
    tokens: list[int] = []
    parents: list[int] = []
    known: dict[tuple[int, int], int] = {}
    for branch in branches:
        node = -1
        for token in branch:
            if (node, token) not in known:
                known[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
            node = known[node, token]
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
