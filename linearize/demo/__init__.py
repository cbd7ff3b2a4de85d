"""The shipped decoder and the walk-through that shows it."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""The folder of the decoder; `linear/` in it has the one that was converted and distilled."""
