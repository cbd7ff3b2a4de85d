"""Axis 1 of the taxonomy: attention that arrives as one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ._base import DIM, HEADS, WIDTH, Attention, Facts, merge, spelling, split

sdpa = F.scaled_dot_product_attention


@spelling("fused")
def sdpa_plain(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


@spelling("fused", facts=Facts(scale=0.5))
def sdpa_scale(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, scale=0.5)


@spelling("fused", facts=Facts(mask="causal"))
def sdpa_is_causal(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, None, 0.0, True)


@spelling("fused", facts=Facts(mask="causal", kv=("interleaved", 2)))
def sdpa_enable_gqa(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


@spelling("fused", facts=Facts(mask="causal"), fx=False)
def sdpa_bool_mask(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[2]
    return sdpa(q, k, v, attn_mask=torch.ones(t, t, dtype=torch.bool).tril())


@spelling("fused", facts=Facts(mask="causal", label="other+bias"), inputs=("x", "causal_mask"))
def sdpa_float_mask(m: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask)


@spelling("fused", facts=Facts(mask="full+padding"), inputs=("x", "keep"))
def sdpa_padding(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=keep[:, None, None, :])


@spelling("fused", facts=Facts(mask="causal+padding"), inputs=("x", "keep"))
def sdpa_causal_and_padding(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return sdpa(q, k, v, attn_mask=(i[None, :] <= i[:, None]) & keep[:, None, None, :])


@spelling("fused")
def sdpa_dropout_in_eval(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, dropout_p=0.1 if m.training else 0.0)


@spelling("fused", facts=Facts(dropout=0.1), training=True, reference=False)
def sdpa_dropout_in_training(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, dropout_p=0.1 if m.training else 0.0)


@spelling("fused", layout="flat")
def sdpa_merged_heads(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three axes: batch and heads in one."""
    b, t, _ = q.shape
    q, k, v = (split(x, HEADS).reshape(b * HEADS, t, DIM) for x in (q, k, v))
    return merge(sdpa(q, k, v).view(b, HEADS, t, DIM))


@spelling("fused", facts=Facts(kv=("interleaved", 2)))
def sdpa_after_repeat_kv(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' repeat_kv in front of the fused call."""
    b, _, t, d = k.shape
    k = k[:, :, None, :, :].expand(b, 2, 2, t, d).reshape(b, HEADS, t, d)
    v = v[:, :, None, :, :].expand(b, 2, 2, t, d).reshape(b, HEADS, t, d)
    return sdpa(q, k, v)


@spelling("fused", facts=Facts(mask="causal", cross=True, top_left=True), inputs=("x", "memory"))
def sdpa_causal_is_top_left(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The trap: with more keys than queries, is_causal aligns at the first key."""
    return sdpa(q, k, v, is_causal=True)


# ---- nn.MultiheadAttention and the layers around it


class Multihead(nn.Module):
    """nn.MultiheadAttention with its packed projection; `operands` unpacks it by hand."""

    batch_first = True

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=self.batch_first)

    def operands(self, named: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        memory = named.get("memory", named["x"])
        weight, bias = self.mha.in_proj_weight.chunk(3), self.mha.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(y, w, c) for y, w, c in zip((named["x"], memory, memory), weight, bias, strict=True)
        )
        return split(q, HEADS), split(k, HEADS), split(v, HEADS)

    def finish(self, out: Tensor) -> Tensor:
        return self.mha.out_proj(merge(out))


INSIDE = ("attn.mha",)


@spelling("fused", facts=Facts(paths=INSIDE))
class mha_batch_first(Multihead):
    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


@spelling("fused", facts=Facts(paths=INSIDE))
class mha_time_first(Multihead):
    batch_first = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.mha(x, x, x, need_weights=False)[0].transpose(0, 1)


@spelling("fused", facts=Facts(mask="full+padding", paths=INSIDE), inputs=("x", "keep"))
class mha_key_padding(Multihead):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.mha(x, x, x, key_padding_mask=~keep, need_weights=False)[0]


@spelling("fused", facts=Facts(mask="causal", label="other+bias", paths=INSIDE), inputs=("x", "causal_mask"))
class mha_causal_mask(Multihead):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.mha(x, x, x, attn_mask=mask[0, 0], need_weights=False)[0]


@spelling("fused", facts=Facts(cross=True, paths=INSIDE), inputs=("x", "memory"))
class mha_cross(Multihead):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.mha(x, memory, memory, need_weights=False)[0]


@spelling("fused", facts=Facts(paths=INSIDE, scale=DIM**-0.5, operand_scale=DIM**-0.5))
class mha_weights_asked_but_unused(Multihead):
    """need_weights=True selects the decomposed path; nobody reads the averaged weights, so they are dead."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=True)[0]


@spelling("fused", reasons=("weights-escape",))
class mha_weights_returned(Multihead):
    """need_weights=True and the averaged weights leave the model."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mha(x, x, x, need_weights=True)


@spelling("fused", facts=Facts(paths=("attn.layer.self_attn",)), reference=False)
class transformer_encoder_layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@spelling(
    "fused",
    facts=Facts(
        sites=4,
        cross=None,
        paths=(
            "attn.decoder.layers.0.self_attn",
            "attn.decoder.layers.0.multihead_attn",
            "attn.decoder.layers.1.self_attn",
            "attn.decoder.layers.1.multihead_attn",
        ),
    ),
    inputs=("x", "memory"),
    reference=False,
)
class transformer_decoder(nn.Module):
    """Self- and cross-attention in two layers; the facts state what all four sites share."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.decoder(x, memory)


# ---- flex attention: understood or refused, never guessed

FLEX = dict(
    reasons=("flex-unsupported", "shape-unknown"),
    fx=False,
    double=False,
    dynamic_length=False,
    lengths=((2, 7), (3, 7)),
)


@spelling("fused", facts=Facts(), **FLEX)
def flex_plain(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v)


@spelling("fused", facts=Facts(softcap=5.0), **FLEX)
def flex_softcap(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.tanh(s / 5.0) * 5.0)


def _slope(m: Attention) -> None:
    m.adjust = lambda scores, h, named, q, k: (
        scores + 0.1 * (torch.arange(k.shape[2])[None] - torch.arange(q.shape[2])[:, None])
    )


@spelling("fused", facts=Facts(mask="full+bias"), setup=_slope, **FLEX)
def flex_alibi(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + 0.1 * (j - i))


@spelling("fused", facts=Facts(mask="causal"), **FLEX)
def flex_causal_score_mod(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")))


@spelling("fused", facts=Facts(mask="causal"), **FLEX)
def flex_causal_block_mask(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[2]
    blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, t, t, device="cpu")
    return flex_attention(q, k, v, block_mask=blocks)
