"""One traced form of an owner: its forward as a graph, attention replaced and real children called.

The proved sites become calls of `attend_site`, and everything the graph borrowed from the owner is looked up
on the live owner at each call: a LoRA layer put over `q_proj` later is the one that runs, and nothing is held
twice.

Of a cache the graph keeps one of two things. Where a state of constant size will stand behind it, only how
many tokens came before: the owner is traced on the new tokens alone, and masks are cut to their columns.
Otherwise its `update` becomes a hole in the graph, filled at call time with all keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, GraphModule, Node

from ...cache.lookup import is_cache
from ...passes import canonical, find_attention
from ...passes.axes import shape_of
from ...passes.capture import CaptureError, capture
from ...passes.graphs import ancestors
from ...passes.raise_ import canonical_operands, emitter_for, fixed_tensors, replace_output, scaled_query
from ...passes.site import KVKind, Reason, Site
from ...planning.plan import child_name
from ..attributes import Held, held, path_of
from ..call import Call
from ..owner import OwnerRecord
from ..score_terms import hides_what_is_later, kinds_of
from .guards import Guard, guards_of
from .meaning import difference, reads_mask
from .one_sequence import with_heads
from .rebuild import Place, TraceError, fill_hole, rebuilt
from .runtime import attend_site, call_child
from .submodules import call_children
from .weights import NoWeights, drop_weights

_CACHED_AXES = (0, 2)
"""Batch and length of keys and values `[B, Hkv, S, D]`."""


@dataclass(frozen=True)
class Trace:
    """A graph `(call, *tensors) -> flat outputs`, and how to rebuild the owner's result from them.

    sizes: of the owner's tensors, as numbers and expressions over sizes that may differ from call to call.
    cached: likewise of the past marker and of what `update` returns.
    masks: which of the tensors act on nothing but the scores of the sites. asks_length: the owner asked its
    cache how many tokens it holds. guards: what must hold of the sizes, as export found on its way. held:
    what it took from the owner. differs: in what a site's meaning is not that of the plan, None where it is.
    weightless: which of the flat outputs were attention weights, in whose place no_weights is given.
    """

    graph: GraphModule
    spec: Any
    sizes: tuple[tuple[sympy.Expr, ...], ...]
    cached: tuple[tuple[sympy.Expr, ...], ...]
    masks: tuple[int, ...]
    asks_length: bool
    guards: tuple[Guard, ...]
    held: Held
    differs: str | None
    weightless: tuple[int, ...]
    no_weights: NoWeights

    def fits(self, owner: nn.Module, tensors: Sequence[Tensor], cache: Sequence[Tensor]) -> bool:
        """Whether the owner and the sizes of a call, tensor by tensor, are as the trace took them.

        cache: as `trace` takes it.
        """
        step = len(cache) > 0 and cache[0].shape[0] > 0 and tensors[0].shape[1:2] == (1,)
        return self._fits_sizes(tensors, cache) and self.held.still_by(owner, step)

    def _fits_sizes(self, tensors: Sequence[Tensor], cache: Sequence[Tensor]) -> bool:
        known: dict[sympy.Expr, int] = {}
        derived = []
        for expected, tensor in zip(self.sizes, tensors, strict=True):
            if len(expected) != tensor.ndim:
                return False
            for size, found in zip(expected, tensor.shape, strict=True):
                if size.is_Symbol:
                    if known.setdefault(size, found) != found:
                        return False
                elif size.is_Integer:
                    if size != found:
                        return False
                else:
                    derived.append((size, found))
        for expected, tensor in zip(self.cached, cache, strict=True):
            for size, found in zip(expected, tensor.shape, strict=True):
                if size.is_Symbol:
                    known.setdefault(size, found)
        same = all(size.subs(known) == found for size, found in derived)
        return same and all(guard.holds(known) for guard in self.guards)

    def __call__(self, call: Call, tensors: Sequence[Tensor]) -> Any:
        results = list(self.graph(call, *tensors))
        for place in self.weightless:
            results[place] = self.no_weights
        return pytree.tree_unflatten(results, self.spec)


class _Shell(nn.Module):
    """Calls the owner's own forward with tensors only; other arguments are part of the trace."""

    def __init__(
        self,
        owner: nn.Module,
        forward: Callable[..., Any],
        rebuild: Callable[..., Any],
        of_cache: int,
        equal: Sequence[Sequence[Place]],
        asked: list[Any],
    ) -> None:
        super().__init__()
        self._equal = equal
        self.owner = owner
        self._forward, self._rebuild, self._of_cache = forward, rebuild, of_cache
        self._asked = asked

    def forward(self, *tensors: Tensor) -> Any:
        for (index, axis), *rest in self._equal:
            for other, place in rest:
                torch._check(tensors[index].shape[axis] == tensors[other].shape[place])
        own = len(tensors) - self._of_cache
        hole = _hole(*tensors[own:]) if self._of_cache else None
        args, kwargs = self._rebuild(tensors[:own], hole)
        result = self._forward(self.owner, *args, **kwargs)
        result = pytree.tree_map(lambda leaf: None if is_cache(leaf) else leaf, result, is_leaf=is_cache)
        if hole is None:
            return result, ()
        self._asked.append(hole)
        return result, hole.written if self._of_cache == len(("past", "keys", "values")) else ()


