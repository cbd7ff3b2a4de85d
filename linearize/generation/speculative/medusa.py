"""Drafts from Medusa heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, InputError
from .drafter import Draft
from .heads import MedusaHeads
from .tree import Tree, fit_tree

NODES = 16
"""The number of nodes of the tree that is fitted when none is given."""


class Medusa:
    """Drafts a tree of guesses by Medusa heads, all made at once from one hidden state.

    Args:
        heads: Trained heads.
        tree: Which ranks of guesses are tried after which; by default a tree fitted to `heads.rates`.

    Raises:
        ConfigError: The tree is deeper than there are heads, or wider than the vocabulary; or neither a tree
            nor rates are given.
    """

    needs_hidden = True

    def __init__(self, heads: MedusaHeads, tree: Tree | None = None) -> None:
        if tree is None:
            if heads.rates is None:
                raise ConfigError(
                    "give a tree, or measure the heads' rates with heads.acceptance(model, tokens)"
                )
            tree = fit_tree(heads.rates, NODES)
        if tree.depth > heads.num_heads:
            raise ConfigError(f"the tree is {tree.depth} deep and there are {heads.num_heads} heads")
        if tree.width > heads.fingerprint["vocabulary"]:
            raise ConfigError(f"the tree needs {tree.width} guesses of {heads.fingerprint['vocabulary']}")
        self.heads, self.tree = heads, tree
        self._parents = tree.parents
        self._places = [(len(path) - 1, path[-1]) for path in tree.paths]

    def with_tree(self, tree: Tree) -> Medusa:
        """The same heads with another tree."""
        return Medusa(self.heads, tree)

    def start(self, model: Any) -> None:
        """Raise InputError if the heads belong to a model of other sizes."""
        self.heads.check(model)

    def propose(self, ids: Sequence[Tensor], hidden: Tensor | None) -> list[Draft]:
        if hidden is None:
            raise InputError("Medusa heads draft from hidden states, and none were given")
        with torch.no_grad():
            logits = self.heads(hidden, torch.stack([row[-1] for row in ids]))
        best = logits.topk(self.tree.width, -1).indices.transpose(0, 1).tolist()
        return [([row[depth][rank] for depth, rank in self._places], self._parents) for row in best]
