"""The proof of a compiled graph: with exact softmax of what a linear form is shown, each site is what it was.

It runs before the linear form does: once per graph, on the inputs of that call, and again when a buffer that
a mask was read from has been written to. Each site is compared by itself, on the inputs that the original
graph gives it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..convert.proof import tolerance
from ..errors import VerificationError
from ..mechanisms.module import PlainSoftmaxAttention
from ..mechanisms.spec import SiteSpec
from ..passes import canonical, find_attention
from ..passes.lower import key_mask
from ..passes.raise_ import (
    canonical_operands,
    canonical_terms,
    emitter_for,
    fixed_tensors,
    scaled_query,
)
from ..passes.site import KVKind, Site, Step
from ..planning.plan import terms
from ..rewrite.attributes import Read, read


class Proof:
    """A graph that compares the sites of another, given its inputs.

    Args:
        graph: the graph in the dialect, before it is rewritten. It is not changed.
        specs: those of the modules that take the places of sites, by owner path and ordinal.
    """

    def __init__(self, graph: GraphModule, specs: Mapping[tuple[str, int], SiteSpec]) -> None:
        self._proved_with: list[Read] | None = None
        match = find_attention(graph)
        leaves = {leaf for site in match.sites for leaf in fixed_tensors(site).union(site.mask.leaves)}
        self._graph = match.graph_module
        checks = [
            _compare(self._graph, site, specs[site.path, site.ordinal], f"proof_{number}")
            for number, site in enumerate(match.sites)
            # What the user has dropped knowingly cannot be the same.
            if (site.path, site.ordinal) in specs and not terms(site, in_graph=True)
        ]
        self._graph.graph.output_node().args = (tuple(checks),)
        self._graph.recompile()
        self._writes = any(
            isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
            for node in self._graph.graph.nodes
        )

        inputs = self._graph.graph.find_nodes(op="placeholder")
        self._constants = {
            str(node.target): index
            for index, node in enumerate(inputs)
            if str(node.target) in leaves and (leaf := node.meta.get("leaf")) and leaf.kind != "input"
        }

    def check(self, inputs: Sequence[Any]) -> None:
        """Compare on the inputs of a call, where no earlier call did. Raises VerificationError."""
        constants = {name: inputs[index] for name, index in self._constants.items()}
        known = self._proved_with
        if known is not None and all(one.is_still(constants[one.path]) for one in known):
            return
        if self._writes:  # into caches, say, which the call itself is to find as they are
            inputs = [
                x.clone() if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) else x for x in inputs
            ]
        devices = {x.device for x in inputs if isinstance(x, Tensor) and x.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices, key=str)):
            self._graph(*inputs)
        self._proved_with = [read(name, tensor) for name, tensor in constants.items()]


def _compare(graph: GraphModule, site: Site, spec: SiteSpec, name: str) -> Any:
    """Write the comparison of one site into its graph; the node that makes it."""
    emitter = emitter_for(graph, site)
    query, key, value = canonical_operands(emitter, site)
    reference = emitter.call(
        torch.ops.linearize.attention.default,
        query,
        key,
        value,
        canonical_terms(emitter, site),
        canonical.encode([_without_dropout(step) for step in site.program]),
        site.kv_map.kind is KVKind.TILED,
    )
    query = scaled_query(emitter, site, query) if site.scale is None else query
    keywords: dict[str, Any] = {}
    if site.mask.padding:
        keywords["key_mask"] = key_mask(emitter, site)
    if site.mask.top_left:
        keywords["query_start"] = 0
    graph.add_submodule(name, PlainSoftmaxAttention(spec).eval())
    with graph.graph.inserting_before(site.output):
        exact = graph.graph.call_module(name, (query, key, value), keywords)
    return emitter.call(check_equal, site.path, reference, exact, keywords.get("key_mask"))


def check_equal(path: str, reference: Tensor, exact: Tensor, real: Tensor | None) -> None:
    """Raise VerificationError unless two outputs `[B, H, T, Dv]` agree; real: bool `[B, S]`, keys that are.

    What padding sees means nothing: where queries and keys are the same tokens, their rows are left out.
    """
    if real is not None and real.shape[1] == reference.shape[2]:
        reference, exact = (x.transpose(1, 2)[real] for x in (reference, exact))
    if not reference.numel():
        return
    error = (reference.double() - exact.double()).abs().nan_to_num(nan=torch.inf).max().item()
    allowed = tolerance(reference.dtype) * max(reference.double().abs().max().item(), 1e-3)
    if not error <= allowed:
        raise VerificationError(
            f"{path or 'the model'}: on the inputs of this call its attention is not what the module in its "
            f"place was made for: with exact softmax it differs by {error:.3g} (allowed {allowed:.3g}). Its "
            "mask, window or scale says more here; leave it softmax with keep_softmax=(...)"
        )


def _without_dropout(step: Step) -> Step:
    if step.kind == "sdpa":
        return dataclasses.replace(step, value={**step.value, "dropout": 0.0})
    return dataclasses.replace(step, value=0.0) if step.kind == "dropout" else step
