"""Axis 12 of the taxonomy: grouped and shared key/value heads, however they are repeated."""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import DIM, HEADS, Attention, Facts, spelling

SCALE = DIM**-0.5
GROUPED, TILED, SHARED = Facts(kv=("interleaved", 2)), Facts(kv=("tiled", 2)), Facts(kv=("interleaved", 4))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * SCALE, dim=-1) @ v


@spelling("heads", facts=GROUPED)
def gqa_repeat_interleave(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))


@spelling("heads", facts=GROUPED)
def gqa_expand_reshape(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' repeat_kv."""
    b, h, t, d = k.shape
    k = k[:, :, None, :, :].expand(b, h, 2, t, d).reshape(b, h * 2, t, d)
    v = v[:, :, None, :, :].expand(b, h, 2, t, d).reshape(b, h * 2, t, d)
    return attend(q, k, v)


@spelling("heads", facts=GROUPED, layout="flat")
def gqa_expand_before_transpose(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """LLaMA reference code: repeat in [B, T, Hkv, D]."""
    b, t, _ = q.shape
    q = q.view(b, t, HEADS, DIM).transpose(1, 2)

    def repeat(x: Tensor) -> Tensor:
        x = x.view(b, t, 2, DIM)[:, :, :, None, :].expand(b, t, 2, 2, DIM)
        return x.reshape(b, t, HEADS, DIM).transpose(1, 2)

    return attend(q, repeat(k), repeat(v)).transpose(1, 2).reshape(b, t, HEADS * DIM)


@spelling("heads", facts=GROUPED)
def gqa_stack_flatten(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(
        q,
        k.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2),
        v.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2),
    )


@spelling("heads", facts=GROUPED)
def gqa_broadcast_5d(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries viewed as [B, Hkv, G, T, D] against keys [B, Hkv, 1, S, D]."""
    b, h, t, d = q.shape
    out = attend(q.view(b, 2, 2, t, d), k.unsqueeze(2), v.unsqueeze(2))
    return out.reshape(b, h, t, d)


@spelling("heads", facts=GROUPED)
def gqa_fold_groups_into_queries(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The group becomes part of the query axis: [B, Hkv, G*T, D]."""
    b, h, t, d = q.shape
    return attend(q.reshape(b, 2, 2 * t, d), k, v).view(b, h, t, d)


@spelling("heads", facts=TILED)
def gqa_tiled_repeat(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """x-transformers: query head h reads key head h mod Hkv."""
    return attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))


@spelling("heads", facts=TILED)
def gqa_tiled_concat(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, t, d = k.shape
    k = k[:, None].expand(b, 2, h, t, d).reshape(b, 2 * h, t, d)
    v = v[:, None].expand(b, 2, h, t, d).reshape(b, 2 * h, t, d)
    return attend(q, k, v)


@spelling("heads", facts=SHARED)
def mqa_broadcast(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One key head, broadcast by matmul itself."""
    return attend(q, k, v)


@spelling("heads", facts=SHARED)
def mqa_expand(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, t, d = q.shape
    return attend(q, k.expand(b, h, t, d), v.expand(-1, HEADS, -1, -1))


@spelling("heads", facts=SHARED)
def mqa_keys_without_head_axis(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """3-D keys and values in einsum."""
    key, value = k.squeeze(1), v.squeeze(1)
    weights = torch.einsum("bhid,bjd->bhij", q, key).mul(SCALE).softmax(-1)
    return torch.einsum("bhij,bjd->bhid", weights, value)


@spelling("heads", facts=SHARED)
def mqa_heads_folded_into_queries(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPTBigCode: [B, H*T, D] against [B, D, S]."""
    b, h, t, d = q.shape
    scores = torch.bmm(q.reshape(b, h * t, d), k.squeeze(1).transpose(1, 2)) * SCALE
    weights = torch.softmax(scores.view(b, h, t, t), dim=-1)
    return torch.bmm(weights.view(b, h * t, t), v.squeeze(1)).view(b, h, t, d)


@spelling("heads", facts=Facts(), reasons=("kv-map",), reference=False, kv_heads=2)
def gqa_key_and_value_disagree(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys interleaved, values tiled: no single head map describes it. Un-repeated it would be wrong."""
    return attend(q, k.repeat_interleave(2, dim=1), v.repeat(1, 2, 1, 1))
