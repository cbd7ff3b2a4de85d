"""The graft: owners that do not dispatch, plain modules and eager-only models.

The owner keeps its class (a subclass of it), parameters and children; its forward runs a graph of itself in
which the proved attention is replaced (`forms.py` keeps the graphs, by form of call). Graphs are never copied
or pickled: a copy makes its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...cache import lookup as caches
from ...cache.adopt import give_up_state, state_layer
from ...errors import VerificationError
from ...planning.plan import SitePlan
from ..interface import sole_child
from ..owner import Rewritten, become
from .calls import Call, Variants

log = logging.getLogger(__name__)


class GraftOwner(Rewritten):
    """Mixin of a rewritten owner that runs graphs of itself."""

    @staticmethod
    def run(owner: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the owner; `forward` is the original class's, used for tracing only."""
        call = Call(owner, forward, args, kwargs)
        cache, index = call.cache, owner._linearize_layer
        caches.check_not_foreign(caches.self_layer(cache, index), owner._linearize_path)
        state = state_of(owner, cache)
        if state is not None:
            try:
                variant, tensors = call.on_new_tokens(state)
            except VerificationError as error:
                if state.is_initialized:
                    raise
                log.warning("%s; its cache keeps keys and values, which grow with every token", error)
                owner._linearize_keeps_keys = call.tokens > 1
                give_up_state(cache, index)
                state = None
        if state is None:
            variant, tensors = call.on_all_tokens()
        layer = caches.self_layer(cache, index)
        owner._linearize_state = state
        owner._linearize_start = caches.start_of_queries(layer) if state is None else caches.length_of(state)
        owner._linearize_seen = caches.decoded_length(cache, layer)
        try:
            return variant(owner, cache, tensors)
        except BaseException:
            if state is not None:
                state.forget_since(owner._linearize_start)
            raise
        finally:
            owner._linearize_state = owner._linearize_start = owner._linearize_seen = None
            if cache is not None:
                caches.mark_filled(caches.self_layer(cache, index))


def state_of(owner: Any, cache: Any) -> Any | None:
    """The state of a grafted owner in `cache`, put there now if it can be; None where keys and values are."""
    if owner._linearize_keeps_keys:
        return None
    return state_layer(cache, owner._linearize_layer, sole_child(owner))


def apply_graft(owner: Any, path: str, sites: Sequence[SitePlan]) -> None:
    """Rewrite `owner` in place; its child modules are attached already. Graphs are made at the first call."""
    owner._linearize_path = path
    owner._linearize_layer = sites[0].layer_index
    owner._linearize_start = owner._linearize_seen = owner._linearize_state = None
    owner._linearize_keeps_keys = False
    owner._linearize_proof = False
    owner._linearize_log = None
    owner._linearize_padding = any("padding" in site.mask for site in sites)
    owner._linearize_plain = all(site.plain for site in sites)
    owner._linearize_slots = len(sites)
    owner._linearize_variants = Variants()
    become(owner, GraftOwner)
    if isinstance(owner, nn.MultiheadAttention):
        # A hooked module is what nn.TransformerEncoderLayer does not replace by its own fused call.
        owner.register_forward_hook(_keep_slow_path)


def use_no_nested_tensors(model: nn.Module) -> None:
    """`nn.TransformerEncoder` packs padded input into nested tensors, which rewritten layers do not take."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, GraftOwner) for m in module.modules()
        ):
            module.use_nested_tensor = False


def _keep_slow_path(module: nn.Module, args: Any, output: Any) -> None:
    return None
