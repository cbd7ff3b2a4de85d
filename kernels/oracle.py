"""The specification: augmented linear attention written out in float64, quadratic in length.

You et al., "When Linear Attention Meets Autoregressive Decoding" (arXiv 2406.07368) and its reference code
(GATECH-EIC/Linearized-LLM at 273274e: `llama_attn_replace.py` for the causal form, `modeling_t5.py` for the
other two). With q^ = q/|q|, k^ = k/|k| and group(t) = t // G, a query t of head h gives

    o[t] = local_scale * sum_{j visible, group(j) == group(t)} relu(q^[t].k^[j])^2 v[j]        local
         + alpha       * sum_{j, group(j) seen}                    q^[t].k^[j]     v[j]        grouped linear
         +               sum_l w[h, l] v[t - l]                                                convolution

| form          | visible in the group | groups seen          | convolution                              |
|---------------|----------------------|----------------------|------------------------------------------|
| causal        | j <= t               | earlier ones only    | w [H, K], tap l weights v[t - l]         |
| bidirectional | all                  | all, own included    | w [H, 2K-1], tap l weights v[t + K-1 - l] |
| cross         | all                  | all, own included    | none                                     |

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

import torch
from torch import Tensor


def _unit(x: Tensor) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, x / norm, torch.zeros_like(x))


def augmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: Tensor | float,
    conv_weight: Tensor | None,
    local_scale: float = 1.0,
    group_size: int = 64,
    causal: bool = True,
    cross: bool = False,
    query_start: int = 0,
) -> Tensor:
    """query [B, H, T, D], key [B, H, S, D], value [B, H, S, Dv] -> [B, H, T, Dv], all float64.

    T == S unless `cross` or `query_start` is set; heads are already repeated; there is no padding.
    """
    query, key, value = query.double(), key.double(), value.double()
    t = torch.arange(query.shape[2])[:, None] + query_start
    j = torch.arange(key.shape[2])[None, :]
    own_group = t // group_size == j // group_size
    visible = own_group & (j <= t) if causal else own_group
    seen = (j // group_size < t // group_size) if causal else torch.ones_like(own_group)

    scores = _unit(query) @ _unit(key).mT
    weights = local_scale * scores.relu().square() * visible + alpha * scores * seen
    if conv_weight is not None and not cross:
        taps = conv_weight.shape[-1]
        lag = t - j if causal else t - j + taps // 2
        conv = conv_weight.double()[:, lag.clamp(0, taps - 1)]
        weights = weights + conv * ((lag >= 0) & (lag < taps))
    return weights @ value
