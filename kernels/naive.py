"""The specification: augmented linear attention written out in float64, quadratic in length.

You et al., "When Linear Attention Meets Autoregressive Decoding" (arXiv 2406.07368) and its reference code
(GATECH-EIC/Linearized-LLM at 273274e: `llama_attn_replace.py` for the causal form, `modeling_t5.py` for the
other two). With q^ = q/|q|, k^ = k/|k| and group(t) = t // G, a query t of head h gives

    o[t] = sum_{j visible, group(j) == group(t)} (local_scale act(q^[t].k^[j]) + bias[t - j]) v[j] local
         + alpha * sum_{j, group(j) seen}        q^[t].k^[j] v[j]                                  grouped
         +         sum_l w[h, l] v[t - l]                                                         convolution

| form          | visible in the group | groups seen         | convolution                               |
|---------------|----------------------|---------------------|-------------------------------------------|
| causal        | j <= t               | earlier ones only   | w [H, K], tap l weights v[t - l]          |
| bidirectional | all                  | all, own included   | w [H, 2K-1], tap l weights v[t + K-1 - l] |
| cross         | all                  | all, own included   | none                                      |

act is relu(s)^2 in the paper's LLaMA form; see `ACTIVATIONS` for the others it compares. alpha and
local_scale are one number, or one per head. bias is T5's relative position bias, by lag: [H, G] with lags
0..G-1 when causal, [H, 2G-1] with lags -(G-1)..G-1 otherwise.

Choices where the sources leave room:
- Nothing divides by sqrt(d), G or a sum of weights; the reference code has none of these. A row of zeros
  stays a row of zeros (the reference's LLaMA path divides by zero there).
- Bidirectional: the grouped part counts a query's own group a second time, in linear form, because the
  reference's T5 encoder does. Not taken from T5: normalising v and the output, which exist for T5 only.
- Cross: query group i reads key group i for its local part, by position (T5 again); a query group past the
  last key group has no local part. `query_start` is the position of the first query, for cached decoding.
- Taps run from the present into the past, the reverse of the reference's `Conv2d` kernel: its causal
  kernel x[0..31] is w = x.flip(-1) here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ACTIVATIONS = {
    "relu2": lambda s: s.relu().square(),
    "linear": lambda s: s,
    # FLASH (Hua et al., 2022): the Laplace function that approximates relu^2, sigma = sqrt(1 / 4 pi).
    "laplace": lambda s: 0.5 * (1 + torch.erf((s - math.sqrt(0.5)) * math.sqrt(2 * math.pi))),
    # YOSO (Zeng et al., 2021): collision probability of 8 hash bits; 0.98 keeps arccos differentiable.
    "yoso": lambda s: (1 - torch.arccos(0.98 * s) / math.pi) ** 8,
}


def _unit(x: Tensor) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def _per_head(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64).reshape(-1, 1, 1)


def augmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: Tensor | float | None,
    conv_weight: Tensor | None,
    local_scale: Tensor | float | None = 1.0,
    local_bias: Tensor | None = None,
    activation: str = "relu2",
    group_size: int = 64,
    causal: bool = True,
    cross: bool = False,
    query_start: int = 0,
    normalize: bool = True,
) -> Tensor:
    """The formula of the module's docstring. Nothing is checked, and there is no padding.

    Args:
        query: [B, H, T, D].
        key: [B, H, S, D], heads already repeated. T == S unless `cross` or `query_start` is set.
        value: [B, H, S, Dv].
        alpha: A number, or one per head; None leaves the grouped part out.
        conv_weight: [H, K]; None leaves the convolution out.
        local_scale: A number, or one per head; None leaves the local part out.
        local_bias: [H, G], or [H, 2G - 1] when not causal; None: no bias.
        activation: One of `ACTIVATIONS`.
        group_size: G.
        causal: The causal form; otherwise the bidirectional one, or with `cross` that one.
        cross: The form for queries and keys of different sequences.
        query_start: Position of the first query.
        normalize: Divide rows of query and key by their norms.

    Returns:
        float64 [B, H, T, Dv].
    """
    query, key, value = query.double(), key.double(), value.double()
    t = torch.arange(query.shape[2])[:, None] + query_start
    j = torch.arange(key.shape[2])[None, :]
    lag = t - j
    own_group = t // group_size == j // group_size
    visible = own_group & (lag >= 0) if causal else own_group
    seen = (j // group_size < t // group_size) if causal else torch.ones_like(own_group)

    scores = _unit(query) @ _unit(key).mT if normalize else query @ key.mT
    weights, read = torch.zeros_like(scores), torch.zeros_like(visible)

    def add(part: Tensor, where: Tensor) -> None:
        nonlocal weights, read
        weights, read = weights + part.masked_fill(~where, 0), read | where

    if local_scale is not None:
        add(_per_head(local_scale) * ACTIVATIONS[activation](scores), visible)
    if local_bias is not None:
        column = lag if causal else lag + group_size - 1
        add(local_bias.double()[:, column.clamp(0, local_bias.shape[-1] - 1)], visible)
    if alpha is not None:
        add(_per_head(alpha) * scores, seen)
    if conv_weight is not None and not cross:
        taps = conv_weight.shape[-1]
        tap = lag if causal else lag + taps // 2
        add(conv_weight.double()[:, tap.clamp(0, taps - 1)], (tap >= 0) & (tap < taps))
    out = weights @ value.nan_to_num(0, 0, 0)
    # 0 * NaN is NaN, but only a query that reads a value may get anything from it.
    return out.masked_fill(read.double() @ (~value.isfinite()).double() > 0, torch.nan)
