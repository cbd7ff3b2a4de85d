"""The graph route: owners that do not dispatch, plain modules and eager-only models.

The owner keeps its class (a subclass of it), parameters and children; its forward runs a graph of itself in
which the proved attention is replaced (`calls.py` keeps the graphs, by form of call).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...cache import lookup as caches
from ...cache.adopt import give_up_state, state_layer
from ...errors import VerificationError
from ..call import Call, sole_child
from ..owner import OwnerRecord, Rewritten, become
from .calls import Arguments


class GraphOwner(Rewritten):
    """Mixin of a rewritten owner that runs graphs of itself."""

    @staticmethod
    def run(owner: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the owner; `forward` is the original class's, used for tracing only."""
        record: OwnerRecord = owner._linearize_owner
        arguments = Arguments(owner, forward, args, kwargs)
        cache, index = arguments.cache, record.layer_index
        caches.check_not_foreign(caches.self_layer(cache, index), record.path)
        state = state_of(owner, cache)
        if state is not None and index is not None:
            try:
                graph, tensors = arguments.on_new_tokens(state)
            except VerificationError:
                if state.is_initialized:
                    raise
                give_up_state(cache, index)
                state = None
        if state is None:
            graph, tensors = arguments.on_all_tokens()
        call = Call(owner, cache, state)
        try:
            return graph(call, tensors)
        except BaseException:
            call.failed()
            raise
        finally:
            call.ended(caches.self_layer(cache, index))


def state_of(owner: Any, cache: Any) -> Any | None:
    """The state of an owner in `cache`, put there now if it can be; None where keys and values are."""
    record: OwnerRecord = owner._linearize_owner
    return state_layer(cache, record.layer_index, sole_child(owner))


def apply_graph(owner: Any, record: OwnerRecord) -> None:
    """Rewrite `owner` in place; its child modules are attached already. Graphs are made at the first call."""
    become(owner, GraphOwner, record)
    if isinstance(owner, nn.MultiheadAttention):
        # A hooked module is what nn.TransformerEncoderLayer does not replace by its own fused call.
        owner.register_forward_hook(_keep_slow_path)


def _keep_slow_path(module: nn.Module, args: Any, output: Any) -> None:
    return None
