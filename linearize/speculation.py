"""Lossless speculative decoding: `model.generate(..., custom_generate=TreeSpeculation(PromptLookup()))`.

A drafter proposes a tree of continuations, one forward pass scores all of its nodes (`draft.py`), and the
longest branch that greedy decoding would have produced is kept. The output is that of plain greedy decoding,
token for token, whatever is drafted; a good draft only makes it take fewer passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .draft import accept, tree_logits
from .errors import ConfigError, InputError


class Drafter(Protocol):
    """Anything with `propose`."""

    def propose(self, ids: Tensor) -> tuple[list[int], list[int]]:
        """A tree of guesses at what follows ids, int64 `[n]`: its tokens, and the parent of each.

        -1 is the parent of a token that comes right after ids; parents come before children. May be empty.
        """
        ...


@dataclass(frozen=True)
class PromptLookup:
    """Drafts what followed earlier occurrences of the last tokens, in the prompt or in what was generated.

    ngram: longest run of last tokens to look for, shorter ones when it is not found. depth: tokens to copy
    from each occurrence. branches: occurrences to copy from, the latest first; shared beginnings stand once.
    """

    ngram: int = 3
    depth: int = 8
    branches: int = 4

    def __post_init__(self) -> None:
        if min(self.ngram, self.depth, self.branches) < 1:
            raise ConfigError(f"ngram, depth and branches must be at least 1: {self}")

    def propose(self, ids: Tensor) -> tuple[list[int], list[int]]:
        for size in range(min(self.ngram, ids.shape[0] - 1), 0, -1):
            windows = ids[:-1].unfold(0, size, 1)
            found = (windows == ids[-size:]).all(1).nonzero()[:, 0].flip(0)[: self.branches]
            if len(found):
                sequence = ids.tolist()
                return merge([sequence[i + size : i + size + self.depth] for i in found.tolist()])
        return [], []


def merge(branches: list[list[int]]) -> tuple[list[int], list[int]]:
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


class TreeSpeculation:
    """Greedy decoding by draft trees; give it to `generate` as `custom_generate`.

    passes, tokens: forward passes over trees, and tokens they gave, in the last call.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.passes = self.tokens = 0

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` calls: int64 `[B, n]` -> `[B, n + new]`, or its output class if it was asked for.

        Raises InputError for sampling or beams, or a model whose layers do not all keep a state.
        """
        if generation_config.do_sample or generation_config.num_beams > 1 or synced_gpus:
            raise InputError("tree speculation decodes greedily: do_sample=False, num_beams=1, one process")
        cache = model_kwargs.get("past_key_values")
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        if cache is None or cache.get_seq_length() > 0:
            raise InputError(
                "tree speculation starts from an empty cache: use_cache=True, no past_key_values"
            )
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        rows = [
            _Row(ids, real.bool(), logits_processor, stopping_criteria)
            for ids, real in zip(input_ids, mask, strict=True)
        ]
        for row, logits in zip(rows, out.logits[:, -1], strict=True):
            row.choose(logits)
        self.passes = self.tokens = 0
        while not all(row.done for row in rows):
            trees = [row.tree(self.drafter) for row in rows]
            size = max(len(tokens) for tokens, _ in trees)
            tokens = torch.tensor([t + [0] * (size - len(t)) for t, _ in trees], device=input_ids.device)
            parents = torch.tensor([p + [-1] * (size - len(p)) for _, p in trees])
            logits = tree_logits(model, cache, tokens, parents)
            paths = [row.walk(*tree, scores) for row, tree, scores in zip(rows, trees, logits, strict=True)]
            length = max(map(len, paths))
            path = torch.tensor([p + [-1] * (length - len(p)) for p in paths], device=input_ids.device)
            accept(cache, path)
            self.passes += 1
            self.tokens += sum(map(len, paths))
            if streamer is not None:
                streamer.put(tokens[0, path[0]].cpu())
        if streamer is not None:
            streamer.end()
        pad = generation_config._pad_token_tensor
        sequences = torch.nn.utils.rnn.pad_sequence(
            [row.ids for row in rows], batch_first=True, padding_value=0 if pad is None else int(pad)
        )
        if generation_config.return_dict_in_generate:
            from transformers.generation import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=cache)
        return sequences


class _Row:
    """One sequence on its way: what was generated, and the token that comes next."""

    def __init__(self, ids: Tensor, real: Tensor, logits_processor: Any, stopping_criteria: Any) -> None:
        self.ids, self.done, self.next = ids, False, 0
        self._real, self._processor, self._stop = real, logits_processor, stopping_criteria

    def choose(self, logits: Tensor) -> None:
        """Greedy choice from the logits after `ids`."""
        scores = self._processor(self.ids[None], logits[None].float())
        self.next = int(scores[0].argmax())

    def tree(self, drafter: Drafter) -> tuple[list[int], list[int]]:
        """The next token, and what the drafter expects to follow it; a finished row needs any one node."""
        if self.done:
            return [0], [-1]
        prompt = self.ids[: len(self._real)][self._real]
        known = torch.cat([prompt, self.ids[len(self._real) :], self.ids.new_tensor([self.next])])
        tokens, parents = drafter.propose(known)
        return [self.next, *tokens], [-1, *(parent + 1 for parent in parents)]

    def walk(self, tokens: list[int], parents: list[int], logits: Tensor) -> list[int]:
        """Follow the branch that greedy decoding takes, as far as it was drafted: the nodes on it."""
        path: list[int] = []
        node: int | None = 0
        while not self.done and node is not None:
            path.append(node)
            self.ids = torch.cat([self.ids, self.ids.new_tensor([tokens[node]])])
            self.done = bool(self._stop(self.ids[None], None))
            self.choose(logits[node])
            children = (i for i, parent in enumerate(parents) if parent == node and tokens[i] == self.next)
            node = next(children, None)
        return path
