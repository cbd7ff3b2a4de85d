"""Training of converted models: attention transfer, tuning, and recipes that combine them.

`data` makes rows from what the user gives, `objective` is the loss, `trainer` runs one stage on transformers'
Trainer (`guarded`), and `transfer`, `tune` and `distill` are the calls; `hybrid` chooses layers that stay
softmax. Several processes or machines are the business of accelerate and its launch command.
"""

from .attention_transfer import transfer
from .distillation import Distillation, distill
from .recipes import RECIPES, Recipe
from .trainer import Stage, TrainingSettings
from .tuning import tune

__all__ = ["RECIPES", "Distillation", "Recipe", "Stage", "TrainingSettings", "distill", "transfer", "tune"]
