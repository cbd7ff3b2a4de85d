"""linearize: turn the softmax attention of any PyTorch model into linear attention.

`passes` (graphs only) finds and rewrites attention, `kernels` (tensors only) computes it, and this package
joins the two behind one call. Public names are loaded on first use; the one thing that importing does is to
register the hook by which transformers' `from_pretrained` restores converted checkpoints.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "passes").is_dir():
    # Run from a checkout that is not installed: the folders passes/ and kernels/ are our sub-packages there.
    __path__.append(str(_ROOT))

if TYPE_CHECKING:
    from .adapters import lora_config as lora_config
    from .adapters import merge as merge
    from .api import linearize as linearize
    from .attention import AttentionModule as AttentionModule
    from .backend import Backend as Backend
    from .calibration import calibrate as calibrate
    from .checkpoint import load as load
    from .checkpoint import save as save
    from .config import LinearizeConfig as LinearizeConfig
    from .demo import load_demo as load_demo
    from .errors import LinearizeError as LinearizeError
    from .evaluation import Evaluation as Evaluation
    from .evaluation import evaluate as evaluate
    from .onnx import export_onnx as export_onnx
    from .released import load_released as load_released
    from .released_heads import load_released_heads as load_released_heads
    from .report import Report as Report
    from .report import inspect as inspect
    from .sensitivity import Sensitivity as Sensitivity
    from .sensitivity import plan as plan
    from .speculative import DraftModel as DraftModel
    from .speculative import Medusa as Medusa
    from .speculative import MedusaHeads as MedusaHeads
    from .speculative import PromptLookup as PromptLookup
    from .speculative import Tree as Tree
    from .speculative import TreeSpeculation as TreeSpeculation
    from .speculative import Typical as Typical
    from .speculative import fit_tree as fit_tree
    from .speculative import train_heads as train_heads
    from .training import RECIPES as RECIPES
    from .training import Recipe as Recipe
    from .training import distill as distill
    from .training import transfer as transfer
    from .training import tune as tune

_EXPORTS = {
    "linearize": ".api",
    "inspect": ".report",
    "Report": ".report",
    "save": ".checkpoint",
    "load": ".checkpoint",
    "load_demo": ".demo",
    "load_released": ".released",
    "load_released_heads": ".released_heads",
    "lora_config": ".adapters",
    "merge": ".adapters",
    "Backend": ".backend",
    "calibrate": ".calibration",
    "Evaluation": ".evaluation",
    "evaluate": ".evaluation",
    "Sensitivity": ".sensitivity",
    "plan": ".sensitivity",
    "LinearizeConfig": ".config",
    "AttentionModule": ".attention",
    "LinearizeError": ".errors",
    "export_onnx": ".onnx",
    "TreeSpeculation": ".speculative",
    "PromptLookup": ".speculative",
    "Medusa": ".speculative",
    "MedusaHeads": ".speculative",
    "DraftModel": ".speculative",
    "Tree": ".speculative",
    "Typical": ".speculative",
    "fit_tree": ".speculative",
    "train_heads": ".speculative",
    "RECIPES": ".training",
    "Recipe": ".training",
    "distill": ".training",
    "transfer": ".training",
    "tune": ".training",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name], __name__), name)
    if name in {"ops", "passes", "backend", "errors", "onnx"}:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# At once and not on first use: what a user does after `import linearize` may be only `from_pretrained`.
import_module(".load_hook", __name__).register()


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
