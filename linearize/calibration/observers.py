"""Watching attention: exact softmax in a site's place, which shows each call's tensors to somebody."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..mechanisms.module import AttentionModule, SoftmaxAttention
from ..planning.plan import SitePlan


class Watcher(Protocol):
    """Who is shown the calls of one site; `module` is what stands there otherwise."""

    @property
    def module(self) -> Any: ...

    def see(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        target: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> None:
        """One call: query [B, H, T, D], key and value as given, target [B, H, T, Dv] is softmax's output."""


@contextlib.contextmanager
def watching(model: nn.Module, watchers: Mapping[SitePlan, Watcher]) -> Iterator[None]:
    """Softmax in the place of these sites' modules, which come back at the end whatever happens."""
    try:
        for site, watcher in watchers.items():
            setattr(model.get_submodule(site.path), site.child, observer(watcher, site))
        yield
    finally:
        for site, watcher in watchers.items():
            setattr(model.get_submodule(site.path), site.child, watcher.module)


def observer(watcher: Watcher, site: SitePlan) -> AttentionModule:
    """What stands in for a site's module: exact softmax, which lets `watcher` see each call."""
    kind = _InterfaceObserver if site.route == "interface" else _PlainObserver
    made = kind(watcher.module.spec)
    object.__setattr__(made, "watcher", watcher)  # not a child: it holds the module that is being replaced
    return made.train(watcher.module.training)


def why_unseen(module: Any, site: SitePlan) -> str:
    """Why what an observer shows is not all that the site's softmax depends on; empty when it is."""
    if module.keeps_bias:
        return "position_bias='local' is not fitted"
    if site.route == "graph" and not site.plain:
        return "its own scores hold more than a scaled product, and are known to its graph alone"
    return ""


def real_queries(
    key_mask: Tensor | None, query: Tensor, key: Tensor, query_start: int | Tensor | None, cross: bool
) -> Tensor:
    """bool [B, T]: queries that are no padding. In cross-attention nothing tells, and all count."""
    batch, _, length, _ = query.shape
    if key_mask is None or cross:
        return torch.ones(batch, length, dtype=torch.bool, device=query.device)
    start = key.shape[2] - length if query_start is None else query_start
    return key_mask[:, torch.arange(length, device=query.device) + start]


class _InterfaceObserver(SoftmaxAttention):
    """The site's own attention, with its whole mask, and its bias in the mask."""

    watcher: Watcher

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        out = super().forward(query, key, value, **call)
        self.watcher.see(query, key, value, out, call.get("key_mask"), call.get("query_start"))
        return out


class _PlainObserver(AttentionModule):
    """As the linear form sees the site: causality and padding, which is all there is at a plain one."""

    watcher: Watcher

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **call: Any) -> Tensor:
        out = SoftmaxAttention(self.spec).eval()(query, key, value, **call)
        self.watcher.see(query, key, value, out, call.get("key_mask"), call.get("query_start"))
        return out
