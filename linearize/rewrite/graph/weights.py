"""Attention weights that an owner returns beside its result: a linear form has none to return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node

from ...errors import InputError
from ...passes.graphs import ancestors
from ...passes.site import Refusal
from .rebuild import flat_outputs


class NoWeightsError(InputError, AttributeError):
    """Attention weights are read of an attention that makes none; `hasattr` and the like get their answer."""


class NoWeights:
    """Stands where attention weights were. To hand it on is no error, and to read it is one."""

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def __repr__(self) -> str:
        return f"<no attention weights of {self._owner}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._error()

    def __getitem__(self, index: Any) -> Any:
        raise self._error()

    def __iter__(self) -> Any:
        raise self._error()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise next((one for one in args if isinstance(one, cls)), cls("the model"))._error()

    def _error(self) -> NoWeightsError:
        owner = self.__dict__.get("_owner", "the model")
        return NoWeightsError(
            f"{owner}: the attention weights that it returned are read, and its attention is rewritten to "
            "one that makes none; take them from the original model, or leave this module softmax with "
            "keep_softmax"
        )


def drop_weights(gm: GraphModule, refusals: Sequence[Refusal]) -> tuple[int, ...]:
    """Return None in place of what is computed from attention weights and from nothing behind them.

    refusals: of the graph, because weights are used beside the product with the values.
    Returns which of the results these are; the first, which is the result proper, never is.
    """
    output = gm.graph.output_node()
    values = flat_outputs(gm.graph)
    result = ancestors([values[0]]) if isinstance(values[0], Node) else set()
    weights = {refusal.node for refusal in refusals}
    users = {user for node in weights for user in node.users}
    dropped = []
    for place, value in enumerate(values[1:], start=1):
        behind = users & ancestors([value]) if isinstance(value, Node) else set()
        if value in weights or (behind and not behind & result):
            values[place] = None
            dropped.append(place)
    output.args = (tuple(values),)
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return tuple(dropped)
