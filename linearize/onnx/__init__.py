"""ONNX: one file that stock onnxruntime runs, state in and state out. Needs the extra `linearize[onnx]`.

`schema.py` says what the operators mean, and `body.py` with `blocks.py` writes them in standard operators;
what is a mechanism's own stands in the mechanism's file (`mechanisms/onnx_form.py`). `programs.py` traces a
model, `nodes.py` and `past.py` being what its attention and its cache become; `file.py` writes it, and
`genai.py` what onnxruntime-genai needs beside it. `quantization.py` makes weights smaller, `runtime.py` runs
a file, `library/` makes it faster. `__init__.pyi` lists the public names; each is loaded on first use, and
nothing outside of this package imports it at import time.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

from ..errors import MissingExtraError

_EXTRA = {"onnx", "onnx_ir", "onnxruntime", "onnxscript"}

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _load(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise MissingExtraError(
            f"{name} needs the package {error.name}: install the extra, pip install 'linearize[onnx]'"
        ) from error
