"""`kernels/salient_recurrent.py` in C++: any number of tokens after a state that takes none back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..salient import BLOCK, DELAY, Flat, Sizes, State
from ..softmax import Scores
from . import DTYPES
from .library import Laid, parameter, place, run, table, threads_for

_KINDS = [torch.float32, torch.float32, torch.int64, torch.int64]
"""Of scores, votes, length and block: what the kernel reads at their addresses."""


def refusal(query: Tensor, key: Tensor, value: Tensor, state: State, sizes: Sizes) -> str | None:
    """What of a call the kernel does not take; None when it takes it. Arguments as for `extend`."""
    refused = tokens_refusal(query, key, value)
    if refused is not None:
        return refused
    if state.keys.dtype != state.values.dtype or state.keys.dtype not in DTYPES:
        return f"a state in {state.keys.dtype}"
    kinds = [x.dtype for x in state[2:]]
    if kinds != _KINDS:
        return f"a state whose weights and lengths are in {kinds}"
    if state.keys.shape[2] != sizes.kept + sizes.window + BLOCK or state.votes.shape[2] != 1 + DELAY // BLOCK:
        return "a state that can take tokens back"
    if any(type(x) is not Tensor or not x.is_cpu for x in state):
        return "a state that is not of plain tensors on the CPU"
    if (
        not _in_rows(state.scores)
        or not _in_rows(state.votes)
        or any(x.shape[3] > 1 and x.stride(3) != 1 for x in (state.keys, state.values))
    ):
        return "a state whose columns are apart"
    return None


def _in_rows(x: Tensor) -> bool:
    """Whether what a sequence has of x is adjacent."""
    return x[:1].is_contiguous()


def tokens_refusal(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """`refusal` of what every call has."""
    dtype = query.dtype
    if dtype != key.dtype or dtype != value.dtype or dtype not in DTYPES:
        return f"query, key and value in {query.dtype}, {key.dtype} and {value.dtype}"
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        return "tensors that are not on the CPU"
    if not (query.numel() and value.numel()):
        return "tensors without elements"
    return None


def extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    sizes: Sizes,
    rule: Scores,
    conv_weight: Tensor | None,
    tail_weight: Tensor | None,
    count: Tensor | None,
    *,
    isa: str | None = None,
) -> Tensor:
    """As `salient_recurrent.extend`, and the tail, for a call that `refusal` has nothing to say against.

    Args:
        query, key, value, state, sizes, rule, conv_weight: As there.
        tail_weight: As for `salient_tail.after_state`. None: no tail.
        count: int64 [B]: how many of the tokens are real, those in front. None: all.
        isa: "avx2" keeps to that instruction set; None takes the best.

    Returns:
        float32 [B, Hkv, R, T, Dv], zeros for tokens that are not real.

    Raises:
        ValueError: Shapes do not fit together.
    """
    batch, kv_heads, shared, length, _ = query.shape
    out = torch.empty(batch, kv_heads * shared, length, value.shape[3])
    if count is not None:
        count = table(count, (batch,), torch.int64, "count")
        out.zero_()
    tokens = query, key, value, state, sizes, rule
    fields, kept = _fields(*tokens, conv_weight, tail_weight, out, count)
    run("linearize_salient", fields, isa, threads_for(_work(query, value, sizes)))
    del kept  # the kernel read what they hold
    return out.unflatten(1, (kv_heads, shared))


class Weights:
    """Those of convolution and tail that say anything: others cost as much. For `fits` to allow."""

    def __init__(self, *weights: Tensor | None) -> None:
        self._known = [_values(x) for x in weights]
        self.speaking = tuple(x if x is not None and bool(x.any()) else None for x in weights)

    def fits(self, *weights: Tensor | None) -> bool:
        """Whether these are the weights, with the values that they had."""
        return self._known == [_values(x) for x in weights]


def extend_flat(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    sizes: Sizes,
    rule: Scores,
    conv_weight: Tensor | None,
    tail_weight: Tensor | None,
    flat: Flat,
) -> Tensor:
    """`extend` of many sequences in one call, without a copy of their states.

    Args:
        query: [1, Hkv, R, T, D], tokens of all sequences, for which `refusal` has nothing to say.
        key: [1, Hkv, T, D].
        value: [1, Hkv, T, Dv].
        state: Of as many rows as there are slots.
        sizes, rule, conv_weight, tail_weight: As for `extend`.
        flat: Which are whose.

    Returns:
        float32 [1, Hkv, R, T, Dv], zeros for tokens that are no sequence's.

    Raises:
        ValueError: Shapes do not fit together, or `flat` names what is not there.
    """
    _, kv_heads, shared, length, _ = query.shape
    batch, held, tables = len(flat.slots), len(state.length), (flat.slots, flat.first, flat.count)
    numbers = [x.tolist() for x in tables]
    inside = all(
        0 <= slot < held and 0 <= first <= first + count <= length
        for slot, first, count in zip(*numbers, strict=True)
    )
    if not inside or len(set(numbers[0])) < batch:
        raise ValueError("slots or tokens that are not there, or that are named twice")
    slots, firsts, counts = (table(x, (batch,), torch.int64, "slots, first and count") for x in tables)
    out = torch.zeros(1, kv_heads * shared, length, value.shape[3])
    query, key, value = (x.expand(batch, *x.shape[1:]) for x in (query, key, value))
    weights = conv_weight, tail_weight
    laid = out.expand(batch, *out.shape[1:])
    tokens = query, key, value, state, sizes, rule
    fields, kept = _fields(*tokens, *weights, laid, counts, slots, firsts)
    work = _work(query[:1], value, sizes)
    run("linearize_salient", fields, None, threads_for(work))
    del kept
    return out.unflatten(1, (kv_heads, shared))


def _fields(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    sizes: Sizes,
    rule: Scores,
    conv_weight: Tensor | None,
    tail_weight: Tensor | None,
    out: Tensor,
    count: Tensor | None,
    slots: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[tuple[float, ...], list[Tensor | None]]:
    """The fields of `Salient` in abi.h, and the tensors they point into; raises as `extend` does."""
    batch, kv_heads, shared, length, dim = query.shape
    rows, taps = sizes.kept + sizes.window + BLOCK, 0 if conv_weight is None else conv_weight.shape[2]
    held = (batch if slots is None else len(state.length), kv_heads, rows)
    check_tokens(query, key, value)
    if (
        state.keys.shape != (*held, dim)
        or state.values.shape != (*held, value.shape[3])
        or state.scores.shape != held
        or state.votes.shape != (*held[:2], 1 + DELAY // BLOCK, rows)
        or not state.length.shape == state.block.shape == held[:1]
        or taps > sizes.window + 1
    ):
        shapes = [list(x.shape) for x in state]
        raise ValueError(f"a state of shapes {shapes}, or {taps} taps, does not fit {sizes}")
    if [x.dtype for x in state[2:]] != _KINDS or not all(x.is_cpu for x in state):
        raise ValueError(f"the CPU kernel does not take a state in {[x.dtype for x in state]}")
    value_dim, heads = value.shape[3], kv_heads * shared
    conv, conv_at = _of_heads(conv_weight, (heads, taps), "conv_weight")
    columns = dim + value_dim + 1
    tail, tail_at = _of_heads(tail_weight, (heads, value_dim, columns), "tail_weight")
    kept = [place(x) for x in (query.flatten(1, 2), key, value, out, state.keys, state.values)]
    fields = (
        *(DTYPES[query.dtype], DTYPES[state.keys.dtype], batch, heads, kv_heads, length, dim, value_dim),
        *(*sizes, state.votes.shape[2], taps, *fields_of(rule)),
        *(field for _, of_tensor in kept for field in of_tensor),
        *(x.data_ptr() for x in (state.scores, state.votes, state.length, state.block)),
        *(0 if count is None else count.data_ptr(), conv_at, tail_at),
        *(0 if slots is None else slots.data_ptr(), *(x.stride(0) for x in state[2:])),
        0 if first is None else first.data_ptr(),
    )
    return fields, [*(x for x, _ in kept), conv, tail, count, slots, first]


def _work(query: Tensor, value: Tensor, sizes: Sizes) -> int:
    """Multiplications of a call."""
    seen = sizes.kept + sizes.window + BLOCK
    return query.numel() // query.shape[4] * seen * (query.shape[4] + value.shape[3])


class OneToken:
    """`extend` of one token for each sequence, its arguments laid out once.

    It is for tokens like those that it is made with, and for state and weights while these are where they are
    and as they are: a call is for `fits` to allow.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: State,
        sizes: Sizes,
        rule: Scores,
        conv_weight: Tensor | None,
        tail_weight: Tensor | None,
    ) -> None:
        """query: [B, H, 1, D], the heads that share a key/value head side by side. conv_weight: [H, K].
        tail_weight: [H, Dv, D + Dv + 1]. All else as for `extend`; raises ValueError likewise."""
        self._weights = conv_weight, tail_weight
        self._like = _layout(query, key, value)
        self._held = _places(state, self._weights)
        batch, heads, _, dim = query.shape
        kv_heads, value_dim = key.shape[1], value.shape[3]
        self._shape = batch, heads, 1, value_dim
        rows = query.unflatten(1, (kv_heads, -1))
        conv, tail = (
            x.unflatten(0, (kv_heads, -1)) if x is not None and bool(x.any()) else None
            for x in (conv_weight, tail_weight)
        )
        tokens = rows, key, value, state, sizes, rule
        fields, self._kept = _fields(*tokens, conv, tail, torch.empty(self._shape), None)
        self._kept += state
        self._call = Laid("linearize_salient", fields)
        self._work = _work(rows, value, sizes)

    def fits(
        self, query: Tensor, key: Tensor, value: Tensor, state: State, weights: tuple[Tensor | None, ...]
    ) -> bool:
        """Whether the call may be made; weights: of convolution and tail, as they are now."""
        return (
            weights[0] is self._weights[0]
            and weights[1] is self._weights[1]
            and None not in self._like
            and self._like == _layout(query, key, value)
            and self._held == _places(state, weights)
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None) -> Tensor:
        """float32 [B, H, 1, Dv]. real: bool [B, 1], sequences whose token counts; zeros for the others."""
        out, count = torch.empty(self._shape), None
        if real is not None:
            out.zero_()
            count = real[:, 0].long()
        places = self._call.places
        places[_QUERY] = query.data_ptr()
        places[_KEY] = key.data_ptr()
        places[_VALUE] = value.data_ptr()
        places[_OUT] = out.data_ptr()
        places[_COUNT] = 0 if count is None else count.data_ptr()
        self._call.run(threads_for(self._work))
        return out


