"""Raise: replace the body of a site by one exact canonical attention call with the same output."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from . import canonical
from .graphs import ancestors, remove_dead
from .relayout import Emitter
from .site import KVKind, Site, term_operands

aten = torch.ops.aten


def canonical_operands(emitter: Emitter, site: Site) -> tuple[Node, Node, Node]:
    """query, key and value of the site as graph nodes in canonical layout."""
    query, key, value = (emitter.move(o.node, o.relayout) for o in (site.query, site.key, site.value))
    return query, key, value


def scaled_query(emitter: Emitter, site: Site, query: Node) -> Node:
    """The query `[B, H, T, D]` for a module in the place of a site whose scale is a tensor (`scale` is None).

    Such a module scales by `D ** -0.5`, so the query brings the scale over that along.
    """
    number = float(site.query.relayout.merged[3]) ** 0.5
    for step in site.program:
        if "softmax" in step.kind:
            break
        if step.kind not in ("scale", "div") or step.is_gate:
            continue
        if step.term is None:
            number = number * step.value if step.kind == "scale" else number / step.value
        else:
            target = aten.mul.Tensor if step.kind == "scale" else aten.div.Tensor
            query = emitter.call(target, query, emitter.move(step.term.node, step.term.relayout))
    dtype = site.query.node.meta["val"].dtype
    return emitter.call(aten.to.dtype, emitter.call(aten.mul.Tensor, query, number), dtype)


def canonical_terms(emitter: Emitter, site: Site) -> list[Node]:
    """The score terms of the site as graph nodes that broadcast to `[B, H, T, S]`, in program order."""
    return [emitter.move(term.node, term.relayout) for term in term_operands(site.program)]


def emitter_for(graph_module: GraphModule, site: Site) -> Emitter:
    """An emitter that writes before the output of the site, with sizes from the tensors of the site."""
    sources = [*_inputs(site), *site.body, *site.output.all_input_nodes]
    return Emitter(graph_module.graph, site.output, sources)


def _inputs(site: Site) -> list[Node]:
    """query, key, value and the score terms, as they stand in the graph."""
    operands = (site.query, site.key, site.value, *term_operands(site.program))
    return [operand.node for operand in operands]


def fixed_tensors(site: Site) -> set[str]:
    """Names of the tensors whose values are numbers in the record of a site, such as a scale in a buffer."""
    live = ancestors(_inputs(site))
    return {str(n.target) for n in ancestors([site.anchor]) - live if n.op in ("get_attr", "placeholder")}


def replace_output(emitter: Emitter, site: Site, result: Node) -> None:
    """Put `result` `[B, H, T, Dv]` in the place of the output of the site, and drop its body.

    The output keeps its layout and its metadata.
    """
    shape = (*site.query.relayout.merged[:3], site.value.relayout.merged[3])
    final = emitter.restore(result, shape, site.restore)
    site.output.replace_all_uses_with(final, delete_user_cb=lambda user: user is not final)
    final.meta.update(site.output.meta)
    remove_dead(emitter.graph, [site.output, *reversed(site.body), *_inputs(site)])


def raise_site(graph_module: GraphModule, site: Site) -> None:
    """Replace one site in place."""
    emitter = emitter_for(graph_module, site)
    operands = canonical_operands(emitter, site)
    result = emitter.call(
        torch.ops.linearize.attention.default,
        *operands,
        canonical_terms(emitter, site),
        canonical.encode(site.program),
        site.kv_map.kind is KVKind.TILED,
    )
    replace_output(emitter, site, result)
