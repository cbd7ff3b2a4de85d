"""The operators of domain `ai.linearize`, version 1: what a node means, whoever runs it.

A file holds each operator it uses twice: as nodes, one for each core call of a site, and once as a function
of standard operators under the same name (`body.py`), made for the sizes of the nodes in that file. A runtime
without a kernel for the operator inlines the function. Formulas of the families: `kernels/naive.py`; a
family is one choice of `act`:

| family                       | act(s)                                  | mechanisms                      |
|------------------------------|-----------------------------------------|---------------------------------|
| AugmentedLinearAttention     | relu(s)^2                               | augmented_paper, local, grouped,|
|                              |                                         | flash_local                     |
| PlainLinearAttention         | s                                       | relu, performer, hedgehog, rfa, |
|                              |                                         | transnormer, castling,          |
|                              |                                         | flash_global                    |
| LaplaceLinearAttention       | (1 + erf((s - sqrt(1/2)) sqrt(2 pi)))/2 | flash_local with "laplace"      |
| CollisionLinearAttention     | (1 - arccos(0.98 s) / pi)^8             | yoso                            |

B batch, H query heads, Hkv key/value heads (query head h reads h // (H // Hkv)), T tokens of the call, D and
Dv features of a head, G group_size, K taps. The type T is float, float16 or bfloat16; sums are float32.

Causal families (`AugmentedLinearAttention`, ...): T more tokens after a state.

    inputs   query [B,H,T,D] T, key [B,Hkv,T,D] T, value [B,Hkv,T,Dv] T,
             mask [B,T] bool: False tokens change nothing, their output is zero, whatever they hold,
             past_recurrent [B,Hkv,D,Dv] float, past_window [B,Hkv,R,D+Dv] T, past_length [B] int64,
             alpha [H] float, local_scale [H] float, conv_weight [H,K] float, K >= 1
    outputs  output [B,H,T,Dv] T, present_recurrent, present_window (shapes of the past ones)
    attrs    group_size: int >= 1; normalize: int, 1 divides query and key rows by their norms (0 stays 0)

    R = max(G, K, 2) - 1. The window holds the last R real tokens of each row as [key | value], newest last,
    keys after `normalize`; rows before the sequence are zero. `recurrent` is the sum of key^T value over all
    real tokens that are older than the window. past_length counts real tokens; n real tokens are added by the
    call. An empty state is all zeros. A token at position p sees
        own group (same p // G), itself included   local_scale * act(q.k)
        earlier groups, `recurrent` included       alpha * q.k
        token p - l, l < K                         conv_weight[l]
    Every earlier token of the own group and of the taps lies in the window or in the call, so every key is
    counted once, exactly, with no subtraction, and all shapes are constant: one graph serves prefill, prefill
    in pieces and decoding.
    A file's inputs and outputs hold the window as [B, Hkv R, D+Dv] (`past.N.conv`); it is reshaped around the
    node.

Bidirectional families (`Bidirectional` + name): every real token sees all.

    inputs   query, key, value, mask as above; alpha, local_scale [H] float; conv_weight [H,2K-1] float
    outputs  output [B,H,T,Dv] T
    attrs    group_size, normalize
    Positions count real tokens. Own group: local_scale * act(q.k); all tokens, own group too: alpha * q.k;
    token p + K-1 - l: conv_weight[l].

Cross families (`Cross` + name): queries [B,H,T,D] on keys [B,Hkv,S,D] of another sequence.

    inputs   query, key, value, mask [B,S] bool (of the keys), start int64 [1]: position of the first query;
             alpha, local_scale [H] float
    outputs  output [B,H,T,Dv] T
    attrs    group_size, normalize
    Key positions count real keys. Keys of group (start + t) // G: local_scale * act(q.k); all: alpha * q.k.

A mechanism's own operator (`OWN`; its formula stands in the mechanism's files): causal, T more tokens after a
state.

    inputs   query, key, value, mask, past_length as for the causal families,
             past_recurrent [B,Hkv,rows,columns] float, past_window [B,Hkv,R,D+Dv] T,
             then the operator's own inputs, all float
    outputs  output, present_recurrent, present_window
    attrs    the operator's own, int and float
    An empty state is all zeros.

| operator                     | R                                  | rows, columns | mechanism      |
|------------------------------|------------------------------------|---------------|----------------|
| WindowSoftmaxLinearAttention | max(window, 2) - 1                 | 2 D, Dv + 1   | softmax_window |
| SalientAttention             | max(sinks + salient, 1) + window   | R, 4          | augmented      |
|                              | + 32                               |               |                |
| CappedSalientAttention       | the same                           | R, 4          | augmented      |

`Bidirectional` and its name is one without a state, where the mechanism has it: inputs query, key, value and
mask, output and attributes as above.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..mechanisms import available
from ..mechanisms.onnx_form import StateOperator

DOMAIN = "ai.linearize"
VERSION = 1

FAMILIES: Mapping[str, str] = {
    "relu2": "AugmentedLinearAttention",
    "linear": "PlainLinearAttention",
    "laplace": "LaplaceLinearAttention",
    "yoso": "CollisionLinearAttention",
}
"""Name of the causal operator for each activation of the core (`kernels/activations.py`)."""

OWN: Mapping[str, StateOperator] = {
    operator.name: operator
    for mechanism in available().values()
    if mechanism.onnx is not None
    for operator in (mechanism.onnx, *mechanism.onnx.beside)
}
"""The operators with a state that mechanisms bring along, by name."""

WHOLE: Mapping[str, StateOperator] = {
    own.whole.registered: own for own in OWN.values() if own.whole is not None
}
"""Those that whole sequences have too, by the name of the registered operator."""


@dataclass(frozen=True)
class Operator:
    """One operator. inputs, outputs: (name, type) with "T" for the float type that all T of a node share,
    or "float", "int64", "bool"; attributes: (name, "int" or "float"), all required."""

    name: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    attributes: tuple[tuple[str, str], ...]


_TOKENS = (("query", "T"), ("key", "T"), ("value", "T"), ("mask", "bool"))
_PAST = (("past_recurrent", "float"), ("past_window", "T"), ("past_length", "int64"))
_PRESENT = (("output", "T"), ("present_recurrent", "float"), ("present_window", "T"))
_WEIGHTS = (("alpha", "float"), ("local_scale", "float"))
_CONV = (("conv_weight", "float"),)
_OUTPUT = (("output", "T"),)
_GROUPS = (("group_size", "int"), ("normalize", "int"))


def _family(name: str) -> tuple[Operator, ...]:
    return (
        Operator(name, (*_TOKENS, *_PAST, *_WEIGHTS, *_CONV), _PRESENT, _GROUPS),
        Operator(f"Bidirectional{name}", (*_TOKENS, *_WEIGHTS, *_CONV), _OUTPUT, _GROUPS),
        Operator(f"Cross{name}", (*_TOKENS, ("start", "int64"), *_WEIGHTS), _OUTPUT, _GROUPS),
    )


def _of_mechanism(own: StateOperator) -> tuple[Operator, ...]:
    attributes = (*((name, "int") for name in own.ints), *((name, "float") for name in own.floats))
    inputs = (*_TOKENS, *_PAST, *((name, "float") for name in own.own))
    after = Operator(own.name, inputs, _PRESENT, attributes)
    if own.whole is None:
        return (after,)
    return after, Operator(f"Bidirectional{own.name}", _TOKENS, _OUTPUT, attributes)


OPERATORS: Mapping[str, Operator] = {
    operator.name: operator
    for operator in (
        *(operator for name in FAMILIES.values() for operator in _family(name)),
        *(operator for own in OWN.values() for operator in _of_mechanism(own)),
    )
}
"""All operators of the domain by name."""


def window_rows(group_size: int, taps: int = 1) -> int:
    """R of a causal family, the rows of a state's window."""
    return max(group_size, taps, 2) - 1
