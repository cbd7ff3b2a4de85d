"""Axes 3, 4, 5 and 9 of the taxonomy: scale positions, softcap, biases, sinks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import DIM, HEADS, LONGEST, Attention, Facts, causal_mask, spelling

SCALE = DIM**-0.5


def apply(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1) @ v


# ---- scale


@spelling("scale", facts=Facts(operand_scale=SCALE))
def scale_on_query(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return apply((q * SCALE) @ k.mT, v)


@spelling("scale", facts=Facts(operand_scale=SCALE))
def scale_divides_query(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return apply((q / math.sqrt(DIM)) @ k.mT, v)


@spelling("scale", facts=Facts(operand_scale=SCALE))
def scale_on_key(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return apply(q @ (k.mT * SCALE), v)


@spelling("scale", facts=Facts(operand_scale=SCALE))
def scale_halves_on_both(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    half = math.sqrt(SCALE)
    return apply((q * half) @ (k.mT * half), v)


@spelling("scale")
def scale_divides_scores(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return apply(torch.div(q @ k.mT, math.sqrt(DIM)), v)


@spelling("scale")
def scale_in_place(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Falcon and MPNet: in-place on the scores nobody else reads."""
    scores = q @ k.mT
    scores /= math.sqrt(DIM)
    return apply(scores, v)


