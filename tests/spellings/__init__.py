"""One small module per spelling of attention, and per thing that only looks like it.

Each entry states the facts that a matcher must find (or the reason codes it may refuse with), and the facts
are themselves proved by a slow reference: `test_spellings.py::test_facts_are_true`. One file per group of
axes: how attention is called or contracted, scored, masked, grouped, laid out, and what only resembles it.
Adding a spelling is adding one decorated function.
"""

from __future__ import annotations

from . import contraction, decoys, fused, heads, layout, masks, score  # noqa: F401  (each fills the registry)
from ._base import REGISTRY, Facts, Net, Spelling, reference

ACCEPTED = [entry for entry in REGISTRY.values() if entry.facts is not None and not entry.reasons]
EITHER = [entry for entry in REGISTRY.values() if entry.facts is not None and entry.reasons]
REFUSED = [entry for entry in REGISTRY.values() if entry.facts is None]

__all__ = ["ACCEPTED", "EITHER", "REFUSED", "REGISTRY", "Facts", "Net", "Spelling", "reference"]
