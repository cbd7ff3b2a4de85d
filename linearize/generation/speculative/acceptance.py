"""Which branch of a scored tree is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ...errors import ConfigError
from .drafter import Draft
from .rows import Chooser, Row

Record = Callable[[Tensor, Tensor], Any]


class Acceptance(Protocol):
    """A rule that walks a scored tree."""

    def walk(self, row: Row, draft: Draft, logits: Tensor, chooser: Chooser) -> list[int]:
        """Emit tokens on the row, one at least, and return the nodes on the path that was kept.

        draft: node 0 is the token that the row ends with. logits: `[N, vocabulary]`, after each node. The
        path starts with node 0; all nodes after it were emitted in this call, and so was the token that
        follows its last node, unless the row is done before.
        """
        ...


class Exact:
    """Choose after each node as plain decoding would, and follow the child that was chosen.

    Greedily this is plain greedy decoding. With sampling it is plain sampling: every token is drawn from the
    model's own distribution, given the tokens before it; the draft is only asked whether it holds that
    token. So the draft, as long as it was made before the draw, does not change the distribution.
    """

    def walk(self, row: Row, draft: Draft, logits: Tensor, chooser: Chooser) -> list[int]:
        tokens, parents = draft
        child: dict[tuple[int, int], int] = {}
        for node in range(len(tokens) - 1, 0, -1):  # of equal children the first stays
            child[parents[node], tokens[node]] = node
        best = logits.argmax(-1).tolist() if chooser.plain else None
        path, node = [0], 0
        while True:
            if best is not None:
                token = best[node]
            else:
                token = chooser.pick(chooser.scores(row.ids, logits[node]))
            row.emit(token)
            follows = child.get((node, token))
            if row.done or follows is None:
                return path
            path.append(follows)
            node = follows


@dataclass(frozen=True)
class Typical:
    """Medusa's typical acceptance (Cai et al., arXiv 2401.10774, section 2.3.1): **not** lossless.

    A drafted token is kept when the model gives it a probability p > min(epsilon, delta * exp(-H)), where H
    is the entropy, in nats, of the model's distribution at that place. Of the kept paths the longest wins,
    of equally long ones the most probable, and the token after it is the model's own choice, greedy or drawn.
    The text is plausible, but not what plain decoding gives, and not its distribution.

    epsilon: in (0, 1]; delta: positive. Raises ConfigError for others.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        if not (0 < self.epsilon <= 1 and 0 < self.delta < math.inf):
            raise ConfigError(f"typical acceptance needs 0 < epsilon <= 1 and delta > 0, got {self}")

    def walk(self, row: Row, draft: Draft, logits: Tensor, chooser: Chooser) -> list[int]:
        tokens, parents = draft
        children: dict[int, list[int]] = {}
        for node in range(1, len(tokens)):
            children.setdefault(parents[node], []).append(node)
        best: tuple[int, float, list[int]] = (0, -math.inf, [])
        last: Tensor | None = None
        waiting: list[tuple[list[int], float]] = [([0], 0.0)]
        while waiting:
            path, likelihood = waiting.pop()
            scores = chooser.scores(row.along([tokens[node] for node in path[1:]]), logits[path[-1]])
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
            row.emit(tokens[node])
            if row.done:
                return path[:length]
        row.emit(chooser.pick(last))
        return path

    def threshold(self, chances: Tensor) -> float:
        """Log of the least probability that is kept, from log probabilities `[vocabulary]`."""
        entropy = float(-(chances.exp() * chances).nan_to_num(0.0).sum())
        return min(math.log(self.epsilon), math.log(self.delta) - entropy)


def rule(acceptance: Any) -> Acceptance:
    """The rule by its name or itself. Raises ConfigError for any other."""
    if acceptance == "exact":
        return Exact()
    if hasattr(acceptance, "walk"):
        return acceptance
    raise ConfigError(f"acceptance is 'exact' or a rule such as linearize.Typical(), got {acceptance!r}")
