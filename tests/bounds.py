"""How far a right result may lie from the exact one: from what is summed, and in which precision.

Two processors give two right results: they sum in another order, so many numbers at a time, with or without
fused multiply-add. The bound must hold for all of them, and so it may not be read off one of them.

    u           unit roundoff of a dtype, eps / 2: one rounding to it is off by at most u of what it rounds
    additions   how many one term goes through on its way into the result. For sums of sums, the lengths of
                the inner and of the outer one, added: every order and every grouping is then allowed
    size        of the result, or the square root of the summed squares of its terms if that is more: where
                terms cancel, it is they that were rounded

Each addition rounds a partial sum, which on average over the chain is below `size`. The roundings are as
often up as down, so `additions` of them add up like a random walk:

    u sqrt(additions) size / 2  or less, in the mean square, and four times that is the bound.

What is stored in `dtype` on the way is not summed but passed on, so its roundings may all point the same way:

    u(dtype) size  for each of `stored`

Sums of the kernels here are at least float32, whatever the dtype of their operands. With 1000 additions in
float32 the bound is 4e-6 of the size, so that a result wrong by 1e-3 is far outside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def bound(dtype: torch.dtype, additions: float, size: float = 1.0, stored: int = 8) -> float:
    """The largest error that rounding explains, for norms as for single entries (see above)."""
    summed_in = torch.float64 if dtype == torch.float64 else torch.float32
    return size * (2 * unit(summed_in) * math.sqrt(additions) + stored * unit(dtype))


def softmax_bound(query: Tensor, key: Tensor, scale: float) -> float:
    """Of softmax attention in float32, relative to its largest output.

    Summed over the width and over the keys. The exponential turns the rounding of a score, which is as large
    as the score, into one of its weight.
    """
    score = scale * float(torch.einsum("bhqd,bgkd->bhgqk", query, key).abs().max())
    return bound(torch.float32, key.shape[2] + key.shape[3], 1 + score, stored=2)
