"""A compiled library of operators, and whether this process can use it."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import onnxruntime


def open_library(path: Path) -> ctypes.CDLL:
    """The library in a file, one that was built again included. Raises OSError when it cannot be loaded."""
    return _open(path, path.stat().st_mtime_ns)


@cache
def _open(path: Path, changed: int) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.linearize_onnx_calls.restype = library.linearize_onnx_api.restype = ctypes.c_int64
    library.linearize_onnx_sources.restype = ctypes.c_char_p
    return library


def fault(path: Path, name: str, command: str, argument: str, sources: str) -> str | None:
    """Why no session can have the library, in one sentence; None when it can.

    name: of the library in the sentence. command, argument: what builds it. sources: the digest of what it
    should be built from.
    """
    if not path.exists():
        return f"{name} was not built: run `{command}{argument}`"
    try:
        library = open_library(path)
    except OSError as error:
        return f"{name} cannot be loaded: {error}"
    if library.linearize_onnx_sources().decode() != sources:
        return f"{name} was built from other sources: run `{command}` again"
    built, here = library.linearize_onnx_api(), int(onnxruntime.__version__.split(".")[1])
    if built > here:
        return f"the library was built with headers of onnxruntime 1.{built}, newer than 1.{here} here"
    return None
