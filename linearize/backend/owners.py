"""Whose attention is it? Telling the owner of a site from the graphs that dynamo shows of it.

A compiled graph names modules from wherever it starts, and one graph may serve several layers. What stays the
same is which tensors the owner's parameters are, and how they stand to the owner.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..mechanisms.module import AttentionModule
from ..mechanisms.spec import SiteSpec

Kinship = tuple[str, str]
"""How a parameter and an owner stand to each other: the parameter's path below what contains both, and the
owner's. It is the same in every graph, while dynamo's own paths start wherever the graph does."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a compiled graph calls a site's module.

    path, slot: the owner, as this graph names it, and which of its sites. anchors: the graph inputs that are
    parameters of the owner (or of the nearest module around it that has any), by index, and their kinship.
    spec, device, dtype: what to build.
    """

    path: str
    slot: int
    anchors: tuple[tuple[int, Kinship], ...]
    spec: SiteSpec
    device: torch.device
    dtype: torch.dtype


@dataclasses.dataclass(eq=False)
class Entry:
    """A site module, with what is needed to know its owner again. This does not keep the owner alive."""

    place: Place
    module: AttentionModule
    owner: dict[Kinship, weakref.ref[Tensor]] = dataclasses.field(default_factory=dict)

    def belongs_to(self, path: str, anchors: Sequence[tuple[int, Kinship]], values: Sequence[Any]) -> bool:
        """Whether a graph's owner is this entry's: a parameter in common, and none that differs.

        One in common is not enough, as layers may tie some of their weights.
        """
        if not anchors:
            return not self.owner and self.place.path == path
        known = [(self.owner[kin](), values[index]) for index, kin in anchors if kin in self.owner]
        return any(a is b for a, b in known) and all(a is None or a is b for a, b in known)

    @property
    def orphaned(self) -> bool:
        """Its owner had parameters, and none of them exists any more."""
        return bool(self.owner) and all(reference() is None for reference in self.owner.values())


def graph_values(graph: GraphModule) -> list[Tensor | None]:
    """The real tensor behind each input of the graph, where it is known."""
    leaves = [node.meta.get("leaf") for node in graph.graph.find_nodes(op="placeholder")]
    return [None if leaf is None else leaf.value for leaf in leaves]


def anchors_of(graph: GraphModule, path: str) -> tuple[tuple[int, Kinship], ...]:
    """The inputs that are parameters of the owner at `path`, or of the nearest module around it with any."""
    leaves = [node.meta.get("leaf") for node in graph.graph.find_nodes(op="placeholder")]
    around = path
    while True:
        found = [
            (index, _kinship(leaf.path, path))
            for index, leaf in enumerate(leaves)
            if leaf is not None and leaf.kind == "parameter" and leaf.value is not None
            if not around or leaf.path.startswith(f"{around}.")
        ]
        if found or not around:
            return tuple(found)
        around = around.rpartition(".")[0]


def _kinship(parameter: str, owner: str) -> Kinship:
    """`("layers.0.attn.q.weight", "layers.0.attn.core")` -> ("q.weight", "core")."""
    a, b = parameter.split("."), owner.split(".") if owner else []
    while a and b and a[0] == b[0]:
        a.pop(0), b.pop(0)
    return ".".join(a), ".".join(b)
