"""Lower: replace a site by a call of its module, the only step that changes what the model computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from .mask import MASKED
from .raise_ import canonical_operands, emitter_for, replace_output
from .relayout import Emitter
from .site import Pattern, Site

aten = torch.ops.aten


def lower_site(graph_module: GraphModule, site: Site, module: nn.Module, name: str) -> None:
    """Replace one site in place by `module(query, key, value, key_mask=..., query_start=...)`.

    query is `[B, H, T, D]`, key `[B, Hkv, S, D]`, value `[B, Hkv, S, Dv]`. key_mask, bool `[B, S]`, is True
    for a real token; it is given only where the mask of the site has padding. query_start is given as 0 where
    queries stand at the first keys although there may be more (`Mask.top_left`).
    """
    emitter = emitter_for(graph_module, site)
    query, key, value = canonical_operands(emitter, site)
    keywords: dict[str, Any] = {}
    if site.mask.padding:
        keywords["key_mask"] = key_mask(emitter, site)
    if site.mask.top_left:
        keywords["query_start"] = 0
    graph_module.add_submodule(name, module)
    with emitter.graph.inserting_before(site.output):
        result = emitter.graph.call_module(name, (query, key, value), keywords)
    replace_output(emitter, site, result)


def key_mask(emitter: Emitter, site: Site) -> Node:
    """Which keys are real, bool `[B, S]`: those the last query sees (it stands after every key).

    Reads one row of each mask term, so nothing quadratic is left once unused rows are not computed. The last
    query of a window does not see all keys, so there it is those that any query sees.
    """
    whole = site.mask.pattern in (Pattern.FULL, Pattern.CAUSAL) and not site.mask.top_left
    merged: Node | None = None
    for step in site.program:
        if step.term is None or step.kind not in ("add", "fill", "keep", "sdpa"):
            continue
        term = emitter.move(step.term.node, step.term.relayout)
        row = emitter.call(aten.select.int, term, 1, 0)
        row = emitter.call(aten.select.int, row, 1, -1) if whole else row
        boolean = step.term.node.meta["val"].dtype == torch.bool
        if step.kind == "fill":
            visible = emitter.call(aten.logical_not.default, row)
        elif step.kind == "keep" or boolean:
            visible = emitter.call(aten.to.dtype, row, torch.bool)
        else:
            visible = emitter.call(aten.gt.Scalar, row, MASKED)
        merged = visible if merged is None else emitter.call(aten.logical_and.default, merged, visible)
    assert merged is not None
    merged = merged if whole else emitter.call(aten.any.dim, merged, 1)
    batch, sequence = site.query.relayout.merged[0], site.key.relayout.merged[2]
    return emitter.call(aten.expand.default, merged, [emitter.size(batch), emitter.size(sequence)])
