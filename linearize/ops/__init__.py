"""The public face of the kernels: checked, documented functions on tensors, and the state that they keep."""

from .attention import (
    Choice,
    Lineage,
    augmented_attention,
    augmented_commit,
    augmented_extend,
    augmented_tree,
    conv_width,
    lineage,
    which,
)
from .state import AttentionState, States

__all__ = [
    "AttentionState",
    "Choice",
    "Lineage",
    "States",
    "augmented_attention",
    "augmented_commit",
    "augmented_extend",
    "augmented_tree",
    "conv_width",
    "lineage",
    "which",
]
