"""ONNX: one file that stock onnxruntime runs, state in and state out. Needs the extra `linearize[onnx]`.

`schema.py` says what the operators mean, and `body.py` with `blocks.py` writes them in standard operators;
what is a mechanism's own stands in the mechanism's file (`mechanisms/onnx_form.py`). `programs.py` traces a
model, `nodes.py` and `past.py` being what its attention and its cache become; `file.py` writes it, and
`genai.py` what onnxruntime-genai needs beside it. `quantization.py` makes weights smaller, `runtime.py` runs
a file, `library/` makes it faster. Nothing outside of this package imports it at import time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from .export import Exported as Exported
    from .export import export_onnx as export_onnx
    from .genai import write_genai as write_genai
    from .library import build_library as build_library
    from .library import register as register
    from .library.cuda.build import build_cuda_library as build_cuda_library
    from .programs import StateNames as StateNames
    from .quantization import Quantized as Quantized
    from .quantization import quantize as quantize
    from .runtime import OrtModel as OrtModel

_EXPORTS = {
    "export_onnx": ".export",
    "Exported": ".export",
    "StateNames": ".programs",
    "quantize": ".quantization",
    "Quantized": ".quantization",
    "OrtModel": ".runtime",
    "build_library": ".library",
    "build_cuda_library": ".library.cuda.build",
    "register": ".library",
    "write_genai": ".genai",
}
_EXTRA = {"onnx", "onnx_ir", "onnxruntime", "onnxscript"}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(_EXPORTS[name], __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise MissingExtraError(
            f"{name} needs the package {error.name}: install the extra, pip install 'linearize[onnx]'"
        ) from error
    return getattr(module, name)