def equal_sizes(tensors: Sequence[Tensor], stored: int) -> tuple[tuple[Place, ...], ...]:
    """Groups of batch and length axes of the same size; heads and features are left out where known.

    stored: how many of the tensors, the last ones, are keys and values `[B, Hkv, S, D]` of a cache.
    """
    groups: dict[int, list[Place]] = {}
    for index, tensor in enumerate(tensors):
        axes: Sequence[int] = range(tensor.ndim - (tensor.is_floating_point() and tensor.ndim > 2))
        if index >= len(tensors) - stored:
            axes = _CACHED_AXES
        for axis in axes:
            if tensor.shape[axis] > 1:
                groups.setdefault(int(tensor.shape[axis]), []).append((index, axis))
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _hole(past: Tensor, *stored: Tensor) -> Any:
    """A stand-in cache for tracing: `update` remembers what it is given and returns `stored`, or the same."""
    from transformers.cache_utils import Cache

    class Hole(Cache):
        def __init__(self) -> None:
            super().__init__(layers=[])
            self.written: tuple[Tensor, ...] = ()
            self.index: int | None = None
            self.asked = False

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> Any:
            if self.written:
                raise TraceError("the owner updates its cache more than once per call")
            self.written, self.index = (key_states, value_states), layer_idx
            return stored or self.written

        def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
            self.asked = True
            return past.shape[0]

        def get_query_offset(self, *args: Any, **kwargs: Any) -> Any:
            return self.get_seq_length()

    return Hole()


def trace(
    owner: nn.Module,
    forward: Callable[..., Any],
    rebuild: Callable[..., Any],
    tensors: Sequence[Tensor],
    cache: Sequence[Tensor],
    record: OwnerRecord,
    before: Sequence[Held] = (),
) -> Trace:
    """Capture, match and rewrite the owner for one form of call.

    rebuild: `(tensors, cache) -> (args, kwargs)`. cache: examples of the past marker `[P]` and, for a cache
    of keys and values, of those that `update` returns (meta tensors do); empty for a call without a cache.
    record: of the owner; the graph must hold its sites. before: what its other graphs hold.
    Raises TraceError when the graph does not hold exactly those sites. If they mean something else than the
    plan says, whatever is taken to agree, the trace says so.
    """
    inputs = tuple(tensor.detach() for tensor in (*tensors, *(_real(tensor, tensors) for tensor in cache)))
    stored = max(len(cache) - 1, 0)
    equal = equal_sizes(inputs, stored)
    # Telling apart sizes that happen to agree makes a graph for more calls; some proofs need them to agree.
    agreements: list[tuple[tuple[Place, ...], ...]] = [equal, ()] if stored else [(), equal]
    attempts = [(agreed, True) for agreed in (agreements if equal else agreements[:1])]
    if stored and _is_one_token(inputs):
        # A mask cut out of a buffer by the length of the cache may have no size that export can name, unless
        # it may look at the example.
        attempts.append((equal, False))
    other: Trace | None = None
    problem: TraceError | CaptureError | None = None
    for agreed, of_any_size in attempts:
        try:
            made = _trace(owner, forward, rebuild, inputs, agreed, len(cache), record, before, of_any_size)
        except (TraceError, CaptureError) as error:
            problem = error
            continue
        if made.differs is None:
            return made
        other = other or made
    if other is not None:
        return other
    assert problem is not None
    raise problem


