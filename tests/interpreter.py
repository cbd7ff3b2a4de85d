"""Run tests inside Triton's interpreter: on CPU tensors, without a GPU.

    @interpreted
    @pytest.mark.parametrize("length", [1, 64, 65])
    def test_something(length): ...

`TRITON_INTERPRET=1` counts only when set before triton is imported, and it turns every kernel of the process
into its interpreted form, so these tests run in a child process: one per session (and per xdist worker),
started by the first such test. There `torch.empty` is filled with NaN, so that whatever a kernel leaves
unwritten shows, and bfloat16 is made right: the interpreter's own bfloat16 `tl.dot` multiplies the raw 16-bit
integers, and its cast truncates (triton issue 11584, declined upstream).
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

_FLAG = "TRITON_INTERPRET"


def interpreted(check: Callable[..., None]) -> Callable[..., None]:
    """The test, run in the child. Its arguments must pickle; fixtures that do not are out."""

    @functools.wraps(check)
    def test(**arguments: Any) -> None:
        if os.environ.get(_FLAG) == "1":
            check(**arguments)
        else:
            _child().submit(_call, check.__code__.co_filename, check.__qualname__, arguments).result()

    return test


@functools.cache
def _child() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_start)


def _start() -> None:
    import torch

    assert "triton" not in sys.modules, "too late to turn the interpreter on"
    os.environ[_FLAG] = "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    _repair_bfloat16()


def _call(file: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(_module(file), name)(**arguments)


@functools.cache
def _module(file: str) -> Any:
    """The test's module by path: under pytest's importlib mode its name need not be importable."""
    spec = importlib.util.spec_from_file_location(f"interpreted_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _repair_bfloat16() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    handle: Any = interpreter.TensorHandle
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def widened(x: Any) -> Any:
        """bfloat16 lies in the interpreter as uint16."""
        if x.dtype.scalar == tl.bfloat16:
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        return x.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            return handle(np.matmul(widened(a), widened(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)
        return plain_dot(self, a, b, d, *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
            rounded = np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded).astype(np.uint16)
            return handle(rounded, to.scalar)
        return plain_cast(self, source, to)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
