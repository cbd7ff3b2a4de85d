"""The shape of a draft tree: which ranks of a drafter's guesses are tried after which."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...errors import ConfigError

Path = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A draft tree, given by the paths of its nodes as in Medusa (Cai et al., arXiv 2401.10774).

    Args:
        paths: For each node, the ranks of the guesses that lead to it: `(0,)` is the best guess at the next
            token, `(0, 2)` the third best guess at the token after it. The parent of every node must be in
            the tree. The token that is already chosen, the root, is not a node.
        rates: `rates[d][r]`, how often the guess of rank r at depth d is right, if measured.

    Raises:
        ConfigError: A path is empty, not of ranks, given twice, or without its parent.
    """

    paths: tuple[Path, ...]
    rates: tuple[tuple[float, ...], ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        paths = [tuple(path) for path in self.paths]
        known: set[Path] = set()
        for path in sorted(paths, key=lambda path: (len(path), path)):
            if not path or any(not isinstance(rank, int) or rank < 0 for rank in path):
                raise ConfigError(f"a node of a tree is a path of ranks such as (0, 2), got {path}")
            if path in known:
                raise ConfigError(f"the tree has the node {path} twice")
            if path[:-1] and path[:-1] not in known:
                raise ConfigError(f"the tree has the node {path} but not its parent {path[:-1]}; add that")
            known.add(path)
        object.__setattr__(self, "paths", tuple(sorted(known, key=lambda path: (len(path), path))))

    @classmethod
    def from_parents(cls, parents: Sequence[int]) -> Tree:
        """Make a tree from the parents of its nodes. Children of a node are ranked in the order of the nodes.

        Args:
            parents: The index of the parent of each node, -1 for a first token.

        Raises:
            ConfigError: A node comes before its parent.
        """
        paths: list[Path] = []
        children: dict[Path, int] = {}
        for node, parent in enumerate(parents):
            if not -1 <= parent < node:
                raise ConfigError(
                    f"node {node} has parent {parent}: every node must come after its parent (a tree has no "
                    "cycles), and a first token has parent -1"
                )
            above = paths[parent] if parent >= 0 else ()
            rank = children[above] = children.get(above, -1) + 1
            paths.append((*above, rank))
        return cls(tuple(paths))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def depth(self) -> int:
        """How many tokens ahead the tree reaches."""
        return max(map(len, self.paths), default=0)

    @property
    def width(self) -> int:
        """How many guesses at each token the tree needs: one more than the highest rank."""
        return 1 + max((max(path) for path in self.paths), default=-1)

    @property
    def parents(self) -> list[int]:
        """The index of each node's parent, -1 for first tokens; nodes are in the order of `paths`."""
        index = {path: i for i, path in enumerate(self.paths)}
        return [index.get(path[:-1], -1) for path in self.paths]

    @property
    def expected_tokens(self) -> float:
        """Expected tokens per pass by `rates`, as if depths were independent: 1, plus the chance of reaching
        each node. Raises ConfigError without rates."""
        if self.rates is None:
            raise ConfigError("this tree was not fitted: it has no acceptance rates; see `fit_tree`")
        return 1 + sum(_chance(path, self.rates) for path in self.paths)


def fit_tree(rates: Iterable[Sequence[float]], nodes: int = 16) -> Tree:
    """Find the tree that is accepted furthest on average, by measured acceptance rates.

    The nodes with the greatest products of rates along their paths are taken, greedily, as in Medusa (section
    2.3.3). No tree of this size has more `expected_tokens`. Ranks that are never right are left out, so the
    tree may have fewer nodes.

    Args:
        rates: `rates[d][r]`, how often the guess of rank r at depth d is right, see
            `MedusaHeads.acceptance`.
        nodes: How many nodes the tree has at most.

    Raises:
        ConfigError: A rate is outside [0, 1], no guess is ever right, or `nodes` is below 1.
    """
    table = tuple(tuple(float(rate) for rate in row) for row in rates)
    if nodes < 1:
        raise ConfigError(f"a tree must have at least one node, got nodes={nodes}")
    if not table or any(not 0 <= rate <= 1 or math.isnan(rate) for row in table for rate in row):
        raise ConfigError("rates must be a list of shares between 0 and 1 for each depth")
    chosen: list[Path] = []
    waiting: list[tuple[float, Path]] = [(-rate, (rank,)) for rank, rate in enumerate(table[0]) if rate > 0]
    heapq.heapify(waiting)
    while waiting and len(chosen) < nodes:
        chance, path = heapq.heappop(waiting)
        chosen.append(path)
        for rank, rate in enumerate(table[len(path)] if len(path) < len(table) else ()):
            if rate > 0:
                heapq.heappush(waiting, (chance * rate, (*path, rank)))
    if not chosen:
        raise ConfigError("no guess was ever right: train on more text, measure on more, or write a Tree")
    return Tree(tuple(chosen), table)


def _chance(path: Path, rates: Sequence[Sequence[float]]) -> float:
    return math.prod(
        rates[depth][rank] if depth < len(rates) and rank < len(rates[depth]) else 0.0
        for depth, rank in enumerate(path)
    )
