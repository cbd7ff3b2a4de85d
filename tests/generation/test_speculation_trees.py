"""The shapes of drafts, and the rules by which branches are kept, without a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper

from linearize import Tree, TreeSpeculation, Typical, fit_tree
from linearize.errors import ConfigError
from linearize.generation.speculative.acceptance import Exact
from linearize.generation.speculative.lookup import PromptLookup
from linearize.generation.speculative.sequence import Chooser, GeneratedSequence, Stop

# Node 0 is the last token of the row; 1, 2 and 3 hang below it, 4 and 5 below 1, 6 below 4.
DRAFT = ([9, 1, 2, 3, 0, 2, 4], [-1, 0, 0, 0, 1, 1, 4])


def row(criteria: Any = ()) -> GeneratedSequence:
    ids = torch.tensor([7, 9])
    return GeneratedSequence(ids, torch.ones(2, dtype=torch.bool), Stop(criteria))


def walk(rule: Any, chances: Tensor, sample: bool, draft: Any = DRAFT) -> tuple[list[int], list[int]]:
    """Path and emitted tokens for probabilities `[N, V]`."""
    line = row()
    path = rule.accept_path(line, draft, chances.log(), Chooser(LogitsProcessorList(), sample))
    return path, line.ids[2:].tolist()


def test_paths_of_a_tree_are_checked() -> None:
    tree = Tree(((0, 1), (0,), (1,), (0, 0)))
    assert tree.paths == ((0,), (1,), (0, 0), (0, 1))
    assert tree.parents == [-1, -1, 0, 0] and tree.depth == 2 and tree.width == 2 and len(tree) == 4
    for paths, message in (
        (((0,), (0,)), "twice"),
        (((0,), (1, 0)), r"not its parent \(1,\)"),
        ((()), ""),
        (((),), "path of ranks"),
        (((-1,),), "path of ranks"),
    ):
        if message:
            with pytest.raises(ConfigError, match=message):
                Tree(paths)
    assert Tree.from_parents([-1, -1, 0, 0]) == tree
    for parents in ([-1, 1], [1, -1], [-1, 2, 1], [-2]):
        with pytest.raises(ConfigError, match="must come after its parent"):
            Tree.from_parents(parents)


def test_a_fitted_tree_has_the_best_chances_of_all() -> None:
    rates = [[0.6, 0.2, 0.0], [0.5, 0.3], [0.4]]
    tree = fit_tree(rates, 5)
    chances = {(0,): 0.6, (0, 0): 0.3, (1,): 0.2, (0, 1): 0.18, (0, 0, 0): 0.12}
    assert set(tree.paths) == set(chances)
    assert tree.expected_tokens == pytest.approx(1 + sum(chances.values()))
    assert len(fit_tree(rates, 100)) == 2 + 4 + 4  # the rank that is never right is left out
    with pytest.raises(ConfigError, match="no guess was ever right"):
        fit_tree([[0.0]], 3)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        fit_tree([[1.2]], 3)
    with pytest.raises(ConfigError, match="at least one node"):
        fit_tree(rates, 0)
    with pytest.raises(ConfigError, match="not fitted"):
        _ = Tree(((0,),)).expected_tokens
    with pytest.raises(ConfigError, match="makes its own trees"):
        TreeSpeculation(PromptLookup(), tree)


def test_sampled_tokens_have_the_models_distribution_whatever_is_drafted() -> None:
    """Chi-square of the first two emitted tokens against the product of the model's probabilities.

    First tokens 1, 2 and 3 are drafted and so are two of those after 1; where the walk ends the second token
    is none.
    """
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(7, 5, generator=generator).softmax(-1)
    torch.manual_seed(1)
    counts: dict[tuple[int, ...], int] = {}
    runs = 6000
    for _ in range(runs):
        _, emitted = walk(Exact(), chances, sample=True)
        counts[tuple(emitted[:2])] = counts.get(tuple(emitted[:2]), 0) + 1
    node = {1: 1, 2: 2, 3: 3}
    wanted = {(a, b): float(chances[0, a] * chances[node[a], b]) for a in node for b in range(5)} | {
        (a,): float(chances[0, a]) for a in (0, 4)
    }
    assert set(counts) <= set(wanted)
    statistic = sum((counts.get(k, 0) - runs * p) ** 2 / (runs * p) for k, p in wanted.items())
    assert statistic < 39.3  # chi-square, 16 degrees of freedom: one in a thousand is above


def test_greedy_walks_end_where_the_choice_was_not_drafted() -> None:
    chances = torch.full((7, 5), 0.1)
    chances[0, 1] = chances[1, 0] = chances[4, 3] = 0.6
    assert walk(Exact(), chances, sample=False) == ([0, 1, 4], [1, 0, 3])
    chances[0, 4] = 0.7
    assert walk(Exact(), chances, sample=False) == ([0], [4])


def test_a_row_ends_inside_a_branch() -> None:
    from transformers import EosTokenCriteria, MaxLengthCriteria

    chances = torch.full((7, 5), 0.1)
    chances[0, 1] = chances[1, 0] = chances[4, 4] = 0.6
    for criteria in ([EosTokenCriteria(torch.tensor([0, 3]))], [MaxLengthCriteria(4)]):
        for rule, chosen in ((Exact(), [0, 1]), (Typical(), [0, 1])):
            line = row(criteria)
            path = rule.accept_path(line, DRAFT, chances.log(), Chooser(LogitsProcessorList(), False))
            assert line.done and line.ids.tolist() == [7, 9, 1, 0] and path == chosen


def test_typical_acceptance_takes_the_longest_then_the_likeliest_path() -> None:
    flat = torch.full((7, 5), 0.2)
    # Flat: exp(-H) is 0.2, so everything above 0.06 is kept, and the only path of three wins.
    assert walk(Typical(), flat, sample=False)[0] == [0, 1, 4, 6]
    # Node 4 (token 0 after node 1) falls below the threshold: paths of two, of which (1, 5) is left.
    rare = flat.clone()
    rare[1] = torch.tensor([0.01, 0.24, 0.25, 0.25, 0.25])
    assert walk(Typical(), rare, sample=False)[0] == [0, 1, 5]
    assert walk(Typical(epsilon=0.005), rare, sample=False)[0] == [0, 1, 4, 6]
    # Nothing below node 1 is likely: single nodes, of which the likeliest wins, wherever it stands.
    only = flat.clone()
    only[1] = torch.tensor([0.01, 0.49, 0.01, 0.49, 0.0])
    only[2:] = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.6])
    for likeliest in (2, 3):
        only[0] = torch.full((5,), 0.15)
        only[0, likeliest] = 0.4
        assert walk(Typical(), only, sample=False) == ([0, likeliest], [likeliest, 4])


def test_typical_acceptance_processes_each_branch_with_its_own_tokens() -> None:
    seen = set()

    class Spy(LogitsProcessor):
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            seen.add(tuple(ids[0, 2:].tolist()))
            return scores

    logits = torch.zeros(7, 5)
    Typical().accept_path(row(), DRAFT, logits, Chooser(LogitsProcessorList([Spy()]), False))
    assert seen == {(), (1,), (2,), (3,), (1, 0), (1, 2), (1, 0, 4)}


def test_typical_threshold_is_the_papers() -> None:
    chances = torch.tensor([0.5, 0.25, 0.25, 0.0])
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert Typical().threshold(chances.log()) == pytest.approx(min(math.log(0.09), math.log(0.3) - entropy))
    assert Typical(0.5, 0.3).threshold(chances.log()) == pytest.approx(math.log(0.3) - entropy)
    for wrong in (dict(epsilon=0), dict(epsilon=1.5), dict(delta=0)):
        with pytest.raises(ConfigError, match="epsilon"):
            Typical(**wrong)
    with pytest.raises(ConfigError, match="acceptance is"):
        TreeSpeculation(PromptLookup(), acceptance="loose")


def test_typical_acceptance_goes_by_processed_scores() -> None:
    """A cold distribution leaves only the likeliest."""
    chances = torch.full((7, 5), 0.15)
    chances[:, 2] = 0.4
    cold = LogitsProcessorList([TemperatureLogitsWarper(0.05)])
    line = row()
    path = Typical().accept_path(line, DRAFT, chances.log(), Chooser(cold, False))
    assert path == [0, 2] and line.ids.tolist() == [7, 9, 2, 2]
    assert len(walk(Typical(), chances, sample=False)[0]) == 4
