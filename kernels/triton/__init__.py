"""The GPU form: causal forward, backward, decode step and tree as Triton kernels.

`forward`, `backward`, `step` and `tree` compute the causal form of `kernels/naive.py`; `supports` says
whether a call can take this form and `unavailable_reason` whether this machine can. Nothing outside this
folder imports triton, and nothing imports this folder before it is needed: without triton that raises
ImportError.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError("the Triton kernels need triton: pip install 'linearize[triton]'") from error

from .backward import backward
from .decode import step
from .forward import forward
from .launch import interpreted
from .tree import tree

__all__ = ["available", "backward", "forward", "step", "supports", "tree", "unavailable_reason"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("relu2", "linear")
LARGEST_HEAD = 256
LARGEST_GROUP = 128
MOST_TAPS = 1024


def unavailable_reason(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of `device`; None when they can."""
    if interpreted():
        return None
    if device.type != "cuda":
        return f"Triton kernels run on a GPU, the tensors are on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need compute capability 8.0 or newer"
    return None


def available(device: torch.device) -> bool:
    return unavailable_reason(device) is None


def supports(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
) -> str | None:
    """Why a call (shapes as in `forward`) cannot take this form; None when it can. Looks at no data."""
    dim = max(query.shape[-1], value.shape[-1])
    if not query.dtype == key.dtype == value.dtype:
        return f"different dtypes of query, key and value ({query.dtype}, {key.dtype}, {value.dtype})"
    if query.dtype not in DTYPES:
        return f"dtype {query.dtype} (has float32, bfloat16, float16)"
    if activation not in ACTIVATIONS:
        return f"local activation {activation!r} (has {', '.join(ACTIVATIONS)})"
    if not 1 <= group_size <= LARGEST_GROUP:
        return f"group size {group_size} (has 1 to {LARGEST_GROUP})"
    if dim > LARGEST_HEAD:
        return f"head dimension {dim} (has up to {LARGEST_HEAD})"
    # Tiles of these would not fit the shared memory of every GPU.
    if dim > 128 and query.dtype == torch.float32:
        return f"head dimension {dim} in float32 (has up to 128)"
    if dim > 128 and group_size > 64:
        return f"head dimension {dim} with groups of {group_size} (has up to 64)"
    if conv_weight is not None and conv_weight.shape[-1] > MOST_TAPS:
        return f"{conv_weight.shape[-1]} convolution taps (has up to {MOST_TAPS})"
    if query.numel() == 0 or value.numel() == 0:
        return "an empty tensor"
    return None
