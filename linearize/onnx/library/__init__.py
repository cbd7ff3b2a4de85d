"""Our kernels for onnxruntime's CPU provider, as a library of custom operators that files run faster with.

A file needs none of this: without the library its nodes run by their bodies. Built once by
`linearize build-library` (`build.py`), asked for when a session is made (`loader.py`).

    operator.h      a node's inputs, types and shapes, and what both libraries tell of themselves
    op.cpp          the operators on threads of onnxruntime
    rolling.h       what crosses from it to the kernels
    rolling.cpp     the kernels, once per instruction set; the mathematics is that of kernels/cpu
    cuda/           the same for onnxruntime's CUDA provider, a library of its own; never run on a GPU
"""

from .build import build_library
from .loader import calls, obstacle, register, unavailable_reason
from .paths import LIBRARY

__all__ = ["LIBRARY", "build_library", "calls", "obstacle", "register", "unavailable_reason"]