_QUERY, _KEY, _VALUE, _OUT, _COUNT = 15, 19, 23, 27, 43
"""Where the fields of `Salient` in abi.h say where these are."""


def _layout(*tokens: Tensor) -> list[Any]:
    """What the fields say of tokens besides where they are; None where the kernel could not read them."""
    return [(x.shape, x.stride(), x.dtype) if x.is_cpu and x.stride(3) == 1 else None for x in tokens]


def _places(state: State, weights: tuple[Tensor | None, ...]) -> list[Any]:
    """Where state and weights are, and which values the weights have."""
    return [*(x.data_ptr() for x in state), *(_values(x) for x in weights)]


def _values(x: Tensor | None) -> Any:
    """What is other when x has other values; nothing equals that of tensors whose changes no one counts."""
    return None if x is None else object() if x.is_inference() else (x.data_ptr(), x._version)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    sizes: Sizes,
    rule: Scores,
    count: Tensor | None,
    *,
    isa: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of whole sequences by query, key and value, for what `refusal` has nothing to say against.

    Args:
        grad: Of the output, float32 [B, Hkv, R, T, Dv].
        query, key, value, sizes, rule, count: As for `extend`.
        positions: int64 [B, Hkv, blocks, K], what `salient_chunk.select` found.
        isa: "avx2" keeps to that instruction set; None takes the best.

    Returns:
        Those of query, key and value, each float32 and of its shape.

    Raises:
        ValueError: Shapes do not fit together.
    """
    check_tokens(query, key, value)
    batch, kv_heads, shared, length, dim = query.shape
    if grad.shape != (*query.shape[:4], value.shape[3]):
        raise ValueError(f"grad must be like the output, not {list(grad.shape)}")
    value_dim, heads, blocks = value.shape[3], kv_heads * shared, -(-length // BLOCK)
    grads = [torch.zeros(x.shape, dtype=torch.float32) for x in (query, key, value)]
    positions = table(positions, (batch, kv_heads, blocks, sizes.kept), torch.int64, "positions")
    if count is not None:
        count = table(count, (batch,), torch.int64, "count")
    rows = query.flatten(1, 2), key, value, grad.float().flatten(1, 2), grads[0].flatten(1, 2), *grads[1:]
    kept = [place(x) for x in rows]
    fields = (
        *(DTYPES[query.dtype], batch, heads, kv_heads, length, dim, value_dim, sizes.window, sizes.kept),
        *(blocks, *fields_of(rule)),
        *(field for _, of_tensor in kept for field in of_tensor),
        *(positions.data_ptr(), 0 if count is None else count.data_ptr()),
    )
    work = batch * heads * length * (sizes.kept + sizes.window + BLOCK) * (dim + value_dim) * 2
    run("linearize_salient_backward", fields, isa, threads_for(work))
    return grads[0], grads[1], grads[2]


def check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError unless the shapes fit: the kernel reads what they say."""
    batch, kv_heads, _, length, dim = query.shape
    if key.shape != (batch, kv_heads, length, dim) or value.shape[:3] != key.shape[:3]:
        shapes = [list(x.shape) for x in (query, key, value)]
        raise ValueError(f"shapes of query, key and value do not fit: {shapes}")


def fields_of(rule: Scores) -> tuple[float, float]:
    """The fields `scale` and `softcap` in abi.h."""
    return rule.scale, rule.softcap or 0.0


def _of_heads(x: Tensor | None, shape: tuple[int, ...], name: str) -> tuple[Tensor | None, int]:
    return parameter(None if x is None else x.reshape(shape), shape, name)
