"""Observing attention: exact softmax in place of a module, whose calls a watcher sees and may answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..mechanisms.module import AttentionModule, SoftmaxAttention
from ..planning.plan import SitePlan


@dataclass(frozen=True)
class Observation:
    """One call of a site's attention, and what softmax gave.

    Attributes:
        query: `[B, H, T, D]`.
        key: `[B, Hkv, S, D]`.
        value: `[B, Hkv, S, Dv]`.
        target: `[B, H, T, Dv]`, the output of softmax.
        key_mask: bool `[B, S]`, False at padding; None without padding.
        query_start: The position of the first query among the keys; None for the last T positions.
        cross: Whether this is cross-attention.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    target: Tensor
    key_mask: Tensor | None
    query_start: int | Tensor | None
    cross: bool

    def real_queries(self) -> Tensor:
        """bool `[B, T]`: the queries that are not padding. All in cross-attention: no mask is of queries."""
        batch, _, length, _ = self.query.shape
        if self.key_mask is None or self.cross:
            return torch.ones(batch, length, dtype=torch.bool, device=self.query.device)
        start = self.key.shape[2] - length if self.query_start is None else self.query_start
        return self.key_mask[:, torch.arange(length, device=self.query.device) + start]


class Watcher(Protocol):
    """Gets every call of one attention site."""

    @property
    def module(self) -> Any:
        """The site's own module, which exact softmax replaces meanwhile."""

    def see(self, call: Observation) -> Tensor | None:
        """Take one call; the output to pass on in place of softmax's, if not that."""


@contextlib.contextmanager
def watching(model: nn.Module, watchers: Mapping[SitePlan, Watcher]) -> Iterator[None]:
    """Replace the modules of these sites by exact softmax, and put them back at the end."""
    try:
        for site, watcher in watchers.items():
            setattr(model.get_submodule(site.path), site.child, observer(watcher, site))
        yield
    finally:
        for site, watcher in watchers.items():
            setattr(model.get_submodule(site.path), site.child, watcher.module)


def observer(watcher: Watcher, site: SitePlan) -> AttentionModule:
    """Exact softmax for a site, which shows each call to `watcher`."""
    kind = _InterfaceObserver if site.route == "interface" else _PlainObserver
    made = kind(watcher.module.spec)
    object.__setattr__(made, "watcher", watcher)  # not a child: it holds the replaced module
    return made.train(watcher.module.training)


def why_unseen(module: Any, site: SitePlan) -> str:
    """Why an observer misses something that the site's softmax depends on; empty if it does not."""
    if module.keeps_bias:
        return "position_bias='local' is not fitted"
    if site.route == "graph" and not site.plain:
        return "its scores are more than a scaled product, and only its graph computes them"
    return ""


class _InterfaceObserver(SoftmaxAttention):
    """The attention of a site on the attention interface, with its whole mask, which includes any bias."""

    watcher: Watcher

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        out = super().forward(query, key, value, **call)
        other = self.watcher.see(_observation(self, query, key, value, out, call))
        return out if other is None else other


class _PlainObserver(AttentionModule):
    """The attention of a plain site on its graph, where causality and padding are the whole mask."""

    watcher: Watcher

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        out = SoftmaxAttention(self.spec).eval()(query, key, value, **call)
        other = self.watcher.see(_observation(self, query, key, value, out, call))
        return out if other is None else other


def _observation(
    module: AttentionModule,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    call: Mapping[str, Any],
) -> Observation:
    start = call.get("query_start")
    return Observation(query, key, value, target, call.get("key_mask"), start, module.spec.cross)
