"""Which traced graph of an owner fits a call. There is one per dtype, device, training flag and structure of
the arguments, made when first needed.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from itertools import combinations
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ...cache import lookup as caches
from ...common.running import shortened
from ...errors import InputError, VerificationError
from ...mechanisms.module import AttentionModule
from ...passes.tracing import TRACING
from ...passes.twins import twin_of
from ...planning.plan import child_name
from ..call import attention_children
from ..owner import OwnerRecord, original_class
from .trace import Trace, TraceError, trace
from .weights import NoWeightsError

log = logging.getLogger(__name__)


class Graphs(dict[Any, list[Trace]]):
    """Traced graphs of one owner by form of call. Copies and pickles are empty: they trace their own.

    stateless: why no graph can be had that runs after a state of constant size, by form of call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stateless: dict[Any, str] = {}

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs()

    def __copy__(self) -> Graphs:
        return Graphs()

    def __reduce__(self) -> Any:
        return Graphs, ()


class Arguments:
    """The arguments of one call, taken apart, and the graph for them; `forward` is the original class's."""

    def __init__(self, owner: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.cache = caches.find_cache(args, kwargs)
        self._owner, self._forward = owner, forward
        self._record: OwnerRecord = owner._linearize_owner
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs), is_leaf=caches.is_cache)
        self._tensors, self._shared = _distinct(self._leaves)
        self._parts = (args, kwargs)

    @property
    def tokens(self) -> int:
        """New tokens of this call."""
        return _hidden(self._tensors).shape[1]

    def on_all_tokens(self) -> tuple[Trace, list[Tensor]]:
        """A graph that attends all keys and values of the cache, or has none; and its inputs."""
        if self.cache is None:
            return self._graph(None, (), self._tensors), self._tensors
        layer = caches.self_layer(self.cache, self._record.layer_index)
        past = 0 if layer is None else int(layer.get_seq_length())
        example = _cache_example(self._owner, self._tensors, self.cache, past)
        return self._graph(min(past, 2), example, self._tensors), [*self._tensors, example[0]]

    def on_new_tokens(self, state: Any) -> tuple[Trace, list[Tensor]]:
        """A graph for a state of constant size, and its inputs: masks have the columns of the new tokens.

        Raises VerificationError where the graph does not show that masks are all that has other columns.
        """
        hidden, past = _hidden(self._tensors), state.get_seq_length()
        past = int(past) if isinstance(past, Tensor) else past  # of a traced call it stays a symbol
        count = self.tokens
        total, _ = state.get_mask_sizes(count)
        marker = (hidden.new_empty(past, device="meta"),)
        columns = torch.arange(past, past + count, device=hidden.device)
        wide = {
            i
            for i, x in enumerate(self._tensors)
            if x is not hidden and x.ndim > 1 and x.shape[-1] == total != count
        }

        def cut(places: Collection[int]) -> list[Tensor]:
            return [x.index_select(-1, columns) if i in places else x for i, x in enumerate(self._tensors)]

        # Sizes of one are no form of their own here: a step of one token runs the graph of the prompt.
        key = ("state", self._owner.training, _form(self._parts, sizes=False), self._shared)
        for graph in self._known((*key, bool(past > 0))):
            tensors = cut(wide & set(graph.masks))
            if graph.fits(self._owner, tensors, marker):
                self._check_past(state, graph, total)
                return graph, [*tensors, *marker]
        stateless = self._record.graphs.stateless
        failed = (self._owner.training, _form(self._parts), self._shared)
        if failed in stateless:
            raise VerificationError(stateless[failed])
        problem: VerificationError | None = None
        # Other inputs may be as wide as the masks by accident; the graph tells.
        for places in [c for size in range(len(wide), -1, -1) for c in combinations(sorted(wide), size)]:
            try:
                graph = self._made(cut(places), marker)
            except VerificationError as error:
                problem = problem or error
                continue
            if graph.differs is not None:
                problem = problem or TraceError(self._differs(graph))
                continue
            if set(places) <= set(graph.masks):
                self._keep((*key, bool(past > 0)), graph)
                # Steps of one token follow, and a graph of more tokens than one is the safer one for those.
                if past == 0 and count > 1:
                    later = (hidden.new_empty(count, device="meta"),)
                    again = self._made(cut(places), later) if graph.asks_length else graph
                    self._keep((*key, True), again)
                self._check_past(state, graph, total)
                return graph, [*cut(places), *marker]
        problem = problem or TraceError(f"{self._record.path}: what is as wide as its masks is no mask")
        if not state.is_initialized:
            stateless[failed] = str(problem)
            log.warning("%s; its cache keeps keys and values, which grow with every token", problem)
        raise problem

    def _check_past(self, state: Any, graph: Trace, total: int) -> None:
        """Raise InputError where masks say something else of the tokens in the state than they did before.

        Once for all layers. Biases and windows move on with the queries, so that there is nothing to compare.
        """
        record = self._record
        windowed = any(site.spec.window is not None for site in record.sites)
        if record.layer_index in record.layers[1:] or record.biased or windowed:
            return
        for place in graph.masks:
            mask = self._tensors[place]
            if mask.ndim > 1 and mask.shape[-1] == total:
                state.hear_row(place, mask, self.tokens)

    def _known(self, key: Any) -> list[Trace]:
        return self._record.graphs.setdefault(key, [])

    @torch.compiler.disable(recursive=True)
    def _keep(self, key: Any, graph: Trace) -> None:
        """Add a graph to those of its form, without those that hold tensors that the owner no longer has."""
        known = self._known(key)
        known[:] = [one for one in known if not one.held.is_stale(self._owner)] + [graph]

    def _graph(self, past: int | None, example: Sequence[Tensor], tensors: Sequence[Tensor]) -> Trace:
        # Keys and values of one token have a graph of their own; otherwise that of several tokens does.
        form = _form(self._parts, sizes=past is not None)
        key = (past, self._owner.training, form, self._shared)
        known = self._known(key)
        graph = next((graph for graph in known if graph.fits(self._owner, tensors, example)), None)
        if graph is None:
            graph = self._made(tensors, example)
            self._keep(key, graph)
        if graph.weightless and not self._record.path:
            # Whoever calls an owner that is the model itself has asked for them.
            raise NoWeightsError(
                f"{type(self._owner).__name__} was converted without its attention weights, and its "
                "attention makes none; call it with need_weights=False, or take them from the original"
            )
        if graph.differs is not None and any(not child.is_exact for child in attention_children(self._owner)):
            raise InputError(self._differs(graph))
        return graph

    def _differs(self, graph: Trace) -> str:
        return (
            f"{self._record.name}: in this call {graph.differs}, so that it is not the attention that was "
            "converted and proved; call it as in the example inputs, or convert the original on such inputs"
        )

    @torch.compiler.disable(recursive=True, reason="linearize: run the model once before compiling it")
    def _made(self, tensors: Sequence[Tensor], example: Sequence[Tensor]) -> Trace:
        """Trace this form of call. Raises VerificationError when no graph of the owner can be had."""
        owner, leaves, shared = self._owner, self._leaves, self._shared

        def rebuild(inputs: Sequence[Tensor], hole: Any) -> Any:
            rest = iter(shared)
            filled = [
                inputs[next(rest)] if isinstance(leaf, Tensor) else hole if caches.is_cache(leaf) else leaf
                for leaf in leaves
            ]
            return pytree.tree_unflatten(filled, self._spec)

        try:
            with TRACING:
                twin, record = _twin(owner), self._record
                before = [one.held for graphs in record.graphs.values() for one in graphs]
                return trace(twin, self._forward, rebuild, tensors, example, record, before)
        except Exception as error:
            # Capture raises nearly anything; what matters to the caller is that no graph can be had.
            raise VerificationError(
                f"{self._record.name} ({type(owner).__name__}) cannot be rewritten on its "
                f"graph: {shortened(error)}"
            ) from error


