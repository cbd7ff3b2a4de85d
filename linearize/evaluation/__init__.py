"""How good a model is, and how fast: a decoder's perplexity by context length, agreement with the original,
tokens per second and bytes of cache; an encoder's similarities against the original's.

`measure` runs the models, `quality` counts, `speed` takes times and weighs caches, `similarity` compares
embeddings, `result` holds the figures, `plot` draws them, `record` keeps them with a converted model.
"""

from .figures import Figures, Row
from .measure import evaluate
from .result import Evaluation

__all__ = ["Evaluation", "Figures", "Row", "evaluate"]
