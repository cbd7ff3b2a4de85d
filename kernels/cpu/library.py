"""The shared library: finding it, calling it, and what its arguments look like."""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ISAS = {"avx2": 1, "avx512": 2}
CORE = 14
"""Fields of `Core` in abi.h, before those of the tensors."""
_FIELDS = {
    "linearize_salient": struct.Struct("13q2d37q"),
    "linearize_salient_backward": struct.Struct("10q2d30q"),
    "linearize_bidirectional": struct.Struct("11q2d19q"),
    "linearize_forward": struct.Struct(f"{CORE + 4 * 4}q"),
    "linearize_forward_both": struct.Struct(f"{CORE + 4 * 4}q"),
    "linearize_backward": struct.Struct(f"{CORE + 7 * 4 + 3}q"),
    "linearize_step": struct.Struct(f"{CORE + 7 * 4 + 5}q"),
    "linearize_append": struct.Struct(f"{CORE + 5 * 4 + 6}q"),
    "linearize_tree": struct.Struct(f"{CORE + 7 * 4 + 6}q"),
}
"""The functions of the library, and the block of fields that each takes."""
_NO_TOKEN = 2
"""What `linearize_append` returns for a bad path."""
SMALL = 4e6
"""Multiplications worth a thread: a few times what starting one costs."""


def run(name: str, fields: tuple[float, ...], isa: str | None, threads: int) -> None:
    library, _, _, best = load()
    chosen = best if isa is None else ISAS[isa]
    if library is None or chosen > best:
        raise RuntimeError(f"the CPU kernel cannot run: {load()[1] or f'no {isa} here'}")
    failed = getattr(library, name)(_FIELDS[name].pack(*fields), chosen, threads)
    if failed == _NO_TOKEN:
        raise IndexError("the path names a token that is not among the new ones")
    if failed:
        raise MemoryError("the CPU kernel could not allocate its scratch memory")


class Laid:
    """A call whose fields lie ready; `places` are those that are integers, to be changed before it runs."""

    def __init__(self, name: str, fields: tuple[float, ...]) -> None:
        library, _, _, self._isa = load()
        self._function = getattr(library, name)
        self._block = ctypes.create_string_buffer(_FIELDS[name].pack(*fields))
        self._address = ctypes.addressof(self._block)
        self.places = memoryview(self._block).cast("B")[: _FIELDS[name].size].cast("q")

    def run(self, threads: int) -> None:
        """Raises MemoryError like `run`."""
        if self._function(self._address, self._isa, threads):
            raise MemoryError("the CPU kernel could not allocate its scratch memory")


def threads_for(work: int) -> int:
    return 1 if work < 2 * SMALL else min(torch.get_num_threads(), int(work / SMALL))


def place(x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The fields of `Tensor` in abi.h, and the tensor they tell of: x, copied if its columns are apart."""
    batch, head, row, column = x.stride()
    if column != 1 and x.shape[3] != 1:
        x = x.contiguous()
        batch, head, row, _ = x.stride()
    return x, (x.data_ptr(), batch, head, row)


def parameter(x: Tensor | None, shape: tuple[int, ...], name: str) -> tuple[Tensor | None, int]:
    """x as adjacent float32 numbers, and its address; None and 0 leave it out."""
    if x is None:
        return None, 0
    if x.shape != shape or not x.is_cpu or not shape[-1]:
        raise ValueError(
            f"{name} must have shape {list(shape)} on the CPU, not {list(x.shape)} on {x.device}"
        )
    if x.dtype is not torch.float32 or not x.is_contiguous():
        x = x.detach().float().contiguous()
    return x, x.data_ptr()


def table(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    if x.shape != shape or x.dtype != dtype or not x.is_cpu:
        raise ValueError(f"{name} must be {dtype} {list(shape)} on the CPU, not {x.dtype} {list(x.shape)}")
    return x.contiguous()


@cache
def load() -> tuple[ctypes.CDLL | None, str | None, str, int]:
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
    names = {number: name for name, number in ISAS.items()}
    if found not in names:
        return None, "this processor has no AVX2", "", 0
    for name in _FIELDS:
        function = getattr(library, name, None)
        if function is None:
            return None, "the C++ kernels are of another version; reinstall linearize", "", 0
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        function.restype = ctypes.c_int
    return library, None, names[found], found