def _twin(owner: Any) -> Any:
    """A copy of an owner to trace, of its original class."""
    twin = twin_of(owner)
    twin.__class__ = original_class(type(owner))
    return twin


def _distinct(leaves: Sequence[Any]) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors among `leaves`, each object once, and for every one in order which of those it is.

    Self-attention is often called with one tensor as query, key and value; the trace must know that they
    agree.
    """
    distinct: list[Tensor] = []
    places = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            place = next((i for i, tensor in enumerate(distinct) if tensor is leaf), len(distinct))
            if place == len(distinct):
                distinct.append(leaf)
            places.append(place)
    return distinct, tuple(places)


def _form(value: Any, sizes: bool = True) -> Any:
    """What a graph is specific to: structure, dtypes, devices, what is no tensor, and axes of size one.

    sizes: leave it to `Trace.fits` to compare axes if false.
    """
    if isinstance(value, Tensor):
        ones = tuple(bool(size == 1) for size in value.shape) if sizes else value.ndim
        return value.dtype, value.device, ones
    if isinstance(value, (tuple, list)):
        return tuple(_form(item, sizes) for item in value)
    if isinstance(value, dict):
        return tuple((name, _form(item, sizes)) for name, item in value.items())
    if caches.is_cache(value):
        return "cache"
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def _cache_example(
    owner: Any, tensors: Sequence[Tensor], cache: Any, past: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Example past marker `[P]`, and keys `[B, Hkv, S, D]`, values `[B, Hkv, S, Dv]` of `cache.update`."""
    if hasattr(cache, "cross_attention_cache"):
        raise TraceError(f"{owner._linearize_owner.name}: encoder-decoder caches are not followed on graphs")
    child: AttentionModule = getattr(owner, child_name(0))
    spec = child.spec
    hidden = _hidden(tensors)
    batch, length = hidden.shape[0], hidden.shape[1]
    total, _ = cache.get_mask_sizes(length, owner._linearize_owner.layer_index or 0)
    shape = (batch, spec.num_key_value_heads, int(total))
    keys = hidden.new_empty(*shape, spec.head_dim, device="meta")
    values = hidden.new_empty(*shape, spec.value_dim, device="meta")
    return hidden.new_empty(past, device="meta"), keys, values


def _hidden(tensors: Sequence[Tensor]) -> Tensor:
    """The hidden states `[B, T, ...]`: the first floating argument of an owner."""
    return next(tensor for tensor in tensors if tensor.is_floating_point())
