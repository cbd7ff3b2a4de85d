"""Raise: replace the body of a site by one exact canonical attention call with the same output."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from . import canonical
from .graphs import remove_dead
from .relayout import Emitter
from .site import KVKind, Site, term_operands


def canonical_operands(emitter: Emitter, site: Site) -> tuple[Node, Node, Node]:
    """query, key and value of the site as graph nodes in canonical layout."""
    query, key, value = (emitter.move(o.node, o.relayout) for o in (site.query, site.key, site.value))
    return query, key, value


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
