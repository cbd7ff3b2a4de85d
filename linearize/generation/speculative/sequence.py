"""A sequence being generated: its tokens, how the next one is chosen, and when it ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GeneratedSequence:
    """A sequence being generated.

    Args:
        ids: int64 `[n]`, the prompt.
        real: bool `[n]`, False for padding.
        stop: Decides when the sequence is done.
    """

    def __init__(self, ids: Tensor, real: Tensor, stop: Stop) -> None:
        self.done = False
        self.start = ids.shape[0]
        self._stop = stop
        self._all = _Buffer(ids)
        # What a drafter gets: the tokens without padding. Without any padding it is the same buffer.
        self._known = self._all if bool(real.all()) else _Buffer(ids[real])

    @property
    def ids(self) -> Tensor:
        """All tokens with the padding, as in `generate`: int64 `[n]`."""
        return self._all.view()

    @property
    def known(self) -> Tensor:
        """All tokens without the padding: int64 `[n]`."""
        return self._known.view()

    @property
    def generated(self) -> int:
        """The number of tokens after the prompt."""
        return self._all.length - self.start

    def emit(self, token: int) -> None:
        """Append a token, and update `done`."""
        self._all.append(token)
        if self._known is not self._all:
            self._known.append(token)
        self.done = self._stop(self._all, token)

    def along(self, tokens: list[int]) -> Tensor:
        """`ids` followed by these tokens, which are not added to the sequence. Valid until the next call."""
        return self._all.extended(tokens)


class _Buffer:
    """Tokens in memory that doubles when it is full, so that appending does not copy the sequence."""

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
    """Chooses the next token from logits as `generate` does: processors, then the greatest or a sample.

    plain: True when the choice is the greatest of the unchanged logits.
    """

    def __init__(self, processors: Any, sample: bool) -> None:
        self._processors = processors
        self._sample = sample
        self.plain = not sample and len(processors) == 0

    def scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Process the logits `[vocabulary]` after ids `[n]`: float32 `[1, vocabulary]`."""
        logits = logits[None].to(torch.float32, copy=True)
        return self._processors(ids[None], logits) if len(self._processors) else logits

    def pick(self, scores: Tensor) -> int:
        """Choose a token from its scores `[1, vocabulary]`: a sample from their softmax, or the greatest."""
        if self._sample:
            return int(torch.multinomial(scores.softmax(-1), num_samples=1))
        return int(scores.argmax())
