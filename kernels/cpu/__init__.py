"""Augmented linear attention in C++ for x86-64 with AVX2 or AVX512: forward, backward, cached step and tree.

The formula is `oracle.py`'s in its causal form, for aligned queries and keys without padding. One shared
library lies beside this file, built by `setup.py` where a compiler is found; it has a plain C interface and
is called through ctypes, which lets go of the GIL. Numbers come in as float32, bfloat16 or float16 and are
computed in float32.

    abi.h                   what crosses the C interface
    entry.cpp               its functions, the threads, the choice between AVX2 and AVX512
    avx2.cpp, avx512.cpp    the kernels, once per instruction set
    vector.h                vectors, rows of tensors, register tiles
    forward.h, backward.h   the whole sequence
    decode.h                one token or a tree of tokens after a state
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"relu2": 0, "linear": 1}
"""What the kernels compute; the numbers are those of `abi.h`."""

_ISAS = {"avx2": 1, "avx512": 2}
_SMALL = 4e6
"""Multiplications worth a thread: a few times what starting one costs."""


def available() -> bool:
    """Whether the library was built and this processor can run it."""
    return unavailable_reason() is None


def unavailable_reason(device: torch.device | None = None) -> str | None:
    """Why `available()` is False, in one sentence; None when it is True."""
    return _load()[1]


def isa() -> str:
    """The instruction set that is used: "avx512" or "avx2". Raises RuntimeError when there is none."""
    _library()
    return _load()[2]


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
    """query [B, H, T, D], key [B, Hkv, T, D], value [B, Hkv, T, Dv] -> [B, H, T, Dv] in value's dtype.

    alpha and local_scale [H], conv_weight [H, K], each None to leave its part out. Any strides. isa: "avx2"
    to keep to that instruction set. ValueError for shapes, dtypes or devices that do not fit.
    """
    call = _Call(query, key, value, alpha, local_scale, conv_weight, activation, group_size, normalize)
    out = value.new_empty(call.batch, call.heads, call.length, call.value_dim)
    fields = (*call.core, *call.tensors, *_place(out))
    _run(_library().linearize_forward, fields, isa, call.threads(3))
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
    """Gradients of `forward`'s query, key, value, alpha, local_scale and conv_weight; grad is like out.

    Each has its input's dtype, and is None where the input is. Memory beyond the gradients: one state for
    every 64 groups.
    """
    call = _Call(query, key, value, alpha, local_scale, conv_weight, activation, group_size, normalize)
    if grad.shape != (call.batch, call.heads, call.length, call.value_dim) or grad.dtype != value.dtype:
        raise ValueError(f"grad must be like the output, not {list(grad.shape)} in {grad.dtype}")
    grad = _columns_adjacent(grad)
    inputs = [x.new_empty(x.shape) for x in (query, key, value)]
    # One row of sums for each entry of the batch: rows are written by different threads.
    sums = [
        None if x is None else x.new_empty(call.batch, *x.shape, dtype=torch.float32)
        for x in (alpha, local_scale, conv_weight)
    ]
    fields = (
        *(*call.core, *_place(grad), *call.tensors),
        *(field for x in inputs for field in _place(x)),
        *(0 if x is None else x.data_ptr() for x in sums),
    )
    _run(_library().linearize_backward, fields, isa, call.threads(9))
    parameters = zip(sums, (alpha, local_scale, conv_weight), strict=True)
    return (*inputs, *(None if x is None or y is None else x.sum(0).to(y.dtype) for x, y in parameters))


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
    """One token after a state (see `state.py`), changed in place: query [B, H, 1, D] -> [B, H, 1, Dv].

    key and value [B, Hkv, 1, D or Dv]; rows may differ in length. active: bool [B]; the others keep their
    state and their output is zero. The windows may have another dtype than query. ValueError for shapes,
    dtypes, devices or strides that do not fit.
    """
    call = _Call(query, key, value, alpha, local_scale, conv_weight, activation, group_size, normalize)
    if call.length != 1:
        raise ValueError(f"a step takes one token, not {call.length}")
    if active is not None:
        active = _table(active, (call.batch,), torch.bool, "active")
    state = call.state(recurrent, key_window, value_window, length, folded)
    out = value.new_empty(call.batch, call.heads, 1, call.value_dim)
    where = 0 if active is None else active.data_ptr()
    threads = call.threads_for(key_window.shape[2])
    _run(_library().linearize_step, (*call.core, *call.tensors, *_place(out), *state, where), isa, threads)
    return out


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
    """N draft nodes after a state, which is only read: query [B, H, N, D] -> [B, H, N, Dv].

    key and value [B, Hkv, N, D or Dv]; depth int64 [B, N], a node sits at position length + depth; ancestors
    bool [B, N, N], [u, a] True when a is u or an ancestor of u. ValueError as in `step`.
    """
    call = _Call(query, key, value, alpha, local_scale, conv_weight, activation, group_size, normalize)
    nodes = call.length
    depth = _table(depth, (call.batch, nodes), torch.int64, "depth")
    ancestors = _table(ancestors, (call.batch, nodes, nodes), torch.bool, "ancestors")
    state = call.state(recurrent, key_window, value_window, length, folded)
    out = value.new_empty(call.batch, call.heads, nodes, call.value_dim)
    fields = (*call.core, *call.tensors, *_place(out), *state, depth.data_ptr(), ancestors.data_ptr())
    _run(_library().linearize_tree, fields, isa, call.threads_for(key_window.shape[2]))
    return out


class _Call:
    """Checked arguments as the fields of `Core`, and the tensors that must live until the call returns."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: Tensor | None,
        local_scale: Tensor | None,
        conv_weight: Tensor | None,
        activation: str,
        group_size: int,
        normalize: bool,
    ) -> None:
        self.batch, self.heads, self.length, self.dim = batch, heads, length, dim = query.shape
        _, self.kv_heads, _, self.value_dim = _, kv_heads, _, value_dim = value.shape
        if (
            key.shape != (batch, kv_heads, length, dim)
            or value.shape != (batch, kv_heads, length, value_dim)
            or heads % kv_heads
        ):
            shapes = [list(x.shape) for x in (query, key, value)]
            raise ValueError(f"shapes of query, key and value do not fit: {shapes}")
        refused = supports(query, key, value, conv_weight, activation, group_size)
        if refused:
            raise ValueError(f"the CPU kernel does not take {refused}")
        if not (query.is_cpu and key.is_cpu and value.is_cpu):
            raise ValueError(f"the CPU kernel takes tensors on the CPU, not on {query.device}")
        if group_size < 1 or not query.numel() or not value_dim:
            raise ValueError(f"nothing to compute: group_size {group_size}, query {list(query.shape)}")
        self.group, self.taps = group_size, 0 if conv_weight is None else conv_weight.shape[1]
        self.inputs = [_columns_adjacent(x) for x in (query, key, value)]
        self.parameters = [
            _parameter(alpha, (heads,), "alpha"),
            _parameter(local_scale, (heads,), "local_scale"),
            _parameter(conv_weight, (heads, self.taps), "conv_weight"),
        ]
        self.core = (
            *(DTYPES[query.dtype], batch, heads, kv_heads, length, dim, value_dim),
            *(group_size, self.taps, ACTIVATIONS[activation], int(normalize)),
            *[0 if x is None else x.data_ptr() for x in self.parameters],
        )
        self.tensors = [field for x in self.inputs for field in _place(x)]

    def state(
        self, recurrent: Tensor, key_window: Tensor, value_window: Tensor, length: Tensor, folded: Tensor
    ) -> tuple[int, ...]:
        """The fields of `State` in abi.h. The tensors are written to, so that none can be copied first."""
        head, window = (self.batch, self.kv_heads), key_window.shape[2]
        if (
            recurrent.shape != (*head, self.dim, self.value_dim)
            or key_window.shape != (*head, window, self.dim)
            or value_window.shape != (*head, window, self.value_dim)
            or not length.shape == folded.shape == (self.batch,)
        ):
            shapes = [list(x.shape) for x in (recurrent, key_window, value_window, length, folded)]
            raise ValueError(f"the shapes of the state do not fit query, key and value: {shapes}")
        if window % self.group or window < self.taps:
            raise ValueError(
                f"a window of {window} rows is no multiple of {self.group}, or less than {self.taps} taps"
            )
        if (
            recurrent.dtype != torch.float32
            or key_window.dtype not in DTYPES
            or key_window.dtype != value_window.dtype
            or not length.dtype == folded.dtype == torch.int64
        ):
            dtypes = [x.dtype for x in (recurrent, key_window, value_window, length, folded)]
            raise ValueError(f"the CPU kernel does not take a state in {dtypes}")
        state = (recurrent, key_window, value_window)
        if not all(x.is_cpu and (x.stride(3) == 1 or x.shape[3] == 1) for x in state) or not (
            length.is_contiguous() and folded.is_contiguous() and length.is_cpu and folded.is_cpu
        ):
            raise ValueError("the columns of the state must be adjacent, and all of it on the CPU")
        return (
            *(field for x in state for field in _place(x)),
            *(DTYPES[key_window.dtype], window, length.data_ptr(), folded.data_ptr()),
        )

    def threads(self, products: int) -> int:
        """Threads worth starting, when every token takes part in about so many [D, Dv] products."""
        work = self.batch * self.heads * self.length * self.dim * self.value_dim * products
        return 1 if work < 2 * _SMALL else min(torch.get_num_threads(), int(work / _SMALL))

    def threads_for(self, window: int) -> int:
        """Likewise for tokens that read a state: its size counts, for it must come from memory."""
        rows = 8 * self.dim + window + self.heads // self.kv_heads * self.length * (self.dim + window)
        work = self.batch * self.kv_heads * rows * (self.dim + self.value_dim)
        return 1 if work < 2 * _SMALL else min(torch.get_num_threads(), int(work / _SMALL))


