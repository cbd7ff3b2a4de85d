"""linearize: turn the softmax attention of any PyTorch model into linear attention.

`passes` (graphs only) finds and rewrites attention, `kernels` (tensors only) computes it, and this package
joins the two behind one call. `__init__.pyi` lists the public names; each is loaded on first use. The one
thing that importing does is to announce the hook by which transformers' `from_pretrained` restores converted
checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import lazy_loader

from .checkpoint.announce import announce
from .common.version import __version__ as __version__

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "passes").is_dir():
    # Run from a checkout that is not installed: the folders passes/ and kernels/ are our sub-packages there.
    __path__.append(str(_ROOT))

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
announce()
