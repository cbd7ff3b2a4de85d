"""Recipes: how `distill` converts a model and trains it, as data.

Each is a starting point: change it with `dataclasses.replace(RECIPES["quick"], ...)`, or override parts of it
with the arguments of `distill`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..common.checks import unknown
from ..errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """What `distill` does with a model.

    Attributes:
        config: Fields of `LinearizeConfig`, for a model that is not converted yet.
        calibrate: The number of tokens that `lz.calibrate` reads; 0 leaves calibration out.
        transfer: Keyword arguments of `lz.transfer`; None leaves this stage out.
        tune: Keyword arguments of `lz.tune`; None leaves this stage out.
        tokens: The number of tokens of the data that are used; None for all of them.
        about: Where the recipe comes from.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    calibrate: int = 0
    transfer: Mapping[str, Any] | None = None
    tune: Mapping[str, Any] | None = None
    tokens: int | None = None
    about: str = ""

    def context(self, model: nn.Module) -> int:
        """Tokens per row: what the recipe says, but not more than the model has positions for."""
        wanted = next((s["context"] for s in (self.transfer, self.tune) if s and "context" in s), 512)
        places = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        return min(wanted, places) if isinstance(places, int) and places > 0 else wanted


RECIPES: Mapping[str, Recipe] = {
    "quick": Recipe(
        config={"mechanism": "augmented"},
        calibrate=16_384,
        tune=dict(
            method="full",
            lm_weight=0.5,
            distill_weight=0.5,
            learning_rate=5e-4,
            new_learning_rate=1e-2,
            batch_size=2,
            warmup=0.05,
        ),
        tokens=450_000,
        about="ours, for small models: all weights on 450k tokens, from text and from the original's answers",
    ),
    "paper": Recipe(
        config={"mechanism": "augmented_paper", "group_size": 64, "conv_taps": 32},
        tune=dict(
            method="lora",
            lora={"r": 8, "lora_alpha": 16},
            context=4096,
            max_steps=1000,
            batch_size=1,
            gradient_accumulation=64,
            learning_rate=2e-5,
            schedule="constant_with_warmup",
            warmup=0.02,
        ),
        about="You et al. (arXiv 2406.07368), LLaMA-2: LoRA r=8 on q, k, v, o, 1000 steps of 64 x 4096 "
        "tokens, 2e-5 constant after 20 steps of warm-up, language-model loss, no calibration",
    ),
    "lolcats-like": Recipe(
        config={"mechanism": "softmax_window", "options": {"window": 64}},
        transfer=dict(learning_rate=1e-2, epochs=2.0, batch_size=4),
        tune=dict(
            method="lora", lora={"r": 8, "lora_alpha": 16}, learning_rate=1e-4, epochs=2.0, batch_size=4
        ),
        about="Zhang et al. (LoLCATs, arXiv 2410.10254): a softmax window of 64 before a linear tail, "
        "attention transfer at 1e-2, then LoRA r=8 on q, k, v, o at 1e-4, two epochs each",
    ),
}
"""The recipes by name, as `lz.distill(recipe=...)` and `linearize distill --recipe` take them:

- "quick": for small models. All weights, on 450k tokens, from text and from the answers of the original.
- "paper": You et al. (arXiv 2406.07368), with LoRA.
- "lolcats-like": Zhang et al. (LoLCATs, arXiv 2410.10254), attention transfer and then LoRA.
"""


def recipe_of(recipe: str | Recipe) -> Recipe:
    """Look up a recipe by its name; a `Recipe` is returned as it is. Raises ConfigError for another name."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ConfigError(unknown("recipe", recipe, RECIPES), "recipe")
    return RECIPES[recipe]
