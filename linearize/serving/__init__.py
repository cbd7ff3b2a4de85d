"""Converted models on vLLM, whose entry point `vllm.general_plugins` finds `register`.

A converted layer is a stateful layer of the engine. What it knows of a sequence, exact rows, sums and the
length, lies in a slot of the memory that the engine allocates, and has one size for any number of tokens. A
layer that was left softmax is the engine's own attention.

From tensors, without vLLM, to the model:

    slots       the tensors of a state in a row of bytes
    ragged      tokens of many sequences in one flat batch, through an attention module
    served      what a checkpoint must be to be served, and what of it the engine is told
    plugin      how the engine finds out: config parser, model classes, the refusals
    metadata    which rows of a batch belong to which slot, once for all layers of a step
    layer       one converted layer
    model       the model: transformers' own classes on the engine's layers
"""

from __future__ import annotations


def register() -> None:
    """Make converted checkpoints known to vLLM, in every process that it starts. Idempotent."""
    from .plugin import register_plugin

    register_plugin()
