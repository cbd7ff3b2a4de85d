"""Lower: replace a site by a call of its module, the only step that changes what the model computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from .mask import MASKED
from .raise_ import canonical_operands, emitter_for, replace_output, scaled_query
from .relayout import Emitter
from .site import Pattern, Site, Step

aten = torch.ops.aten


def lower_site(graph_module: GraphModule, site: Site, module: nn.Module, name: str) -> None:
    """Replace one site in place by `module(query, key, value, key_mask=..., query_start=...)`.

    query is `[B, H, T, D]`, key `[B, Hkv, S, D]`, value `[B, Hkv, S, Dv]`. key_mask, bool `[B, S]`, is True
    for a real token; it is given only where the mask of the site has padding. query_start is given as 0 where
    queries stand at the first keys although there may be more (`Mask.top_left`). Where the scale of the site
    is a tensor, the query is multiplied by it, and by `D ** 0.5`.
    """
    emitter = emitter_for(graph_module, site)
    query, key, value = canonical_operands(emitter, site)
    query = scaled_query(emitter, site, query) if site.scale is None else query
    keywords: dict[str, Any] = {}
    if site.mask.zero_or_one:
        _assert_zero_or_one(emitter, site)
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
    merged: Node | None = None
    for step, row in _rows(emitter, site):
        if step.kind == "fill":
            visible = emitter.call(aten.logical_not.default, row)
        elif step.kind == "keep" or _is_bool(step):
            visible = emitter.call(aten.to.dtype, row, torch.bool)
        else:
            visible = emitter.call(aten.gt.Scalar, _added(emitter, step, row), MASKED)
        merged = visible if merged is None else emitter.call(aten.logical_and.default, merged, visible)
    assert merged is not None
    merged = merged if _last_sees_all(site) else emitter.call(aten.any.dim, merged, 1)
    batch, sequence = site.query.relayout.merged[0], site.key.relayout.merged[2]
    return emitter.call(aten.expand.default, merged, [emitter.size(batch), emitter.size(sequence)])


def _assert_zero_or_one(emitter: Emitter, site: Site) -> None:
    """Assert what the reading of a mask took integer inputs for: what they add hides keys, or is 0.

    Under a bias that the user dropped, all that can be asked is that nothing huge is added.
    """
    for step, row in _rows(emitter, site):
        if step.kind not in ("add", "sdpa") or _is_bool(step):
            continue
        added = _added(emitter, step, row)
        if site.mask.bias:
            fine = emitter.call(aten.lt.Scalar, added, -MASKED)
        else:
            hides = emitter.call(aten.le.Scalar, added, MASKED)
            fine = emitter.call(aten.logical_or.default, hides, emitter.call(aten.eq.Scalar, added, 0))
        names = " and ".join(map(repr, site.mask.zero_or_one))
        emitter.call(
            aten._assert_async.msg,
            emitter.call(aten.all.default, fine),
            f"{site.path or 'the model'}: its attention mask was read for values of {names} that are 0 or 1, "
            "and this call has others; give zeros and ones",
        )


def _rows(emitter: Emitter, site: Site) -> Iterator[tuple[Step, Node]]:
    """Each step that may hide keys, with its term of the first head, of one query where one sees all keys."""
    for step in site.program:
        if step.term is None or step.kind not in ("add", "fill", "keep", "sdpa"):
            continue
        term = emitter.move(step.term.node, step.term.relayout)
        row = emitter.call(aten.select.int, term, 1, 0)
        yield step, emitter.call(aten.select.int, row, 1, -1) if _last_sees_all(site) else row


def _last_sees_all(site: Site) -> bool:
    """Whether the positions alone hide nothing from the last query."""
    return site.mask.pattern in (Pattern.FULL, Pattern.CAUSAL) and not site.mask.top_left


def _is_bool(step: Step) -> bool:
    return step.term is not None and step.term.node.meta["val"].dtype == torch.bool


def _added(emitter: Emitter, step: Step, row: Node) -> Node:
    """What a step adds to the scores."""
    factor = 1.0 if step.kind == "sdpa" or step.value is None else step.value
    return row if factor == 1.0 else emitter.call(aten.mul.Scalar, row, factor)
