"""Where the operator library is, and what it is compiled from."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from ...kernels import cpu

LIBRARY = Path(__file__).with_name("_operators.so")
"""Where `build` puts the library."""

KERNELS = Path(cpu.__file__).parent
"""The headers of the kernels that it is made of."""


@cache
def sources() -> str:
    """A digest of what the library is compiled from."""
    digest = hashlib.sha256()
    for path in sorted([*LIBRARY.parent.glob("*.cpp"), *LIBRARY.parent.glob("*.h"), *KERNELS.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
