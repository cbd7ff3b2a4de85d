"""One sequence on its way: its tokens in a buffer that grows, how tokens are chosen, and when it ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Row:
    """A sequence being generated.

    ids: int64 `[n]`, the prompt. real: bool `[n]`, False for padding. stop: of this generation.
    """

    def __init__(self, ids: Tensor, real: Tensor, stop: Stop) -> None:
        self.done = False
        self.start = ids.shape[0]
        self._stop = stop
        self._all = _Buffer(ids)
        # What a drafter sees: without padding, and the same memory where there is none.
        self._known = self._all if bool(real.all()) else _Buffer(ids[real])

    @property
    def ids(self) -> Tensor:
        """All tokens, as `generate` would have them: int64 `[n]`."""
        return self._all.view()

    @property
    def known(self) -> Tensor:
        """All tokens but the padding."""
        return self._known.view()

    @property
    def generated(self) -> int:
        return self._all.length - self.start

    def emit(self, token: int) -> None:
        """Add a token; the row may be done then."""
        self._all.append(token)
        if self._known is not self._all:
            self._known.append(token)
        self.done = self._stop(self._all, token)

    def along(self, tokens: list[int]) -> Tensor:
        """`ids` with these tokens after them, which are not added: valid until the next call."""
        return self._all.extended(tokens)


class _Buffer:
    """Tokens in memory that doubles when it is full, so that adding one does not copy the sequence."""

    def __init__(self, ids: Tensor) -> None:
        self.length = ids.shape[0]
        self._memory = ids.new_empty(self.length + 256)
        self._memory[: self.length] = ids

    def view(self) -> Tensor:
        return self._memory[: self.length]

    def append(self, token: int) -> None:
        self._reserve(self.length + 1)
        self._memory[self.length] = token
        self.length += 1

    def extended(self, tokens: list[int]) -> Tensor:
        length = self.length + len(tokens)
        if tokens:
            self._reserve(length)
            self._memory[self.length : length] = torch.tensor(tokens, device=self._memory.device)
        return self._memory[:length]

    def _reserve(self, length: int) -> None:
        if length > self._memory.shape[0]:
            memory = self._memory.new_empty(2 * length)
            memory[: self.length] = self.view()
            self._memory = memory


class Stop:
    """The stopping criteria of a call of `generate`, with its two usual ones (length and end tokens) as
    plain numbers: they run once for every token."""

    def __init__(self, criteria: Any) -> None:
        from transformers.generation.stopping_criteria import (
            EosTokenCriteria,
            MaxLengthCriteria,
            StoppingCriteriaList,
        )

        self._max_length: int | None = None
        self._ends: set[int] = set()
        others = []
        for item in criteria:
            if type(item) is MaxLengthCriteria:
                self._max_length = min(item.max_length, self._max_length or item.max_length)
            elif type(item) is EosTokenCriteria:
                self._ends |= set(item.eos_token_id.flatten().tolist())
            else:
                others.append(item)
        self._others = StoppingCriteriaList(others)

    def __call__(self, ids: _Buffer, token: int) -> bool:
        if token in self._ends or (self._max_length is not None and ids.length >= self._max_length):
            return True
        return bool(self._others) and bool(self._others(ids.view()[None], None))


class Chooser:
    """How the next token is chosen from logits: processors, then the greatest or a draw, as `generate` does.

    plain: it is the greatest of the logits as they are.
    """

    def __init__(self, processors: Any, sample: bool) -> None:
        self._processors = processors
        self._sample = sample
        self.plain = not sample and len(processors) == 0

    def scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Processed logits `[1, vocabulary]` in float32 of what follows ids `[n]`; logits `[vocabulary]`."""
        logits = logits[None].to(torch.float32, copy=True)
        return self._processors(ids[None], logits) if len(self._processors) else logits

    def pick(self, scores: Tensor) -> int:
        """A token by its scores `[1, vocabulary]`: a draw from their softmax, or the greatest."""
        if self._sample:
            return int(torch.multinomial(scores.softmax(-1), num_samples=1))
        return int(scores.argmax())
