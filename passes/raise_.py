"""Raise: replace the body of a site by one exact canonical attention call. Its output equals the
original's.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from . import canonical
from .graphs import remove_dead
from .relayout import Emitter
from .site import KVKind, Site


def canonical_operands(emitter: Emitter, site: Site) -> tuple[Node, Node, Node]:
    """query, key and value of the site as graph nodes in canonical layout."""
    query, key, value = (emitter.move(o.node, o.relayout) for o in (site.query, site.key, site.value))
    return query, key, value


def emitter_for(graph_module: GraphModule, site: Site) -> Emitter:
    terms = [step.term.node for step in site.program if step.term is not None]
    sources = [
        site.query.node,
        site.key.node,
        site.value.node,
        *terms,
        *site.body,
        *site.output.all_input_nodes,
        site.output,
    ]
    return Emitter(graph_module.graph, site.output, sources[:-1])


def replace_output(emitter: Emitter, site: Site, result: Node) -> None:
    """Put `result` `[B, H, T, Dv]` in the place of the site's output, in its layout, with its metadata,
    and drop its body.
    """
    shape = (*site.query.relayout.merged[:3], site.value.relayout.merged[3])
    final = emitter.restore(result, shape, site.restore)
    site.output.replace_all_uses_with(final, delete_user_cb=lambda user: user is not final)
    final.meta.update(site.output.meta)
    terms = [step.term.node for step in site.program if step.term is not None]
    remove_dead(
        emitter.graph,
        [site.output, *reversed(site.body), site.query.node, site.key.node, site.value.node, *terms],
    )


def raise_site(graph_module: GraphModule, site: Site) -> None:
    """Replace one site in place."""
    emitter = emitter_for(graph_module, site)
    operands = canonical_operands(emitter, site)
    terms = [
        emitter.move(step.term.node, step.term.relayout) for step in site.program if step.term is not None
    ]
    result = emitter.call(
        torch.ops.linearize.attention.default,
        *operands,
        terms,
        canonical.encode(site.program),
        site.kv_map.kind is KVKind.TILED,
    )
    replace_output(emitter, site, result)
