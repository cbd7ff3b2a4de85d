"""Drafts from a small decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ...cache.draft_tree import accept, tree_logits
from ...common.checks import excerpt
from ...errors import ConfigError, InputError
from .drafter import Draft, output_size


class DraftModel:
    """Drafts what a smaller model with the same tokenizer predicts, greedily.

    Its cache holds the accepted tokens alone: drafts are scored as trees and never enter the cache, so
    nothing has to be undone.

    Args:
        model: A decoder, converted or not.
        depth: How many tokens to draft ahead.
        branches: How many of the best first tokens are each continued greedily.

    Raises:
        ConfigError: `depth` or `branches` is below 1, or the model is none.
    """

    needs_hidden = False

    def __init__(self, model: Any, depth: int = 4, branches: int = 1) -> None:
        if min(depth, branches) < 1:
            raise ConfigError(f"depth and branches must be at least 1, got {depth} and {branches}")
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model must be a loaded decoder, got {excerpt(model)}")
        self.model: Any = model
        self.depth, self.branches = depth, branches
        self._cache: Any = None
        self._columns: Tensor | None = None
        self._fed: list[int] = []

    def start(self, model: Any) -> None:
        """Forget the last generation. Raises InputError if the vocabularies of the models differ in size."""
        own, other = output_size(self.model), output_size(model)
        if own != other:
            raise InputError(
                f"the draft model has {own} tokens and the model {other}: a draft model needs the same "
                "tokenizer"
            )
        self._cache = self._columns = None
        self._fed = []

    @torch.no_grad()
    def propose(self, ids: Sequence[Tensor], hidden: Tensor | None) -> list[Draft]:
        logits = self._catch_up(ids)
        tokens = logits.topk(min(self.branches, logits.shape[-1]), -1).indices  # [B, branches]
        width = tokens.shape[1]
        parents = [-1] * width
        for _ in range(self.depth - 1):
            tree = torch.tensor(parents)
            scores = tree_logits(self.model, self._cache, tokens, tree, self._columns)[:, -width:]
            parents += range(len(parents) - width, len(parents))
            tokens = torch.cat([tokens, scores.argmax(-1)], 1)
        return [(row, parents) for row in tokens.tolist()]

    def _catch_up(self, ids: Sequence[Tensor]) -> Tensor:
        """Add the accepted tokens to the cache, and return the logits `[B, vocabulary]` that follow them."""
        if self._cache is None:
            return self._prompt(ids)
        new = [row[fed:] for row, fed in zip(ids, self._fed, strict=True)]
        counts = torch.tensor([len(row) for row in new], device=new[0].device)
        tokens = torch.nn.utils.rnn.pad_sequence(list(new), batch_first=True)
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        # The accepted tokens form a tree without branches, because rows may have different numbers of them.
        logits = tree_logits(self.model, self._cache, tokens, steps.cpu() - 1, self._columns)
        path = steps.expand_as(tokens).where(steps < counts[:, None], -1)
        accept(self._cache, path)
        assert self._columns is not None
        self._columns = torch.cat([self._columns, (path >= 0).long()], 1)
        self._fed = [len(row) for row in ids]
        return logits[torch.arange(len(ids), device=tokens.device), (counts - 1).clamp_min(0)]

    def _prompt(self, ids: Sequence[Tensor]) -> Tensor:
        longest = max(len(row) for row in ids)
        tokens = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in ids])
        self._columns = torch.stack(
            [torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in ids]
        )
        positions = (self._columns.cumsum(1) - 1).clamp_min(0)
        # Only the logits of the last token are needed.
        less = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        self._cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        out = self.model(
            input_ids=tokens,
            attention_mask=self._columns,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **less,
        )
        self._fed = [len(row) for row in ids]
        return out.logits[:, -1]
