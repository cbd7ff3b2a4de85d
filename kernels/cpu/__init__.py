"""Augmented linear attention in C++ for x86-64 with AVX2 or AVX512: forward, backward, cached step and tree.

The formula is `naive.py`'s in its causal form, and forward in its bidirectional one, for aligned queries and
keys without padding. One shared
library lies beside this file, built by `setup.py` where a compiler is found; it has a plain C interface and
is called through ctypes, which lets go of the GIL. Numbers come in as float32, bfloat16 or float16 and are
computed in float32.

    abi.h                   what crosses the C interface
    entry.cpp               its functions, the threads, the choice between AVX2 and AVX512
    avx2.cpp, avx512.cpp    the kernels, once per instruction set
    vector.h                vectors, rows of tensors, register tiles
    forward.h, backward.h   the whole sequence
    forward_both.h          the whole sequence, bidirectional
    decode.h                after a state: one token, a tree of tokens, tokens whose outputs are known
    salient.h, salient_backward.h    the attention of `kernels/salient.py`, called from `salient.py` here
    bidirectional.h         its form that looks both ways, called from `bidirectional.py`
    library.py              finding the library and calling it
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import CORE, SMALL, load, parameter, place, run, table, threads_for

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"relu2": 0, "linear": 1}
"""What the kernels compute; the numbers are those of `abi.h`."""


def available() -> bool:
    """Whether the library was built and this processor can run it."""
    return unavailable_reason() is None


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why `available()` is False, in one sentence; None when it is True."""
    return load()[1]


def isa() -> str:
    """The instruction set that is used: "avx512" or "avx2"; "" when `available()` is False."""
    return load()[2]


def supports(
    query: Tensor, key: Tensor, value: Tensor, conv_weight: Tensor | None, activation: str, group_size: int
) -> str | None:
    """What of a call the kernels do not take; None when they take it."""
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES:
        return f"query, key and value in {query.dtype}, {key.dtype} and {value.dtype}"
    if activation not in ACTIVATIONS:
        return f"the activation {activation!r}"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    *,
    isa: str | None = None,
) -> Tensor:
    """The causal operator on aligned, unpadded tokens, any strides.

    Args:
        query, key, value, alpha, ..., normalize: As for `chunk.forward`, in the dtypes of `DTYPES`.
        isa: "avx2" keeps to that instruction set; None takes the best.

    Returns:
        [B, H, T, Dv] in the dtype of `value`.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.
    """
    tables = alpha, local_scale, conv_weight
    return _outputs("linearize_forward", (query, key, value), tables, activation, group_size, normalize, isa)


def forward_both(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    *,
    isa: str | None = None,
) -> Tensor:
    """The bidirectional operator on unpadded tokens, or tokens behind which zeros stand; otherwise as
    `forward`. conv_weight: [H, K], K odd, the present token's in the middle.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.
    """
    if conv_weight is not None and not conv_weight.shape[1] % 2:
        raise ValueError(
            f"conv_weight is centred and needs an odd number of taps, not {conv_weight.shape[1]}"
        )
    tables = alpha, local_scale, conv_weight
    return _outputs(
        "linearize_forward_both", (query, key, value), tables, activation, group_size, normalize, isa
    )


