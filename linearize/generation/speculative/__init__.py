"""Speculative decoding by draft trees: `model.generate(..., speculative=TreeSpeculation(drafter))`.

`loop.py` is the decoding loop and `acceptance.py` its rules. A drafter (`drafter.py`) is prompt lookup,
Medusa heads or a small model. `linearize.cache.draft_tree` scores and accepts the trees.
"""

from .acceptance import Typical
from .draft_model import DraftModel
from .drafter import Drafter, merge
from .heads import MedusaHeads
from .lookup import PromptLookup
from .loop import TreeSpeculation
from .medusa import Medusa
from .training import train_heads
from .tree import Tree, fit_tree

__all__ = [
    "DraftModel",
    "Drafter",
    "Medusa",
    "MedusaHeads",
    "PromptLookup",
    "Tree",
    "TreeSpeculation",
    "Typical",
    "fit_tree",
    "merge",
    "train_heads",
]
