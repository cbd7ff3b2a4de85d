"""Axes 6 and 7 of the taxonomy: how visibility is written. A mask means its values, not its syntax."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._base import DIM, HEADS, LONGEST, Attention, Facts, spelling

SCALE = DIM**-0.5
CAUSAL, PADDED, BOTH = Facts(mask="causal"), Facts(mask="full+padding"), Facts(mask="causal+padding")


def product(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-1, -2)) * SCALE


def apply(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1) @ v


def grid(t: int) -> tuple[Tensor, Tensor]:
    """Query positions [T, 1] and key positions [1, T]."""
    i = torch.arange(t)
    return i.unsqueeze(1), i.unsqueeze(0)


# ---- causal


@spelling("mask", facts=Facts(mask="causal", label="other+bias"), inputs=("x", "causal_mask"))
def causal_float_input(m: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The mask [1, 1, T, T] is a graph input: only example values tell what it means."""
    return apply(product(q, k) + mask, v)


@spelling("mask", facts=CAUSAL)
def causal_add_inf_triu(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[2]
    return apply(product(q, k) + torch.full((t, t), -math.inf).triu(1), v)


@spelling("mask", facts=CAUSAL, fx=False)
def causal_add_finfo_min(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers before 4.48: triu of finfo.min."""
    t = q.shape[2]
    mask = torch.triu(torch.full((t, t), torch.finfo(q.dtype).min, dtype=q.dtype), diagonal=1)
    return apply(product(q, k) + mask[None, None], v)


@spelling("mask", facts=CAUSAL, fx=False)
def causal_add_finfo_times_compare(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama: triu multiplied by (column > row)."""
    t = q.shape[2]
    mask = torch.full((t, t), torch.finfo(q.dtype).min, dtype=q.dtype)
    mask = torch.triu(mask, diagonal=1)
    mask = mask * (torch.arange(t) > torch.arange(t).reshape(-1, 1))
    return apply(product(q, k) + mask[None, None, :, :].expand(q.shape[0], 1, -1, -1), v)


@spelling("mask", facts=CAUSAL)
def causal_add_minus_1e9(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = grid(q.shape[2])
    return apply(product(q, k) + (j > i).to(q.dtype) * -1e9, v)


@spelling("mask", facts=CAUSAL)
def causal_add_minus_65504(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = grid(q.shape[2])
    return apply(product(q, k) + (1.0 - (j <= i).to(q.dtype)) * -65504.0, v)


def _tril_buffer(m: Attention) -> None:
    m.register_buffer(
        "tril", torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril()[None, None], persistent=False
    )
    m.register_buffer("lowest", torch.tensor(-1e9), persistent=False)


@spelling("mask", facts=CAUSAL, setup=_tril_buffer, fx=False)
def causal_masked_fill_buffer_slice(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nanoGPT."""
    t = q.shape[2]
    return apply(product(q, k).masked_fill(m.tril[:, :, :t, :t] == 0, -math.inf), v)


@spelling("mask", facts=CAUSAL, setup=_tril_buffer, fx=False)
def causal_where_buffer_slice(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2 and GPT-Neo: where(tril, scores, lowest)."""
    t, s = q.shape[2], k.shape[2]
    scores = product(q, k)
    return apply(torch.where(m.tril[:, :, s - t : s, :s], scores, m.lowest.to(scores.dtype)), v)


@spelling("mask", facts=CAUSAL, fx=False)
def causal_masked_fill_triu_bool(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[2]
    return apply(product(q, k).masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -math.inf), v)


@spelling("mask", facts=CAUSAL)
def causal_arange_compare_where_scalar(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = grid(q.shape[2])
    return apply(torch.where(i >= j, product(q, k), -math.inf), v)


@spelling("mask", facts=CAUSAL)
def causal_in_place_fill(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = grid(q.shape[2])
    scores = product(q, k)
    scores.masked_fill_(j > i, -math.inf)
    return apply(scores, v)


@spelling("mask", facts=Facts(mask="causal", label="other"), inputs=("x", "bool_mask"))
def causal_bool_input_fill(m: Attention, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    return apply(product(q, k).masked_fill(hidden, -10000.0), v)


def _one_for_the_past(m: Attention) -> None:
    m.adjust = lambda scores, h, named, q, k: scores + torch.ones(q.shape[2], k.shape[2]).tril()


@spelling("mask", facts=Facts(mask="full+bias"), setup=_one_for_the_past)
def boolean_tensor_added_masks_nothing(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The trap: True adds 1.0 to a score and hides nothing."""
    i, j = grid(q.shape[2])
    return apply(product(q, k) + (j <= i), v)


@spelling("mask")
def mask_of_all_true(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' disguised full mask: ge(position, 0)."""
    i, j = grid(q.shape[2])
    return apply(product(q, k).masked_fill(~((i >= 0) & (j >= 0)), -math.inf), v)


@spelling("mask", facts=Facts(mask="other"), reasons=("mask-unsupported", "mask-unknown"))
def anti_causal(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sees only the future: no known pattern."""
    i, j = grid(q.shape[2])
    return apply(product(q, k).masked_fill(j < i, -math.inf), v)


# ---- padding


@spelling("mask", facts=PADDED, inputs=("x", "keep"), fx=False)
def padding_add_finfo_min(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """BERT's extended mask."""
    mask = (1.0 - keep[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return apply(product(q, k) + mask, v)


@spelling("mask", facts=PADDED, inputs=("x", "keep"))
def padding_masked_fill_view(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """DistilBERT: (mask == 0) viewed to four axes and expanded."""
    b, _, t, _ = q.shape
    scores = product(q, k)
    hidden = (keep == 0).view(b, 1, 1, t).expand_as(scores)
    return apply(scores.masked_fill(hidden, -math.inf), v)


@spelling("mask", facts=PADDED, inputs=("x", "keep"))
def padding_add_minus_10000(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return apply(product(q, k) + (~keep).to(q.dtype).unsqueeze(1).unsqueeze(2) * -10000.0, v)


@spelling("mask", facts=PADDED, inputs=("x", "keep"))
def padding_where(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return apply(torch.where(keep[:, None, None], product(q, k), -math.inf), v)


@spelling("mask", facts=PADDED, inputs=("x", "keep"), layout="flat")
def padding_on_merged_heads(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """fairseq: view to four axes, fill, view back."""
    b, t, _ = q.shape

    def fold(x: Tensor) -> Tensor:
        return x.view(b, t, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, t, DIM)

    scores = torch.bmm(fold(q), fold(k).mT) * SCALE
    scores = scores.view(b, HEADS, t, t).masked_fill(~keep.unsqueeze(1).unsqueeze(2), -math.inf)
    out = torch.bmm(torch.softmax(scores.view(b * HEADS, t, t), -1), fold(v))
    return out.view(b, HEADS, t, DIM).transpose(1, 2).reshape(b, t, HEADS * DIM)


UNCLEAR = "full+bias|other+bias"


def _penalty(m: Attention) -> None:
    m.adjust = lambda scores, h, named, q, k: scores - 2.0 * (~named["keep"])[:, None, :].to(q.dtype)


@spelling("mask", facts=Facts(label=UNCLEAR), inputs=("x", "keep"), setup=_penalty)
def padding_is_only_discouraged(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """The input adds a finite amount: it hides nothing, and it is not nothing either."""
    return apply(product(q, k) + (~keep)[:, None, None, :].to(q.dtype) * -2.0, v)


def _future_wins(m: Attention) -> None:
    m.adjust = lambda scores, h, named, q, k: scores + torch.full_like(scores, 1e9).triu(1)


@spelling("mask", facts=Facts(label="other+bias|other"), setup=_future_wins)
def mask_subtracted(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The wrong sign: a huge positive term hides every key that does not have it."""
    i, j = grid(q.shape[2])
    return apply(product(q, k) - (j > i).to(q.dtype) * -1e9, v)


@spelling("mask", facts=BOTH, inputs=("x", "keep"), fx=False)
def causal_and_padding_one_fill(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    i, j = grid(q.shape[2])
    seen = (j <= i)[None, None] & keep[:, None, None, :]
    return apply(product(q, k).masked_fill(~seen, torch.finfo(q.dtype).min), v)


@spelling("mask", facts=BOTH, inputs=("x", "keep"), fx=False)
def causal_and_padding_two_adds(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """OPT: two float masks, clamped at finfo.min so that the sum does not overflow."""
    t = q.shape[2]
    lowest = torch.finfo(q.dtype).min
    causal = torch.full((t, t), lowest, dtype=q.dtype).triu(1)
    scores = product(q, k) + causal
    scores = torch.max(scores, torch.tensor(lowest, dtype=q.dtype))
    return apply(scores.masked_fill(~keep[:, None, None, :], lowest), v)


@spelling("mask", facts=BOTH, inputs=("x", "keep"), setup=_tril_buffer, fx=False)
def causal_where_then_padding_add(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """GPT-Neo: where for causal, then an additive padding mask."""
    t = q.shape[2]
    scores = torch.where(m.tril[:, :, :t, :t], product(q, k), -math.inf)
    return apply(scores + (1.0 - keep[:, None, None, :].to(q.dtype)) * -1e9, v)


@spelling("mask", facts=BOTH, inputs=("x", "keep"), fx=False)
def causal_and_padding_by_index(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """transformers 5: vmapped index into the padding mask, then where to a float mask."""
    b, _, t, _ = q.shape
    rows = torch.arange(b)[:, None, None, None]
    i = torch.arange(t)[None, None, :, None]
    j = torch.arange(t)[None, None, None, :]
    seen = (j <= i) & keep[rows, j]
    mask = torch.where(seen, torch.tensor(0.0, dtype=q.dtype), torch.finfo(q.dtype).min)
    return apply(product(q, k) + mask, v)


# ---- windows


@spelling("window", facts=Facts(mask="window(3)"))
def window_compare(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mistral: causal and (i - j) < w."""
    i, j = grid(q.shape[2])
    return apply(product(q, k).masked_fill(~((j <= i) & (i - j < 3)), -math.inf), v)


@spelling("window", facts=Facts(mask="window(4)"), fx=False)
def window_two_triangles(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[2]
    ones = torch.ones(t, t, dtype=torch.bool)
    hidden = ones.triu(1) | ones.tril(-4)
    return apply(
        product(q, k) + torch.zeros(t, t, dtype=q.dtype).masked_fill(hidden, torch.finfo(q.dtype).min), v
    )


@spelling("window", facts=Facts(mask="window(3)+padding"), inputs=("x", "keep"), fx=False)
def window_and_padding(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    i, j = grid(q.shape[2])
    seen = (j <= i) & (j > i - 3) & keep[:, None, None, :]
    return apply(product(q, k).masked_fill(~seen, torch.finfo(q.dtype).min), v)


@spelling("window", facts=Facts(mask="band(2)"))
def band_both_sides(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ModernBERT's local layers."""
    i, j = grid(q.shape[2])
    return apply(product(q, k).masked_fill((i - j).abs() > 2, -math.inf), v)


@spelling("window", facts=Facts(mask="chunk(4)"))
def chunked(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama 4: causal inside chunks of 4."""
    i, j = grid(q.shape[2])
    return apply(product(q, k).masked_fill(~((j <= i) & (i // 4 == j // 4)), -math.inf), v)