def _trace(
    owner: nn.Module,
    forward: Callable[..., Any],
    rebuild: Callable[..., Any],
    inputs: Sequence[Tensor],
    equal: tuple[tuple[Place, ...], ...],
    of_cache: int,
    record: OwnerRecord,
    before: Sequence[Held],
    of_any_size: bool,
) -> Trace:
    cached, stored = of_cache > 0, max(of_cache - 1, 0)
    # Export undoes what a forward assigns to its module, hence a list beside it.
    asked: list[Any] = []
    shell = _Shell(owner, forward, rebuild, of_cache, equal, asked)
    gm = _captured(shell, inputs, of_cache, of_any_size)
    index = asked[-1].index if asked else None
    if cached and index is None:
        raise TraceError("the owner takes a cache but does not update it")
    gm, sites, weightless = _found(gm, owner, record, inputs)
    if cached and not stored and any(not site.mask.own_column for site in sites):
        raise TraceError("which keys its mask hides cannot be told from the new tokens alone")
    first = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(first):
        call = gm.graph.placeholder("linearize_call")
    differs = [difference(site, planned) for site, planned in zip(sites, record.sites, strict=True)]
    leaves = {leaf for site in sites for leaf in fixed_tensors(site).union(site.mask.leaves)}
    read = {path for leaf in leaves if (path := _path_of(gm, owner, leaf)) is not None}
    for slot, site in enumerate(sites):
        _replace_site(gm, site, slot, call)
    codegen: Any = gm.graph._codegen
    spec = codegen.pytree_info.out_spec
    placeholders = [node for node in gm.graph.find_nodes(op="placeholder") if "val" in node.meta]
    sizes = tuple(shape_of(node) or () for node in placeholders)
    masks = _mask_inputs(gm.graph)
    call_children(gm, owner, call)
    called = {str(node.args[1]) for node in gm.graph.find_nodes(op="call_function", target=call_child)}
    if stored:
        fill_hole(gm.graph, call, index, equal)
    elif cached and index != record.layer_index:
        raise TraceError(f"it counts its tokens in layer {index} of the cache, not its own")
    asks_length = any(hole.asked for hole in asked)
    own = len(sizes) - of_cache
    guards = guards_of(placeholders, {size for shape in sizes for size in shape if size.is_Symbol})
    differs_in = next((text for text in differs if text is not None), None)
    return Trace(
        rebuilt(gm, call),
        _result_spec(spec),
        sizes[:own],
        sizes[own:],
        masks,
        asks_length,
        guards,
        held(owner, called, read, before),
        differs_in,
        weightless,
        NoWeights(record.name),
    )


def _path_of(gm: GraphModule, owner: nn.Module, leaf: str) -> str | None:
    """Where on the owner a tensor is that a graph of it reads; None for inputs and for constants in code."""
    if leaf.startswith("owner."):
        return leaf.removeprefix("owner.")
    constant = getattr(gm, leaf, None)
    return path_of(owner, constant) if isinstance(constant, Tensor) else None


def _captured(shell: _Shell, inputs: Sequence[Tensor], of_cache: int, of_any_size: bool) -> GraphModule:
    """The graph of an owner. The shell calls forward directly: hooks of the owner run around the graph, not
    inside it as well. of_any_size: axes of one that vary are symbols, and no size of the example is asked.
    """
    stored = max(of_cache - 1, 0)
    axes = [_axes(tensor) for tensor in inputs]
    for kept in axes[len(axes) - stored :]:
        for axis in set(kept) - set(_CACHED_AXES):
            del kept[axis]
    one = of_cache > 0 and of_any_size and _is_one_token(inputs)
    if one:
        # One token at a time: its axis must be seen as an axis, or no attention can be recognised.
        axes[_activations(inputs)][1] = Dim.AUTO
    with sizes_of_one_as_symbols(of_any_size and (one or stored > 0)):
        return capture(shell, inputs, dynamic=(tuple(axes),))


