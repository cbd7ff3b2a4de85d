"""How good a model is, and how fast.

For a decoder: perplexity by context length, agreement with the original, tokens per second, and bytes of
cache. For an encoder: how similar its embeddings are to those of the original. `measure` has `evaluate`,
`compared` runs the models, `perplexity` and `embeddings` measure, `quality` and `similarity` compute figures,
`speed` measures times and caches, `result` is what comes out, `plot` draws it, and `card` writes the model
card.
"""

from .figures import Figures, Measurement
from .measure import evaluate
from .result import Evaluation

Row = Measurement  # its name in 0.1.0

__all__ = ["Evaluation", "Figures", "Measurement", "Row", "evaluate"]
