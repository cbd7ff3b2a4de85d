"""Giving the library to a session, when and only when the session's file runs with it.

A node that a registered operator claims runs by it or not at all: onnxruntime then leaves the body aside,
and a missing type or provider is an error instead of a slower session. So the file is looked at first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import onnx

from ...errors import LibraryError
from ..schema import DOMAIN, FAMILIES, VERSION
from .binary import fault, open_library
from .cuda import loader as cuda
from .cuda.kinds import library as cuda_library
from .paths import LIBRARY, sources

if TYPE_CHECKING:
    from os import PathLike

    import onnxruntime

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_OPERATORS = (FAMILIES["relu2"], FAMILIES["linear"])
_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def unavailable_reason() -> str | None:
    """Why no session on the CPU can have the library, in one sentence; None when it can."""
    reason = fault(LIBRARY, "the library", "linearize build-library", "", sources())
    if reason is None and not open_library(LIBRARY).linearize_onnx_runs_here():
        return "this processor has no AVX2"
    return reason


def calls() -> int:
    """How often an operator of the library ran in this process; 0 without the library."""
    return 0 if unavailable_reason() is not None else int(open_library(LIBRARY).linearize_onnx_calls())


def obstacle(path: str | PathLike[str], providers: Sequence[str] = (CPU,)) -> str | None:
    """Why a session of the file with these providers is better off without the library; None if it is not.

    Raises LibraryError when the file cannot be read.
    """
    others = [name for name in providers if name not in (CPU, CUDA)]
    if others:
        return f"the library has kernels for {CPU} and {CUDA} alone, not for {', '.join(others)}"
    if CUDA in providers:
        return cuda.obstacle(path)
    reason = unavailable_reason()
    if reason is not None:
        return reason
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own errors share no base with the system's
        raise LibraryError(f"{path} is not a readable ONNX file: {error}") from error
    versions = [entry.version for entry in model.opset_import if entry.domain == DOMAIN]
    nodes = [node for node in _nodes(model.graph) if node.op_type in _OPERATORS]
    if not nodes or versions != [VERSION]:
        return f"{path} has no node that the library runs"
    if any(node.op_type in _OPERATORS for function in model.functions for node in _nodes(function)):
        return f"{path} has such nodes inside functions, where their types are not known"
    values = (*model.graph.input, *model.graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in nodes:
        if types.get(node.input[0]) not in _TYPES:
            name = onnx.TensorProto.DataType.Name(types.get(node.input[0], 0)).lower()
            return f"the library has no kernel for query in {name}"
    return None


def _nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Nodes of our domain, those in branches and loops too."""
    for node in graph.node:
        if node.domain == DOMAIN:
            yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def register(
    options: onnxruntime.SessionOptions, path: str | PathLike[str], providers: Sequence[str] = (CPU,)
) -> bool:
    """Let a session made with `options` run the file's nodes by the library; False when `obstacle` finds one.

    path and providers are those the session will be made with. Nothing is changed when it is False: the
    nodes run by their bodies then. Raises LibraryError when the file cannot be read.
    """
    if obstacle(path, providers) is not None:
        return False
    options.register_custom_ops_library(str(cuda_library() if CUDA in providers else LIBRARY))
    return True
