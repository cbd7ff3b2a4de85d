"""placeholder until the graph rung lands"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def apply_graft(owner: Any, path: str, sites: Sequence[Any]) -> None:
    raise NotImplementedError