def _outputs(
    entry: str,
    tokens: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor | None, Tensor | None, Tensor | None],
    activation: str,
    group_size: int,
    normalize: bool,
    isa: str | None,
) -> Tensor:
    """What an entry of the library that reads no state gives, [B, H, T, Dv]; see `forward`."""
    query, _, value = tokens
    fields, kept = _core(*tokens, *tables, activation, group_size, normalize)
    batch, heads, length, dim = query.shape
    out = value.new_empty(batch, heads, length, value.shape[3])
    threads = threads_for(batch * heads * length * dim * value.shape[3] * 3)
    run(entry, fields + place(out)[1], isa, threads)
    del kept  # the kernel read what they hold
    return out


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    *,
    isa: str | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of `forward`. Memory beyond them: one state for every 64 groups.

    Args:
        grad: [B, H, T, Dv], like its result.
        query, key, value, ...: Its arguments.

    Returns:
        Gradients of query, key, value, alpha, local_scale and conv_weight, each in the dtype of its argument,
        None where that is None.

    Raises:
        ValueError: As for `forward`.
    """
    fields, kept = _core(
        query, key, value, alpha, local_scale, conv_weight, activation, group_size, normalize
    )
    batch, heads, length, dim = query.shape
    if grad.shape != (batch, heads, length, value.shape[3]) or grad.dtype != value.dtype or not grad.is_cpu:
        raise ValueError(f"grad must be like the output, not {list(grad.shape)} in {grad.dtype}")
    grad, grad_fields = place(grad)
    dquery, dkey, dvalue = (x.new_empty(x.shape) for x in (query, key, value))
    parameters = (alpha, local_scale, conv_weight)
    sums = [None if x is None else x.new_empty(x.shape, dtype=torch.float32) for x in parameters]
    results = [field for x in (dquery, dkey, dvalue) for field in place(x)[1]]
    results += [0 if x is None else x.data_ptr() for x in sums]
    threads = threads_for(batch * heads * length * dim * value.shape[3] * 9)
    run("linearize_backward", (*fields[:CORE], *grad_fields, *fields[CORE:], *results), isa, threads)
    pairs = zip(sums, parameters, strict=True)
    totals = [None if x is None or y is None else x.to(y.dtype) for x, y in pairs]
    return (dquery, dkey, dvalue, *totals)


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recurrent: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    length: Tensor,
    folded: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    active: Tensor | None,
    *,
    isa: str | None = None,
) -> Tensor:
    """`recurrent.step`, with its arguments and result. The windows may have another dtype than `query`.

    Raises:
        ValueError: Shapes, dtypes, devices or strides do not fit.
    """
    fields, kept = _core(
        query, key, value, alpha, local_scale, conv_weight, activation, group_size, normalize
    )
    batch, heads, tokens, _ = query.shape
    if tokens != 1:
        raise ValueError(f"a step takes one token, not {tokens}")
    if active is not None:
        active = table(active, (batch,), torch.bool, "active")
    state = _state(query, value, conv_weight, group_size, recurrent, key_window, value_window, length, folded)
    out = value.new_empty(batch, heads, 1, value.shape[3])
    threads = _state_threads(query, recurrent, key_window)
    flags = (0 if active is None else active.data_ptr(),)
    run("linearize_step", fields + place(out)[1] + state + flags, isa, threads)
    return out


def append(
    key: Tensor,
    value: Tensor,
    recurrent: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    length: Tensor,
    folded: Tensor,
    group_size: int,
    normalize: bool,
    path: Tensor | None,
    *,
    isa: str | None = None,
) -> None:
    """`recurrent.append` of the tokens on a path.

    Args:
        key, value, ..., normalize: As there, the state as five tensors.
        path: int64 [B, P], the tokens to append in order, -1 for none; None appends all.

    Raises:
        ValueError: As for `step`.
        IndexError: The path names a token that does not exist; nothing is changed.
    """
    fields, kept = _core(key, key, value, None, None, None, "linear", group_size, normalize)
    state = _state(key, value, None, group_size, recurrent, key_window, value_window, length, folded)
    steps = 0
    if path is not None:
        path = table(path, (key.shape[0], path.shape[-1]), torch.int64, "path")
        steps = path.shape[1]
        if not steps:
            return
    tail = (0 if path is None else path.data_ptr(), steps)
    threads = threads_for(key.numel() * value.shape[3])
    run("linearize_append", fields[:CORE] + fields[CORE + 4 :] + state + tail, isa, threads)


def tree(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recurrent: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    length: Tensor,
    folded: Tensor,
    depth: Tensor,
    ancestors: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    *,
    isa: str | None = None,
) -> Tensor:
    """`recurrent.tree`, with its arguments and result; ancestors come before their descendants.

    Raises:
        ValueError: As for `step`.
    """
    fields, kept = _core(
        query, key, value, alpha, local_scale, conv_weight, activation, group_size, normalize
    )
    batch, heads, nodes, _ = query.shape
    depth = table(depth, (batch, nodes), torch.int64, "depth")
    ancestors = table(ancestors, (batch, nodes, nodes), torch.bool, "ancestors")
    state = _state(query, value, conv_weight, group_size, recurrent, key_window, value_window, length, folded)
    out = value.new_empty(batch, heads, nodes, value.shape[3])
    threads = _state_threads(query, recurrent, key_window)
    tables = (depth.data_ptr(), ancestors.data_ptr())
    run("linearize_tree", fields + place(out)[1] + state + tables, isa, threads)
    return out


# The functions below run once for every token that is decoded, so that they are written to be short of calls.


def _core(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """Checks the arguments: the fields of `Core`, query, key and value, and the tensors these point into."""
    batch, heads, length, dim = query.shape
    value_batch, kv_heads, value_length, value_dim = value.shape
    if (
        key.shape != (batch, kv_heads, length, dim)
        or value_batch != batch
        or value_length != length
        or not kv_heads
        or heads % kv_heads
    ):
        shapes = [list(x.shape) for x in (query, key, value)]
        raise ValueError(f"shapes of query, key and value do not fit: {shapes}")
    dtype = query.dtype
    if dtype != key.dtype or dtype != value.dtype or dtype not in DTYPES or activation not in ACTIVATIONS:
        refused = supports(query, key, value, conv_weight, activation, group_size)
        raise ValueError(f"the CPU kernel does not take {refused}")
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        raise ValueError(f"the CPU kernel takes tensors on the CPU, not on {query.device}")
    if group_size < 1 or not (batch and heads and length and dim and value_dim):
        raise ValueError(f"nothing to compute: group_size {group_size}, query {list(query.shape)}")
    taps = 0 if conv_weight is None else conv_weight.shape[1]
    query, query_fields = place(query)
    key, key_fields = place(key)
    value, value_fields = place(value)
    alpha, alpha_at = parameter(alpha, (heads,), "alpha")
    local_scale, local_at = parameter(local_scale, (heads,), "local_scale")
    conv_weight, conv_at = parameter(conv_weight, (heads, taps), "conv_weight")
    sizes = (DTYPES[dtype], batch, heads, kv_heads, length, dim, value_dim, group_size, taps)
    rest = (ACTIVATIONS[activation], normalize, alpha_at, local_at, conv_at)
    fields = sizes + rest + query_fields + key_fields + value_fields
    return fields, (query, key, value, alpha, local_scale, conv_weight)


def _state(
    query: Tensor,
    value: Tensor,
    conv_weight: Tensor | None,
    group_size: int,
    recurrent: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    length: Tensor,
    folded: Tensor,
) -> tuple[int, ...]:
    """The fields of `State`. The tensors may be written to, so that none can be copied first."""
    batch, _, _, dim = query.shape
    _, kv_heads, _, value_dim = value.shape
    window = key_window.shape[2]
    if (
        recurrent.shape != (batch, kv_heads, dim, value_dim)
        or key_window.shape != (batch, kv_heads, window, dim)
        or value_window.shape != (batch, kv_heads, window, value_dim)
        or length.shape != (batch,)
        or folded.shape != (batch,)
    ):
        shapes = [list(x.shape) for x in (recurrent, key_window, value_window, length, folded)]
        raise ValueError(f"the shapes of the state do not fit query, key and value: {shapes}")
    taps = 0 if conv_weight is None else conv_weight.shape[1]
    if window % group_size or window < taps:
        raise ValueError(
            f"a window of {window} rows holds no whole groups of {group_size}, or not {taps} taps"
        )
    dtype = key_window.dtype
    if (
        recurrent.dtype != torch.float32
        or dtype not in DTYPES
        or value_window.dtype != dtype
        or length.dtype != torch.int64
        or folded.dtype != torch.int64
    ):
        dtypes = [x.dtype for x in (recurrent, key_window, value_window, length, folded)]
        raise ValueError(f"the CPU kernel does not take a state in {dtypes}")
    if not (
        (recurrent.is_cpu and key_window.is_cpu and value_window.is_cpu and length.is_cpu and folded.is_cpu)
        and (batch == 1 or length.stride(0) == folded.stride(0) == 1)
    ):
        raise ValueError("all of the state must be on the CPU, the lengths side by side")
    recurrent_at, recurrent_fields = place(recurrent)
    key_at, key_fields = place(key_window)
    value_at, value_fields = place(value_window)
    if recurrent_at is not recurrent or key_at is not key_window or value_at is not value_window:
        raise ValueError("the columns of the state must be adjacent")
    rest = (DTYPES[dtype], window, length.data_ptr(), folded.data_ptr())
    return recurrent_fields + key_fields + value_fields + rest


def _state_threads(query: Tensor, recurrent: Tensor, key_window: Tensor) -> int:
    """One token is little arithmetic, but its state may have to come from memory: each counts for four."""
    size = recurrent.numel() + 2 * key_window.numel()
    if size * 4 < 2 * SMALL and query.shape[2] == 1:
        return 1
    rows = query.shape[1] * query.shape[2] // recurrent.shape[1]
    return threads_for(size * (4 + rows))
