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
    """An operator of domain `ai.linearize`: T more tokens after a state.

    The inputs of its node are query, key, value, mask, past_recurrent, past_window and past_length, as
    `onnx/schema.py` describes them, then the mechanism's own; the outputs are output, present_recurrent and
    present_window.

    Attributes:
        name: Of the operator.
        own: Names of the mechanism's own inputs, each a float32 tensor.
        ints: Names of its int attributes.
        floats: Names of its float attributes.
        body: The formula in standard ONNX operators:
            `body(op, call, *own) -> (output, present_recurrent, present_window)`.
            `op` writes operators (`op.MatMul(a, b)`, and the idioms of `onnx/blocks.py` `Builder`), `call` is
            that file's `StateCall`: the other inputs, and ways to cut them into blocks.
        whole: Attention of a whole sequence, without a state; None where that has no ONNX form.
        beside: Other operators that the mechanism's modules may write in the place of this one.
    """

    name: str
    own: tuple[str, ...]
    ints: tuple[str, ...]
    floats: tuple[str, ...]
    body: Callable[..., tuple[Any, Any, Any]]
    whole: WholeForm | None = None
    beside: tuple[StateOperator, ...] = ()


@dataclass(frozen=True)
class WholeForm:
    """How the mechanism's registered operator on a whole sequence becomes one node.

    A causal sequence is the operator itself after an empty state. Any other is an operator of its own, called
    `Bidirectional` and the operator's name: inputs query, key, value and mask, the same attributes, and one
    output.

    Attributes:
        registered: Name of the registered operator, `torch.ops.linearize.<name>`. It takes query
            [B, Hkv, R, T, D] and gives [B, Hkv, R, T, Dv].
        call: Its arguments -> the node, the mask (bool [B, T] or None) and whether it is causal.
        bidirectional: The formula of the other one, `bidirectional(op, call) -> output`; `call` is the
            `WholeCall` of `onnx/blocks.py`.
    """

    registered: str
    call: Callable[..., tuple[OperatorCall, Tensor | None, bool]]
    bidirectional: Callable[..., Any]


@dataclass(frozen=True)
class OperatorCall:
    """One call of a mechanism's own operator after its past, as `Term` is one of the core operator.

    Attributes:
        operator: The operator, which some mechanism's `Mechanism.onnx` names, so that the file can define it.
        query: [B, H, T, D]; query head h reads key/value head h // (H // Hkv).
        key: [B, Hkv, T, D].
        value: [B, Hkv, T, Dv].
        own: The operator's own inputs, in order.
        ints: Its int attributes by name.
        floats: Its float attributes by name.
        rows: Rows of the window of its state, [key | value] each, per key/value head.
        sums: Rows and columns of the recurrent part of its state, per key/value head.
    """

    operator: StateOperator
    query: Tensor
    key: Tensor
    value: Tensor
    own: Sequence[Tensor]
    ints: Mapping[str, int]
    floats: Mapping[str, float]
    rows: int
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

    def tokens(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Of the call that brings value [B, Hkv, T, Dv]: bool [B, T], which tokens are no padding, and int64
        [B], how many real ones came before."""
        ...
