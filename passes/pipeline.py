"""What a pass is, and how passes run: in order, each only where what it needs is known, all or nothing.

The passes themselves, and their order, are in `sequence.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from .anchors import Refused
from .site import Refusal, Site
from .steps import SCORE_STEPS, StepRule
from .walk import Walk

SiteFactory = Callable[[Site], nn.Module | None]
"""The module that a site is lowered to; None leaves the site as it is."""


class PassError(ValueError):
    """A pass was run where something that it needs is not known; the message names both."""


@dataclass(frozen=True)
class Candidate:
    """What the match found at one anchor: a walk that is still to be proved, or why there is none."""

    anchor: Node
    found: Walk | Refused


@dataclass
class Work:
    """What the passes read and write: one graph, and what is known about it.

    A field that is None is not known: it was not given, or no pass has found it out.

    Attributes:
        source: The graph as it was given. No pass changes it.
        example_inputs: Positional inputs of `source`.
        score_steps: The table of spellings.
        factory: From a site to the module that it is lowered to.
        graph: A copy of `source` in the dialect, which the passes rewrite.
        candidates: Every anchor of `graph` with its walk.
        sites: The candidates that are proved; their nodes belong to `graph`.
        refusals: The candidates that are not.
        flex_refusals: By node name, why a flex_attention node of `graph` is not spelled out.
    """

    source: GraphModule
    example_inputs: Sequence[Any] | None = None
    score_steps: Sequence[StepRule] = SCORE_STEPS
    factory: SiteFactory | None = None
    graph: GraphModule | None = None
    candidates: tuple[Candidate, ...] | None = None
    sites: tuple[Site, ...] | None = None
    refusals: tuple[Refusal, ...] = ()
    flex_refusals: Mapping[str, Refused] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """The record that a pass leaves: how many of what it changed or found."""

    name: str
    count: int
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.count} {self.what}"


@dataclass(frozen=True)
class Pass:
    """One pass over a graph.

    Attributes:
        name: What the history calls it.
        needs: The fields of `Work` that it reads; each must be known.
        gives: The fields of `Work` that it sets. One that gives the graph may have rewritten it, so that
            candidates and sites found before are no longer known afterwards.
        does: What it does, in one sentence.
        counts: What the number counts that `run` returns.
        run: The pass itself; it returns how much it changed or found.
        last: Whether it ends a run.
    """

    name: str
    needs: tuple[str, ...]
    gives: tuple[str, ...]
    does: str
    counts: str
    run: Callable[[Work], int] = field(repr=False)
    last: bool = False

    def __post_init__(self) -> None:
        unknown = {*self.needs, *self.gives} - {known.name for known in fields(Work)}
        if unknown:
            raise PassError(
                f"pass {self.name!r} names {', '.join(sorted(unknown))}, which Work does not have"
            )


class Pipeline(tuple[Pass, ...]):
    """Passes in the order in which they run; `print` shows them, one a line."""

    __slots__ = ()

    def to(self, name: str) -> Pipeline:
        """The passes that lead up to `name`, itself included.

        Args:
            name: The pass to end with. Those before it that end a run themselves are left out.

        Raises:
            KeyError: There is no pass of that name.
        """
        names = [one.name for one in self]
        if name not in names:
            raise KeyError(f"no pass {name!r}; there are {', '.join(names)}")
        end = names.index(name)
        return Pipeline((*(one for one in self[:end] if not one.last), self[end]))

    def __str__(self) -> str:
        rows = [(one.name, ", ".join(one.needs), ", ".join(one.gives), one.does) for one in self]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        return "\n".join(
            f"{number}. {name:{widths[0]}}  {needs:{widths[1]}} -> {gives:{widths[2]}}  {does}"
            for number, (name, needs, gives, does) in enumerate(rows, start=1)
        )


def run_passes(passes: Sequence[Pass], work: Work) -> tuple[Change, ...]:
    """Run passes in order, each only where what it needs is known.

    `work.source` stays as it is: the first pass copies it, and the others rewrite the copy. Where a pass
    fails, the copy is dropped and `work` is as it was before the call.

    Args:
        passes: The passes in order, for example `PIPELINE.to("raise")`.
        work: The graph and what is known of it; set as the passes say.

    Returns:
        The record of each pass, in order. They are also appended to `work.graph.meta["history"]`.

    Raises:
        PassError: A pass needs something that is not known where it stands.
        Exception: Whatever a pass raises, with a note that names the pass.
    """
    before = dict(vars(work))
    work.graph = work.candidates = work.sites = None
    work.refusals = ()
    changes: list[Change] = []
    rewritten = False
    try:
        for one in passes:
            missing = [need for need in one.needs if getattr(work, need) is None]
            if missing:
                raise PassError(
                    f"pass {one.name!r} needs {' and '.join(missing)}, which is not known there: give it, or "
                    "run a pass before it that does"
                )
            try:
                count = one.run(work)
            except Exception as error:
                error.add_note(f"in the graph pass {one.name!r}")
                raise
            if "graph" in one.gives:
                work.candidates = work.sites = None
                rewritten = rewritten or count > 0
            changes.append(Change(one.name, count, one.counts))
        if work.graph is not None:
            if rewritten:
                work.graph.graph.lint()
                work.graph.recompile()
            work.graph.meta["history"] = (*work.graph.meta.get("history", ()), *changes)
    except BaseException:
        vars(work).update(before)
        raise
    return tuple(changes)
