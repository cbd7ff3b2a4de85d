"""Rules that say which branch of a scored draft tree is accepted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ...errors import ConfigError
from .drafter import Draft
from .sequence import Chooser, GeneratedSequence


class Acceptance(Protocol):
    """A rule that accepts a path of a scored draft tree."""

    def accept_path(
        self, sequence: GeneratedSequence, draft: Draft, logits: Tensor, chooser: Chooser
    ) -> list[int]:
        """Accept a path and append its tokens to the sequence.

        Appended are the tokens of all accepted nodes but node 0, and then, unless the sequence is done, the
        token that the model chooses after the last of them.

        Args:
            sequence: The sequence. At least one token is appended to it.
            draft: The tree. Node 0 is the last token of the sequence.
            logits: `[N, vocabulary]`, the model's logits after each node.
            chooser: Chooses a token from logits as `generate` does.

        Returns:
            The accepted nodes, from node 0 downwards.
        """
        ...


class Exact:
    """Choose a token after each node as plain decoding does, and go on to the child that has this token.

    With greedy decoding the result is that of plain greedy decoding. With sampling it is that of plain
    sampling: every token is drawn from the model's own distribution given the tokens before it, and the draft
    is only asked whether it has that token. The draft is made before the draw, so it does not change the
    distribution.
    """

    def accept_path(
        self, sequence: GeneratedSequence, draft: Draft, logits: Tensor, chooser: Chooser
    ) -> list[int]:
        tokens, parents = draft
        child: dict[tuple[int, int], int] = {}
        for node in range(len(tokens) - 1, 0, -1):  # of children with the same token the first counts
            child[parents[node], tokens[node]] = node
        best = logits.argmax(-1).tolist() if chooser.plain else None
        path, node = [0], 0
        while True:
            if best is not None:
                token = best[node]
            else:
                token = chooser.pick(chooser.scores(sequence.ids, logits[node]))
            sequence.emit(token)
            follows = child.get((node, token))
            if sequence.done or follows is None:
                return path
            path.append(follows)
            node = follows


@dataclass(frozen=True)
class Typical:
    """Medusa's typical acceptance (Cai et al., arXiv 2401.10774, section 2.3.1). It is **not** lossless.

    A drafted token is accepted if the model gives it a probability p > min(epsilon, delta * exp(-H)), where H
    is the entropy, in nats, of the model's distribution at that place. The longest accepted path wins, the
    most probable one among paths of equal length, and the token after it is the model's own choice, greedy or
    sampled. The text is plausible, but it is not what plain decoding gives, and not from its distribution.

    Args:
        epsilon: In (0, 1].
        delta: Above 0.

    Raises:
        ConfigError: `epsilon` or `delta` is out of range.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if not (0 < self.epsilon <= 1 and 0 < self.delta < math.inf):
            raise ConfigError(f"typical acceptance needs 0 < epsilon <= 1 and delta > 0, got {self}")

    def accept_path(
        self, sequence: GeneratedSequence, draft: Draft, logits: Tensor, chooser: Chooser
    ) -> list[int]:
        tokens, parents = draft
        children: dict[int, list[int]] = {}
        for node in range(1, len(tokens)):
            children.setdefault(parents[node], []).append(node)
        best: tuple[int, float, list[int]] = (0, -math.inf, [])
        last: Tensor | None = None
        waiting: list[tuple[list[int], float]] = [([0], 0.0)]
        while waiting:
            path, likelihood = waiting.pop()
            scores = chooser.scores(sequence.along([tokens[node] for node in path[1:]]), logits[path[-1]])
            if (len(path), likelihood) > best[:2]:
                best, last = (len(path), likelihood, path), scores
            drafted = children.get(path[-1], [])
            if drafted:
                chances = scores[0].log_softmax(-1)
                threshold = self.threshold(chances)
                for node, chance in zip(
                    drafted, chances[[tokens[node] for node in drafted]].tolist(), strict=True
                ):
                    if chance > threshold:
                        waiting.append(([*path, node], likelihood + chance))
        path = best[2]
        assert last is not None
        for length, node in enumerate(path[1:], 1):
            sequence.emit(tokens[node])
            if sequence.done:
                return path[:length]
        sequence.emit(chooser.pick(last))
        return path

    def threshold(self, chances: Tensor) -> float:
        """The logarithm of min(epsilon, delta * exp(-H)), from log probabilities `[vocabulary]`."""
        entropy = float(-(chances.exp() * chances).nan_to_num(0.0).sum())
        return min(math.log(self.epsilon), math.log(self.delta) - entropy)


def acceptance_rule(acceptance: Any) -> Acceptance:
    """The rule named "exact", or the rule given. Raises ConfigError for anything else."""
    if acceptance == "exact":
        return Exact()
    if hasattr(acceptance, "accept_path"):
        return acceptance
    raise ConfigError(f"acceptance is 'exact' or a rule such as linearize.Typical(), got {acceptance!r}")