@spelling("scale", facts=Facts(scale=1 / 3))
def scale_integer(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return apply(q @ k.mT / 3, v)


@spelling("scale", facts=Facts(scale=1.0))
def scale_absent(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return apply(q @ k.mT, v)


@spelling("scale", facts=Facts(scale=1.0))
def scale_one(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return apply(q @ k.mT * 1.0, v)


@spelling("scale", facts=Facts(scale=0.25 * SCALE, operand_scale=0.25))
def scale_twice(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return apply((q * 0.25) @ k.mT / math.sqrt(DIM), v)


@spelling("scale")
def scale_from_shape(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return apply(q @ k.mT * k.size(-1) ** -0.5, v)


def _root(m: Attention) -> None:
    m.register_buffer("root", torch.tensor(math.sqrt(DIM)))
    m.adjust = lambda scores, h, named, q, k: scores / math.sqrt(DIM)


@spelling(
    "scale",
    facts=Facts(scale="tensor"),
    setup=_root,
)
def scale_zero_dim_buffer(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-J: divides by a 0-d buffer."""
    return apply(q @ k.mT / m.root, v)


@spelling("scale", facts=Facts(scale="tensor"), setup=_root)
def scale_zero_dim_computed(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2 and Stable LM: torch.full([], sqrt(D)) in the score dtype."""
    scores = q @ k.mT
    return apply(scores / torch.full([], DIM**0.5, dtype=scores.dtype), v)


def _log_scale(m: Attention) -> None:
    m.logit_scale = nn.Parameter(torch.linspace(0.0, 1.0, HEADS).view(HEADS, 1, 1))
    m.adjust = lambda scores, h, named, q, k: scores * m.logit_scale[h].clamp(max=2.0).exp()


@spelling("scale", facts=Facts(scale="tensor"), setup=_log_scale)
def scale_learned_per_head(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SwinV2 and QK-norm models: a learned temperature per head."""
    return apply(q @ k.mT * torch.clamp(m.logit_scale, max=2.0).exp(), v)


def _unit(m: Attention) -> None:
    plain = m.operands

    def normalised(named: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = plain(named)
        return q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v

    m.operands = normalised


@spelling("scale", facts=Facts(scale=10.0), setup=_unit)
def cosine_attention(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Normalised queries and keys belong to the operands, not to the scores."""
    return apply(F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 10.0, v)


# ---- softcap


@spelling("softcap", facts=Facts(softcap=5.0))
def softcap(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return apply(torch.tanh(scores / 5.0) * 5.0, v)


@spelling("softcap", facts=Facts(softcap=5.0, mask="causal"))
def softcap_before_mask(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma 2, statement by statement."""
    scores = torch.matmul(q, k.transpose(2, 3)) * SCALE
    scores = scores / 5.0
    scores = torch.tanh(scores)
    scores = scores * 5.0
    return apply(scores + causal_mask(q), v)


@spelling("softcap", facts=Facts(softcap=5.0))
def softcap_folded_with_scale(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grok: one multiplication carries scale and 1/cap."""
    return apply(5.0 * torch.tanh(q @ k.mT * (SCALE / 5.0)), v)


def _clamped(m: Attention) -> None:
    m.adjust = lambda scores, h, named, q, k: scores.clamp(-2.0, 2.0)


@spelling(
    "softcap", facts=Facts(), reasons=("score-step", "softcap-unsupported"), setup=_clamped, culprit="clamp"
)
def clamped_scores(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return apply((q @ k.mT * SCALE).clamp(min=-2.0, max=2.0), v)


# ---- bias


def _t5(m: Attention) -> None:
    m.table = nn.Embedding(8, HEADS)

    def bias(t: int) -> Tensor:
        i = torch.arange(t)
        return m.table((i[None, :] - i[:, None]).clamp(-4, 3) + 4).permute(2, 0, 1).unsqueeze(0)

    m.bias = bias
    m.adjust = lambda scores, h, named, q, k: scores + bias(q.shape[2])[:, h]


@spelling("bias", facts=Facts(scale=1.0, mask="full+bias"), setup=_t5)
def t5_bucket_bias(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """T5: unscaled scores plus an embedding of the bucketed distance, fp32 softmax."""
    scores = torch.matmul(q, k.transpose(3, 2))
    scores = scores + m.bias(q.shape[2])
    return torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)


@spelling(
    "bias", facts=Facts(scale=1.0, mask="causal+padding+bias"), setup=_t5, inputs=("x", "keep"), fx=False
)
def t5_bias_causal_padding(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """T5 decoder: bias, causal and padding arrive in one float tensor."""
    t = q.shape[2]
    i = torch.arange(t)
    seen = (i[None, :] <= i[:, None]) & keep[:, None, None, :]
    mask = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, torch.finfo(q.dtype).min)
    return apply(q @ k.mT + (m.bias(t) + mask), v)


def _slopes(m: Attention) -> None:
    m.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1).float(), persistent=False)
    m.adjust = lambda scores, h, named, q, k: scores + m.slopes[h] * torch.arange(k.shape[2])


@spelling("bias", facts=Facts(mask="causal+bias"), setup=_slopes, fx=False)
def alibi_added(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MPT: slope times key position, then a causal masked_fill."""
    t = q.shape[2]
    i = torch.arange(t)
    scores = q @ k.mT * SCALE + m.slopes.view(1, HEADS, 1, 1) * i.view(1, 1, 1, t)
    return apply(scores.masked_fill(i[None, :] > i[:, None], torch.finfo(q.dtype).min), v)


def _alibi_input(m: Attention) -> None:
    m.adjust = lambda scores, h, named, q, k: scores + named["alibi"][h]


@spelling(
    "bias",
    facts=Facts(mask="full+bias", label="other+bias"),
    inputs=("x", "alibi"),
    setup=_alibi_input,
    layout="flat",
    reasons=("bias-unsupported", "mask-data-dependent", "mask-unknown", "score-step", "shape-unknown"),
    dynamic_batch=False,
    lengths=((2, 7), (2, 11)),
)
def alibi_baddbmm_input(m: Attention, q: Tensor, k: Tensor, v: Tensor, alibi: Tensor) -> Tensor:
    """Bloom: ALiBi [B*H, 1, S] is a graph input and the `input` of baddbmm. Its values are unknown."""
    b, t, _ = q.shape
    query = q.view(b, t, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, t, DIM)
    key = k.view(b, t, HEADS, DIM).permute(0, 2, 3, 1).reshape(b * HEADS, DIM, t)
    value = v.view(b, t, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, t, DIM)
    scores = alibi.baddbmm(batch1=query, batch2=key, beta=1.0, alpha=SCALE)
    weights = F.softmax(scores.view(b, HEADS, t, t), dim=-1, dtype=torch.float32).to(q.dtype)
    out = torch.bmm(weights.view(b * HEADS, t, t), value)
    return out.view(b, HEADS, t, DIM).transpose(1, 2).reshape(b, t, HEADS * DIM)


@spelling("bias", facts=Facts(mask="causal+bias"), setup=_slopes, layout="flat", fx=False)
def alibi_baddbmm_computed(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bloom with the ALiBi made in the graph and a causal mask added on four axes."""
    b, t, _ = q.shape
    query = q.view(b, t, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, t, DIM)
    key = k.view(b, t, HEADS, DIM).permute(0, 2, 3, 1).reshape(b * HEADS, DIM, t)
    value = v.view(b, t, HEADS, DIM).transpose(1, 2).reshape(b * HEADS, t, DIM)
    i = torch.arange(t)
    alibi = (m.slopes[:, None, None] * i).to(q.dtype).expand(b, HEADS, 1, t).reshape(b * HEADS, 1, t)
    scores = torch.baddbmm(alibi, query, key, beta=1.0, alpha=SCALE).view(b, HEADS, t, t)
    scores = scores + torch.full((t, t), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    out = torch.bmm(weights.view(b * HEADS, t, t), value)
    return out.view(b, HEADS, t, DIM).transpose(1, 2).reshape(b, t, HEADS * DIM)


def _positions(m: Attention) -> None:
    m.pos_key = nn.Parameter(torch.randn(2 * LONGEST - 1, DIM) * 0.3)

    def adjust(scores: Tensor, h: int, named: dict, q: Tensor, k: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        table = m.pos_key[(i[None, :] - i[:, None]) + LONGEST - 1]
        return scores + torch.einsum("btd,tsd->bts", q[:, h], table)

    m.adjust = adjust


DATA_BIAS = (
    "bias-unsupported",
    "score-step",
    "mask-data-dependent",
    "mask-unknown",
    "weights-escape",
    "axes",
)


@spelling(
    "bias", facts=Facts(scale=1.0, mask="full+bias", label="other+bias"), setup=_positions, reasons=DATA_BIAS
)
def shaw_relative_keys(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Content-to-position term: an einsum with a table row per (i, j). Shaw et al., wav2vec BERT."""
    i = torch.arange(q.shape[2])
    table = m.pos_key[(i[None, :] - i[:, None]) + LONGEST - 1]
    return apply(q @ k.mT + torch.einsum("bhld,lrd->bhlr", q, table), v)


def _disentangled(m: Attention) -> None:
    m.pos_q = nn.Parameter(torch.randn(HEADS, 8, DIM) * 0.3)
    m.pos_k = nn.Parameter(torch.randn(HEADS, 8, DIM) * 0.3)

    def adjust(scores: Tensor, h: int, named: dict, q: Tensor, k: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])
        index = (i[:, None] - i[None, :]).clamp(-4, 3) + 4
        c2p = torch.einsum("btd,tsd->bts", q[:, h], m.pos_k[h][index])
        p2c = torch.einsum("bsd,tsd->bts", k[:, h], m.pos_q[h][index])
        return scores + (c2p + p2c) * (3 * DIM) ** -0.5

    m.adjust = adjust


@spelling(
    "bias",
    facts=Facts(
        scale=(3 * DIM) ** -0.5, operand_scale=(3 * DIM) ** -0.5, mask="full+bias", label="other+bias"
    ),
    setup=_disentangled,
    reasons=DATA_BIAS,
)
def deberta_disentangled(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Content-to-position and position-to-content, gathered by relative bucket."""
    b, h, t, _ = q.shape
    scale = math.sqrt(3 * DIM)
    i = torch.arange(t)
    index = ((i[:, None] - i[None, :]).clamp(-4, 3) + 4).expand(b, h, t, t)
    c2p = torch.gather(q @ m.pos_k.mT / scale, -1, index)
    p2c = torch.gather(k @ m.pos_q.mT / scale, -1, index.transpose(-1, -2)).transpose(-1, -2)
    return apply(q @ (k / scale).mT + (c2p + p2c), v)


def _xlnet(m: Attention) -> None:
    m.content_bias = nn.Parameter(torch.randn(HEADS, 1, DIM))
    m.position_bias = nn.Parameter(torch.randn(HEADS, 1, DIM))
    m.table = nn.Parameter(torch.randn(HEADS, LONGEST, DIM) * 0.3)

    def adjust(scores: Tensor, h: int, named: dict, q: Tensor, k: Tensor) -> Tensor:
        content = (q[:, h] + m.content_bias[h]) @ k[:, h].mT
        position = (q[:, h] + m.position_bias[h]) @ m.table[h, : k.shape[2]].mT
        return (content + position) * SCALE

    m.adjust = adjust


@spelling(
    "bias", facts=Facts(mask="full+bias", label="other+bias", scale="tensor"), setup=_xlnet, reasons=DATA_BIAS
)
def xlnet_two_contractions(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Transformer-XL: (q + u) k^T + (q + w) r^T, scaled together. Scores are the sum of two products."""
    content = torch.einsum("bhid,bhjd->bhij", q + m.content_bias, k)
    position = torch.einsum("bhid,hjd->bhij", q + m.position_bias, m.table[:, : q.shape[2]])
    return apply((content + position) * SCALE, v)


# ---- sinks


def _sinks(m: Attention) -> None:
    m.sinks = nn.Parameter(torch.linspace(-1.0, 2.0, HEADS))


@spelling("sinks", facts=Facts(sinks=True), setup=_sinks)
def sink_last(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gpt-oss: a logit per head as last column, sliced off after the softmax."""
    b, h, t, _ = q.shape
    scores = torch.cat([q @ k.mT * SCALE, m.sinks.reshape(1, -1, 1, 1).expand(b, h, t, 1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1] @ v


@spelling("sinks", facts=Facts(sinks=True), setup=_sinks)
def sink_first(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """x-transformers: the column comes first."""
    b, h, t, _ = q.shape
    scores = torch.cat([m.sinks.view(1, h, 1, 1).expand(b, h, t, 1), q @ k.mT * SCALE], dim=-1)
    return torch.softmax(scores, dim=-1)[..., 1:] @ v


@spelling("sinks", facts=Facts(sinks=True, mask="causal"), setup=_sinks)
def sink_last_causal(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, t, _ = q.shape
    scores = q @ k.mT * SCALE + causal_mask(q)
    scores = torch.cat([scores, m.sinks.view(1, h, 1, 1).expand(b, h, t, 1)], dim=-1)
    return torch.softmax(scores, dim=-1).narrow(-1, 0, t) @ v


@spelling("sinks", setup=_sinks, reasons=("score-step",))
def bias_after_the_sink(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The bias has a column for the sink too, which belongs to no key."""
    b, h, t, _ = q.shape
    scores = torch.cat([q @ k.mT * SCALE, m.sinks.view(1, h, 1, 1).expand(b, h, t, 1)], dim=-1)
    scores = scores + torch.arange(scores.shape[-1]).to(scores).view(1, 1, 1, -1)
    return torch.softmax(scores, dim=-1)[..., :-1] @ v


def _zero_sink(m: Attention) -> None:
    m.register_buffer("sinks", torch.zeros(HEADS), persistent=False)


@spelling("sinks", facts=Facts(sinks=True), setup=_zero_sink, reasons=("score-step", "sinks-unsupported"))
def sink_of_zeros(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax off by one: 1 + sum(exp(s)) as denominator, spelled with a padded column of zeros."""
    scores = F.pad(q @ k.mT * SCALE, (0, 1))
    return torch.softmax(scores, dim=-1)[..., :-1] @ v
