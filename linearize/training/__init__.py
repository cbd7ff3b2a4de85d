"""From converted to good: attention transfer, tuning, and recipes that join them.

`data` makes rows of whatever was given, `objective` is what training lowers, `trainer` runs one stage on
transformers' Trainer (`guarded`), and `transfer`, `tune` and `distill` are the calls. More processes or
machines are accelerate's matter, and so one of the launch command.
"""

from .attention_transfer import transfer
from .distillation import Distillation, distill
from .recipes import RECIPES, Recipe
from .trainer import Stage
from .tuning import tune

__all__ = ["RECIPES", "Distillation", "Recipe", "Stage", "distill", "transfer", "tune"]
