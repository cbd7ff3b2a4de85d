"""Whether a session on CUDA can have the library: every node needs a kernel for every GPU that is there."""

from __future__ import annotations

import ctypes
from functools import cache
from os import PathLike

import onnxruntime

from .kinds import kinds_of, library, read_index, sources


def unavailable_reason() -> str | None:
    """Why no session of this process can have the library, in one sentence; None when it can."""
    if not library().exists():
        return "the library for CUDA was not built: run `linearize build-library --cuda FILE.onnx`"
    try:
        loaded = _load(library(), library().stat().st_mtime_ns)
    except OSError as error:
        return f"the library for CUDA cannot be loaded: {error}"
    if loaded.linearize_onnx_sources().decode() != sources():
        return "the library for CUDA was built from other sources: run `linearize build-library --cuda` again"
    built, here = loaded.linearize_onnx_api(), int(onnxruntime.__version__.split(".")[1])
    if built > here:
        return f"the library was built with headers of onnxruntime 1.{built}, newer than 1.{here} here"
    return None


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
    if unavailable_reason() is not None:
        return 0
    return int(_load(library(), library().stat().st_mtime_ns).linearize_onnx_calls())


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


@cache
def _load(path: PathLike[str], changed: int) -> ctypes.CDLL:
    """The library; `changed` is when the file was, so that one that was built again is another."""
    loaded = ctypes.CDLL(str(path))
    loaded.linearize_onnx_calls.restype = loaded.linearize_onnx_api.restype = ctypes.c_int64
    loaded.linearize_onnx_sources.restype = ctypes.c_char_p
    return loaded
