"""Sums in float64, wherever the numbers are."""

from __future__ import annotations

from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the CPU where its device has no such numbers, as Apple's GPUs have not."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
