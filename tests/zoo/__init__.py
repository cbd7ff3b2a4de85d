"""The model zoo: tiny random transformers models and what is true of their attention.

Every entry is built from its config class: two layers, a few heads, random weights large enough that a wrong
mask, scale or head shows far above 1e-5. `sites` is written by hand from each architecture's definition, so
it is a second opinion on the matcher, not a record of it. Nothing here imports the package under test.
"""

from __future__ import annotations

from .entry import BOTH, OTHERS, TRACED, Entry, Inputs
from .media import AUDIO, MULTIMODAL, VISION
from .seq2seq import ENCODER_DECODERS
from .text import DECODERS, ENCODERS

__all__ = ["BOTH", "BY_NAME", "ENTRIES", "OTHERS", "TRACED", "Entry", "Inputs"]

ENTRIES = DECODERS + ENCODERS + ENCODER_DECODERS + VISION + AUDIO + MULTIMODAL
BY_NAME = {entry.name: entry for entry in ENTRIES}