def _activations(inputs: Sequence[Tensor]) -> int:
    """Which of the inputs is the first activations `[B, T, C]`; -1 where none is."""
    return next((i for i, x in enumerate(inputs) if x.is_floating_point() and x.ndim == 3), -1)


def _is_one_token(inputs: Sequence[Tensor]) -> bool:
    place = _activations(inputs)
    return place >= 0 and inputs[place].shape[1] == 1


def _found(
    gm: GraphModule, owner: nn.Module, record: OwnerRecord, inputs: Sequence[Tensor]
) -> tuple[GraphModule, list[Site], tuple[int, ...]]:
    """The sites of the record in a graph of its owner, and which of its results were attention weights.

    Raises TraceError where the sites are not there.
    """
    report = find_attention(gm)
    escaped = [refusal for refusal in report.refusals if refusal.reason is Reason.WEIGHTS_ESCAPE]
    weightless: tuple[int, ...] = ()
    if escaped:
        weightless = drop_weights(report.graph_module, escaped)
        report = find_attention(report.graph_module)
    sites = [site for site in report.sites if site.path in ("", "owner")]
    expected = len(record.sites)
    if len(sites) != expected:
        reasons = "; ".join(refusal.message for refusal in report.refusals) or "no refusal"
        raise TraceError(f"its own graph shows {len(sites)} provable sites instead of {expected} ({reasons})")
    specs = [getattr(owner, child_name(slot)).spec for slot in range(expected)]
    place = _activations(inputs)
    if place >= 0 and len(inputs[place]) == 1:
        sites = [with_heads(site, spec) for site, spec in zip(sites, specs, strict=True)]
    if any(site.shapes["H"] != spec.num_heads for site, spec in zip(sites, specs, strict=True)):
        raise TraceError("heads and a batch of one cannot be told apart; call it with two sequences once")
    return report.graph_module, sites, weightless


def _real(tensor: Tensor, beside: Sequence[Tensor]) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=beside[0].device)


def sizes_of_one_as_symbols(on: bool) -> Any:
    """Let export keep an axis of size one symbolic, where it is asked to; a context manager."""
    import torch.fx.experimental._config as config

    settings: Any = config
    return settings.patch(backed_size_oblivious=on)


def _axes(tensor: Tensor) -> dict[int, Any]:
    return {axis: Dim.AUTO for axis, size in enumerate(tensor.shape) if size > 1}


def _result_spec(spec: Any) -> Any:
    """Spec of the owner's own result: the shell returns `(result, what was written to the cache)`."""
    return spec.child(0) if hasattr(spec, "child") else spec.children_specs[0]


def _replace_site(gm: GraphModule, site: Site, slot: int, call: Node) -> None:
    emitter = emitter_for(gm, site)
    query, key, value = canonical_operands(emitter, site)
    scaled = scaled_query(emitter, site, query) if site.scale is None else query
    terms = [
        emitter.move(step.term.node, step.term.relayout) for step in site.program if step.term is not None
    ]
    tiled = site.kv_map.kind is KVKind.TILED
    program = canonical.encode(site.program)
    result = emitter.call(
        attend_site,
        call,
        slot,
        query,
        key,
        value,
        terms,
        kinds_of(site.program),
        program,
        tiled,
        reads_mask(site),
        hides_what_is_later(site.program),
        scaled,
    )
    replace_output(emitter, site, result)


def _mask_inputs(graph: Graph) -> tuple[int, ...]:
    """Tensor inputs whose values reach the results through the score terms of the sites only."""
    inputs = [node for node in graph.find_nodes(op="placeholder") if "val" in node.meta]
    sites = graph.find_nodes(op="call_function", target=attend_site)
    sizes = dict.fromkeys(graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int), ())
    reads = sizes | {site: (*site.args[2:5], site.args[11]) for site in sites}
    terms = ancestors(
        [term for site in sites for term in site.args[5]], lambda node: sizes.get(node, node.all_input_nodes)
    )
    rest = ancestors([graph.output_node()], lambda node: reads.get(node, node.all_input_nodes))
    return tuple(i for i, node in enumerate(inputs) if node in terms and node not in rest)
