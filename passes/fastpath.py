"""What torch's fused inference calls compute, in ordinary operators.

In eval mode without gradients, `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` take a fast path: one
call that holds the whole layer. Dynamo has taken it before a backend sees the graph; here it is spelled out.
A mask counts as boolean there, whatever its dtype: nonzero is masked (`masked_softmax` in ATen).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """`torch._transformer_encoder_layer_fwd`: src [B, T, E] -> [B, T, E]."""

    def attend(x: Tensor) -> Tensor:
        projections = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return self_attention(x, x, x, embed_dim, num_heads, *projections, mask, False, True, mask_type)[0]

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        src = src + attend(norm_1(src))
        return src + feed_forward(norm_2(src))
    src = norm_1(src + attend(src))
    return norm_2(src + feed_forward(src))


def self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`torch._native_multi_head_attention`: [B, T, E] each -> output [B, T, E] and weights if asked for.

    mask: nonzero is masked; of shape [T, T] (type 0), [B, T] (type 1) or [B, H, T, T] (type 2).
    """
    weights_in, biases_in = qkv_weight.chunk(3), qkv_bias.chunk(3)

    def heads(x: Tensor, which: int) -> Tensor:
        projected = F.linear(x, weights_in[which], biases_in[which])
        return projected.unflatten(-1, (num_heads, embed_dim // num_heads)).transpose(1, 2)

    q, k, v = heads(query, 0), heads(key, 1), heads(value, 2)
    masked = None if mask is None else mask.to(torch.bool)
    if masked is not None and mask_type == 1:
        masked = masked[:, None, None, :]
    if not need_weights:
        out = F.scaled_dot_product_attention(q, k, v, None if masked is None else ~masked)
        return F.linear(out.transpose(1, 2).flatten(-2), proj_weight, proj_bias), None
    scores = q @ k.mT * (embed_dim // num_heads) ** -0.5
    weights = (scores if masked is None else scores.masked_fill(masked, -torch.inf)).softmax(-1)
    out = F.linear((weights @ v).transpose(1, 2).flatten(-2), proj_weight, proj_bias)
    return out, weights.mean(1) if average_attn_weights else weights


FASTPATH: dict[Any, Callable[..., Any]] = {
    torch._transformer_encoder_layer_fwd: encoder_layer,
    torch._native_multi_head_attention: self_attention,
}
