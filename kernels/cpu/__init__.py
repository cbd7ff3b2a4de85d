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
"""

from __future__ import annotations

import ctypes
import struct
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
    """Gradients of `forward`'s query, key, value, alpha, local_scale and conv_weight; grad [B, H, T, Dv] like out.

    Each has its input's dtype, and is None where the input is. Memory beyond the gradients: one state for
    every 64 groups.
    """
    call = _Call(query, key, value, alpha, local_scale, conv_weight, activation, group_size, normalize)
    if grad.shape != (call.batch, call.heads, call.length, call.value_dim) or grad.dtype != value.dtype:
        raise ValueError(f"grad must be like the output, not {list(grad.shape)} in {grad.dtype}")
    grad = _columns_adjacent(grad)
    inputs = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
    # One row of sums for each entry of the batch: rows are written by different threads.
    sums = [
        None if x is None else torch.empty(call.batch, *x.shape) for x in (alpha, local_scale, conv_weight)
    ]
    fields = (
        *(*call.core, *_place(grad), *call.tensors),
        *(field for x in inputs for field in _place(x)),
        *(0 if x is None else x.data_ptr() for x in sums),
    )
    _run(_library().linearize_backward, fields, isa, call.threads(9))
    parameters = zip(sums, (alpha, local_scale, conv_weight), strict=True)
    return (*inputs, *(None if x is None or y is None else x.sum(0).to(y.dtype) for x, y in parameters))


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
        self.batch, self.heads, self.length, self.dim = query.shape
        _, self.kv_heads, _, self.value_dim = value.shape
        self.group = group_size
        shape = (self.batch, self.kv_heads, self.length)
        if key.shape != (*shape, self.dim) or value.shape[:3] != shape or self.heads % self.kv_heads:
            shapes = [list(x.shape) for x in (query, key, value)]
            raise ValueError(f"shapes of query, key and value do not fit: {shapes}")
        refused = supports(query, key, value, conv_weight, activation, group_size)
        if refused:
            raise ValueError(f"the CPU kernel does not take {refused}")
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, not {group_size}")
        taps = 0 if conv_weight is None else conv_weight.shape[1]
        self.kept = (
            *(_columns_adjacent(x) for x in (query, key, value)),
            _parameter(alpha, (self.heads,), "alpha"),
            _parameter(local_scale, (self.heads,), "local_scale"),
            _parameter(conv_weight, (self.heads, taps), "conv_weight"),
        )
        for x in self.kept:
            if x is not None and x.device.type != "cpu":
                raise ValueError(f"the CPU kernel takes tensors on the CPU, not on {x.device}")
        self.core = (
            *(DTYPES[query.dtype], self.batch, self.heads, self.kv_heads, self.length),
            *(self.dim, self.value_dim, group_size, taps, ACTIVATIONS[activation], int(normalize)),
            *(0 if x is None else x.data_ptr() for x in self.kept[3:]),
        )
        self.tensors = tuple(field for x in self.kept[:3] if x is not None for field in _place(x))

    def threads(self, products: int) -> int:
        """Threads worth starting, when every token takes part in about so many [D, Dv] products."""
        work = self.batch * self.heads * self.length * self.dim * self.value_dim * products
        return max(1, min(torch.get_num_threads(), int(work / _SMALL)))


def _run(function: Any, fields: tuple[int, ...], isa: str | None, threads: int) -> None:
    chosen = _ISAS[isa] if isa else _load()[3]
    if chosen > _load()[3]:
        raise ValueError(f"this processor has no {isa}")
    if function(struct.pack(f"{len(fields)}q", *fields), chosen, threads):
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
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(x.shape)}")
    return x.detach().to(torch.float32).contiguous()


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
    for function in (library.linearize_forward, library.linearize_backward):
        function.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
        function.restype = ctypes.c_int
    return library, None, names[found], found
