"""The page of what became of every model type."""
from __future__ import annotations
from typing import Any
def page(results: dict[str, dict[str, Any]], known: list[str]) -> str:
    return ""
