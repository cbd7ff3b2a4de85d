"""Whether a session on CUDA can have the library: every node needs a kernel for every GPU that is there."""

from __future__ import annotations

import ctypes
from os import PathLike

from ..binary import fault, open_library
from .kinds import kinds_of, library, read_index, sources


def unavailable_reason() -> str | None:
    """Why no session of this process can have the library, in one sentence; None when it can."""
    command = "linearize build-library --cuda"
    return fault(library(), "the library for CUDA", command, " FILE.onnx", sources())


def obstacle(path: str | PathLike[str]) -> str | None:
    """Why a session of the file on CUDA is better off without the library; None if it is not.

    Raises LibraryError when the file cannot be read.
    """
    reason = unavailable_reason()
    if reason is not None:
        return reason
    here = architectures()
    if isinstance(here, str):
        return here
    kinds = kinds_of(path)
    if isinstance(kinds, str):
        return kinds
    built = read_index()
    for kind in sorted(kinds):
        for arch in here:
            if not any(entry.kind == kind and entry.runs_on(arch) for entry in built):
                return f"no kernel was built for {kind} on sm_{arch}: `linearize build-library --cuda {path}`"
    return None


def calls() -> int:
    """How often an operator of the library was launched in this process; 0 without the library."""
    return 0 if unavailable_reason() is not None else int(open_library(library()).linearize_onnx_calls())


def architectures() -> list[int] | str:
    """Compute capability of every GPU that is here, 90 for 9.0; one sentence when there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no CUDA driver here"
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "there is no GPU here"
    found = []
    for device in range(count.value):
        major, minor = ctypes.c_int(), ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device) or driver.cuDeviceGetAttribute(
            ctypes.byref(minor), 76, device
        ):
            return "CUDA's driver does not tell what the GPU is"
        found.append(10 * major.value + minor.value)
    return found