def _run(function: Any, fields: Iterable[int], isa: str | None, threads: int) -> None:
    chosen = best = _load()[3]
    if isa is not None:
        chosen = _ISAS[isa]
        if chosen > best:
            raise ValueError(f"this processor has no {isa}")
    if function(array("q", fields).tobytes(), chosen, threads):
        raise MemoryError("the CPU kernel could not allocate its scratch memory")


def _place(x: Tensor) -> tuple[int, int, int, int]:
    """The fields of `Tensor` in abi.h."""
    batch, head, row, _ = x.stride()
    return x.data_ptr(), batch, head, row


def _columns_adjacent(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _parameter(x: Tensor | None, shape: tuple[int, ...], name: str) -> Tensor | None:
    if x is None:
        return None
    if x.shape != shape or not x.is_cpu or not x.numel():
        raise ValueError(
            f"{name} must have shape {list(shape)} on the CPU, not {list(x.shape)} on {x.device}"
        )
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.detach().float().contiguous()


def _table(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    if x.shape != shape or x.dtype != dtype or not x.is_cpu:
        raise ValueError(f"{name} must be {dtype} {list(shape)} on the CPU, not {x.dtype} {list(x.shape)}")
    return x.contiguous()


def _library() -> ctypes.CDLL:
    library, reason, *_ = _load()
    if library is None:
        raise RuntimeError(f"the CPU kernel is not available: {reason}")
    return library


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None, str, int]:
    """The library, why there is none, and the name and number of the instruction set."""
    path = Path(__file__).with_name("_kernels.so")
    if not path.exists():
        return None, "the C++ kernels were not built when linearize was installed", "", 0
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the C++ kernels could not be loaded: {error}", "", 0
    library.linearize_isa.restype = ctypes.c_int64
    found = library.linearize_isa()
    names = {number: name for name, number in _ISAS.items()}
    if found not in names:
        return None, "this processor has no AVX2", "", 0
    for name in ("forward", "backward", "step", "tree"):
        function = getattr(library, f"linearize_{name}")
        function.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
        function.restype = ctypes.c_int
    return library, None, names[found], found
