"""Axes 2, 8, 11 of the taxonomy: how scores are contracted, normalised, and applied to the values."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._base import DIM, HEADS, Attention, Facts, causal_mask, spelling

SCALE = DIM**-0.5
PRESCALED = Facts(operand_scale=SCALE)


@spelling("contraction")
def matmul_transpose(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * SCALE, dim=-1)
    return torch.matmul(weights, v)


@spelling("contraction")
def at_operator_mt(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * SCALE).softmax(-1) @ v


@spelling("contraction")
def matmul_permute(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q.matmul(k.permute(0, 1, 3, 2)) / math.sqrt(DIM), dim=3).matmul(v)


@spelling("contraction", layout="flat")
def key_stored_transposed(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-1 and Bloom keep keys as [B, H, D, S] from the start."""
    b, t, _ = q.shape
    key = k.view(b, t, HEADS, DIM).permute(0, 2, 3, 1)
    query = q.view(b, t, HEADS, DIM).permute(0, 2, 1, 3)
    value = v.view(b, t, HEADS, DIM).permute(0, 2, 1, 3)
    out = torch.matmul(F.softmax(torch.matmul(query, key) * SCALE, -1), value)
    return out.permute(0, 2, 1, 3).contiguous().view(b, t, HEADS * DIM)


@spelling("contraction", facts=PRESCALED, layout="flat")
def bmm_merged_heads(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fairseq and BART: batch and heads in one axis."""
    b, t, _ = q.shape

    def fold(x: Tensor) -> Tensor:
        return x.view(b, t, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, t, DIM)

    scores = torch.bmm(fold(q) * SCALE, fold(k).transpose(1, 2))
    out = torch.bmm(F.softmax(scores, dim=-1), fold(v))
    return out.view(b, HEADS, t, DIM).transpose(1, 2).reshape(b, t, HEADS * DIM)


@spelling("contraction", facts=Facts(mask="causal"), layout="flat")
def bmm_with_4d_view_for_the_mask(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BART: the scores are viewed to four axes only to add the mask."""
    b, t, _ = q.shape

    def fold(x: Tensor) -> Tensor:
        return x.view(b, t, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, t, DIM)

    scores = torch.bmm(fold(q), fold(k).transpose(1, 2)) * SCALE
    scores = scores.view(b, HEADS, t, t) + causal_mask(fold(q))
    weights = F.softmax(scores.view(b * HEADS, t, t), dim=-1)
    out = torch.bmm(weights, fold(v))
    return out.view(b, HEADS, t, DIM).transpose(1, 2).reshape(b, t, HEADS * DIM)


@spelling("contraction")
def einsum_bhid_bhjd(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).mul(SCALE).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


@spelling("contraction", layout="flat")
def einsum_bshd(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Flax style: heads stay at axis 2."""
    b, t, _ = q.shape
    q, k, v = (x.view(b, t, HEADS, DIM) for x in (q, k, v))
    weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(DIM), dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, HEADS * DIM)


@spelling("contraction", layout="flat")
def einsum_xlnet_ijbn(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """XLNet: batch and head last, softmax over axis 1."""
    b, t, _ = q.shape
    q, k, v = (x.view(b, t, HEADS, DIM).transpose(0, 1) for x in (q, k, v))
    scores = torch.einsum("ibnd,jbnd->ijbn", q, k) * SCALE
    weights = F.softmax(scores, dim=1)
    out = torch.einsum("ijbn,jbnd->ibnd", weights, v)
    return out.transpose(0, 1).reshape(b, t, HEADS * DIM)


@spelling("contraction", facts=PRESCALED)
def einsum_key_first(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("xhcz,xhaz->xhac", k, q * SCALE).softmax(-1)
    return torch.einsum("xhcz,xhac->xhaz", v, weights)


@spelling("contraction", facts=PRESCALED)
def einsum_ellipsis(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("...id,...jd->...ij", q * SCALE, k).softmax(-1)
    return torch.einsum("...ij,...jd->...id", weights, v)


@spelling("contraction", facts=Facts(kv=("interleaved", 2)))
def einsum_grouped_5d(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query heads seen as [Hkv, group]; keys are never repeated."""
    b, h, t, d = q.shape
    q = q.view(b, 2, 2, t, d)
    weights = torch.einsum("bkgid,bkjd->bkgij", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bkgij,bkjd->bkgid", weights, v).reshape(b, h, t, d)


@spelling("contraction", facts=Facts(kv=("tiled", 2)))
def einsum_grouped_tiled(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query heads seen as [group, Hkv]: the same einsum, the other head mapping."""
    b, h, t, d = q.shape
    q = q.view(b, 2, 2, t, d)
    weights = torch.einsum("bgkid,bkjd->bgkij", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bgkij,bkjd->bgkid", weights, v).reshape(b, h, t, d)


@spelling("contraction", layout="flat", fx=False)
def baddbmm_beta_zero(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Diffusers: an empty tensor as input, beta=0, the scale as alpha."""
    b, t, _ = q.shape

    def fold(x: Tensor) -> Tensor:
        return x.view(b, t, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, t, DIM)

    empty = torch.zeros(b * HEADS, t, t, dtype=q.dtype)
    scores = torch.baddbmm(empty, fold(q), fold(k).transpose(-1, -2), beta=0, alpha=SCALE)
    out = torch.bmm(scores.softmax(dim=-1), fold(v))
    return out.view(b, HEADS, t, DIM).transpose(1, 2).reshape(b, t, HEADS * DIM)


@spelling("contraction", facts=Facts(mask="causal", operand_scale=SCALE), layout="flat")
def baddbmm_adds_the_mask(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, t, _ = q.shape

    def fold(x: Tensor) -> Tensor:
        return x.view(b, t, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, t, DIM)

    scores = torch.baddbmm(causal_mask(fold(q)), fold(q) * SCALE, fold(k).mT)
    out = torch.bmm(scores.softmax(dim=-1), fold(v))
    return out.view(b, HEADS, t, DIM).transpose(1, 2).reshape(b, t, HEADS * DIM)


@spelling("contraction")
def keys_by_queries(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores as k @ q^T: keys are the rows, softmax over axis -2, values from the left."""
    weights = torch.softmax(torch.matmul(k, q.transpose(-1, -2)) * SCALE, dim=-2)
    return torch.matmul(weights.transpose(-1, -2), v)


@spelling("contraction")
def values_from_the_left(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Vision code: out^T = v^T @ weights^T."""
    weights = torch.softmax(torch.matmul(q, k.mT) * SCALE, dim=-1)
    return torch.matmul(v.mT, weights.mT).mT


@spelling("contraction", layout="flat", facts=Facts(heads=1, dim=24, value_dim=24, scale=24**-0.5))
def single_head_without_head_axis(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 24**-0.5, dim=-1)
    return torch.bmm(weights, v)


# ---- softmax


@spelling("softmax")
def softmax_dtype_argument(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ k.mT * SCALE, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


@spelling("softmax")
def softmax_between_casts(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax((q @ k.mT * SCALE).float(), dim=-1).type_as(q)
    return weights @ v


@spelling("softmax")
def softmax_by_hand(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    grown = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return (grown / grown.sum(dim=-1, keepdim=True)) @ v


@spelling("softmax")
def softmax_by_hand_max_values(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    grown = (scores - torch.max(scores, dim=-1, keepdim=True)[0]).exp()
    return torch.matmul(grown / torch.sum(grown, dim=-1, keepdim=True), v)


@spelling("softmax")
def softmax_by_hand_without_max(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grown = torch.exp(q @ k.mT * SCALE)
    return (grown / grown.sum(-1, keepdim=True)) @ v


@spelling("softmax")
def softmax_safe(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._safe_softmax(q @ k.mT * SCALE, -1) @ v


@spelling("softmax")
def softmax_after_subtracting_max(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GroundingDINO and others guard twice; the shift changes nothing."""
    scores = q @ k.mT * SCALE
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1) @ v


@spelling("softmax")
def softmax_special(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.special.softmax(q @ k.mT * SCALE, -1) @ v


@spelling("softmax", facts=Facts(), reasons=("not-attention", "value-step"), may_be_silent=True)
def softmax_as_exp_log_softmax(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT * SCALE, -1).exp() @ v


# ---- after the softmax


@spelling("post-softmax", facts=Facts(dropout=0.0))
def dropout_in_eval(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.dropout(torch.softmax(q @ k.mT * SCALE, -1), p=0.1, training=m.training)
    return weights @ v


@spelling("post-softmax", facts=Facts(dropout=0.1), training=True, reference=False)
def dropout_in_training(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.dropout(torch.softmax(q @ k.mT * SCALE, -1), p=0.1, training=m.training)
    return weights @ v


@spelling("post-softmax", inputs=("x",))
def nan_to_num_guard(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nan_to_num(torch.softmax(q @ k.mT * SCALE, -1), 0.0) @ v


@spelling("post-softmax")
def nan_where_guard(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.mT * SCALE, -1)
    return torch.where(torch.isnan(weights), torch.zeros_like(weights), weights) @ v


@spelling(
    "post-softmax",
    facts=Facts(mask="full+padding"),
    inputs=("x", "keep"),
    reasons=("value-step", "weights-escape"),
    fx=False,
)
def masked_again_after_softmax(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """DeBERTa's XSoftmax: masked positions are set to zero once more."""
    hidden = ~keep[:, None, None, :]
    scores = (q @ k.mT * SCALE).masked_fill(hidden, torch.finfo(q.dtype).min)
    return torch.softmax(scores, -1).masked_fill(hidden, 0.0) @ v


@spelling("post-softmax")
def cast_with_contiguous_and_clone(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No-ops a reader must look through."""
    weights = torch.softmax((q.contiguous() @ k.mT.contiguous()) * SCALE, -1).to(q.dtype).contiguous().clone()
    return weights @ v.contiguous()
