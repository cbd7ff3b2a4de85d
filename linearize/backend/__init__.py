"""A `torch.compile` backend: the same passes inside a compiler."""

from .backend import Backend, linearize_backend

__all__ = ["Backend", "linearize_backend"]
