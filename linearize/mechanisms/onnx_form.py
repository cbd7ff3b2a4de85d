"""How a mechanism says what it is in ONNX, in its own file and without importing anything of ONNX.

A sum of core calls (`terms`) says so already and needs nothing from here. A mechanism that is more than that
has an operator of its own: a `StateOperator` in its `Mechanism`, and `AttentionModule.emit_onnx`, which
writes it through the `Nodes` that the exporter hands in. `onnx/` asks for both and knows no mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .term import Term


@dataclass(frozen=True)
class StateOperator:
    """An operator of domain `ai.linearize`: exact over a window of tokens, sums over all earlier ones.

    Its node takes T more tokens after a state. The inputs are query, key, value, mask, past_recurrent,
    past_window and past_length, as `onnx/schema.py` describes them, then the mechanism's own; the outputs are
    output, present_recurrent and present_window. past_window holds the last max(window, 2) - 1 tokens.

    Attributes:
        name: Of the operator.
        own: Names of the mechanism's own inputs, each a float32 tensor.
        floats: Names of its float attributes. Every such operator has the int attribute `window` too.
        body: The formula in standard ONNX operators:
            `body(op, recent, near, past_recurrent, past_length, *own) -> (out, present_recurrent)`.
            `op` writes operators (`op.MatMul(a, b)`, and the idioms of `onnx/blocks.py` `Builder`), `recent`
            is that file's `Recent`: the window and the call in blocks. `near` is the attribute `window` as a
            tensor [1]; out is [B, Hkv, repeats, blocks, block, Dv].
        beside: Other operators that the mechanism's modules may write in the place of this one.
    """

    name: str
    own: tuple[str, ...]
    floats: tuple[str, ...]
    body: Callable[..., tuple[Any, Any]]
    beside: tuple[StateOperator, ...] = ()


@dataclass(frozen=True)
class OperatorCall:
    """One call of a mechanism's own operator after its past, as `Term` is one of the core operator.

    Attributes:
        operator: The operator, which some mechanism's `Mechanism.onnx` names, so that the file can define it.
        query: [B, H, T, D]; query head h reads key/value head h // (H // Hkv).
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, Dv].
        own: The operator's own inputs, in order.
        window: Its attribute `window`.
        floats: Its float attributes by name.
        sums: Rows and columns of the recurrent part of its state, per key/value head.
    """

    operator: StateOperator
    query: Tensor
    key: Tensor
    value: Tensor
    own: Sequence[Tensor]
    window: int
    floats: Mapping[str, float]
    sums: tuple[int, int]


class Nodes(Protocol):
    """Writes the nodes of one module in one call. Every node has its own part of the module's state, so the
    nodes must come in the same order each time."""

    def core(self, term: Term, group_size: int, kv_layout: str) -> Tensor:
        """The causal core call after its past: [B, H, T, Dv] in the dtype of `term.value`."""
        ...

    def operator(self, given: OperatorCall) -> Tensor:
        """The mechanism's own operator after its past: [B, H, T, Dv] in the dtype of `given.value`."""
        ...
