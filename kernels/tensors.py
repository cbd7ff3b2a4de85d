"""Small functions of tensors that several kernels share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""In which dtype tensors are summed up, where it is not their own."""


def widen(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """x / |x| along the last axis. A row of zeros stays zero, with a gradient of one, not of 1 / epsilon."""
    return x / norm_or_one(x)


def norm_or_one(x: Tensor) -> Tensor:
    """|x| along the last axis, kept as an axis of one; 1 for a row of zeros."""
    norm = row_norm(x)
    return torch.where(norm == 0, torch.ones_like(norm), norm)


def row_norm(x: Tensor) -> Tensor:
    """|x| along the last axis, kept as an axis of one, of rows of any size."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if x.dtype == torch.float64:
        return norm
    if not may_ask(x):  # asking costs more than doubles do
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64).to(norm.dtype)
    inexact = ~((norm > 1e-15) & (norm < 1e18)).squeeze(-1)  # the squares leave the range of float32
    if not bool(inexact.any()):
        return norm
    exact = torch.linalg.vector_norm(x[inexact], dim=-1, keepdim=True, dtype=torch.float64)
    return norm.index_put((inexact,), exact.to(norm.dtype))


def may_ask(x: Tensor) -> bool:
    """Whether what x holds may decide what is done: without waiting for a device, and not in a trace."""
    is_plain = type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu
    if not is_plain or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def are_finite(*tensors: Tensor) -> bool:
    """Whether every number is finite, and their sum too. True without looking where `may_ask` says no."""
    return all(isfinite(x.detach().sum(dtype=_WIDE.get(x.dtype))) for x in tensors if may_ask(x))


def are_ordinary(query: Tensor, key: Tensor, value: Tensor, most: float = 1e36) -> bool:
    """Whether all is finite, and every product of a query and a key surely below `most`. As `are_finite`."""
    if not may_ask(query):
        return True
    norms = (torch.linalg.vector_norm(x.detach(), dtype=_WIDE.get(x.dtype)) for x in (query, key))
    return float(next(norms)) * float(next(norms)) < most and are_finite(value)


def product_of_seen(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """weights [..., n, m] @ values [..., m, d], where only those rows that see a value that is not finite get
    NaN: 0 * NaN is NaN. seen: bool, broadcastable to the weights."""
    odd = ~values.isfinite()
    found = weights @ values.masked_fill(odd, 0)
    met = seen.to(values.dtype) @ odd.to(values.dtype)
    return found.masked_fill(met > 0, torch.nan)


def unit_of_any_size(x: Tensor) -> Tensor:
    """As `unit`, for rows whose squares would overflow or vanish: divided by their largest entry first."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    return unit(x / torch.where(largest > 0, largest, torch.ones_like(largest)))


def ones(x: Tensor) -> Tensor:
    """x [..., D] -> ones [..., 1]: a query and a key whose product is 1."""
    return x.new_ones(x.shape[:-1]).unsqueeze(-1)


def with_one(value: Tensor) -> Tensor:
    """value [..., Dv] -> [..., Dv + 1], the last column 1: one sum of it gives numerator and denominator."""
    return torch.cat([value, ones(value)], dim=-1)


def per_kv_head(x: Tensor, matrix: Tensor) -> Tensor:
    """x [B, Hkv, R, T, m] @ matrix [B, Hkv, m, n] -> [B, Hkv, R, T, n]; the matrix is not repeated."""
    return (x.flatten(2, 3) @ matrix).unflatten(2, x.shape[2:4])


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` ([n], or [B, n] when the rows of the batch differ) of x [B, ..., L, D]."""
    if index.dim() == 1:
        return x.index_select(-2, index)
    index = index.reshape(index.shape[0], *(1,) * (x.dim() - 3), index.shape[1], 1)
    return x.gather(-2, index.expand(*x.shape[:-2], index.shape[-2], x.shape[-1]))


def at_lag(weight: Tensor, lag: Tensor) -> Tensor:
    """weight [..., n] at lags of any shape: [..., *lags], zero outside 0..n-1."""
    inside = (lag >= 0) & (lag < weight.shape[-1])
    return weight[..., lag.clamp(0, weight.shape[-1] - 1)] * inside


def as_autocast(*tokens: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value as autocast gives them to scaled_dot_product_attention: in its dtype, unless they
    are float64; as they are where it is off."""
    device = tokens[0].device.type
    if not torch.is_autocast_enabled(device):
        return tokens
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tokens)


def runs_at_once(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether what is done with the tensors now is done with their values, and nobody makes a graph of it."""
    return (
        type(query) is type(key) is type(value) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()
    )


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keep autocast from rounding what runs inside; entered only when needed, so that graphs stay plain."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
