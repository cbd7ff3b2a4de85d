"""Axis 16 of the taxonomy: what must be refused, with the right codes, and what is no attention at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import DIM, HEADS, WIDTH, Attention, Facts, merge, spelling, split

SCALE = DIM**-0.5


def product(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-1, -2)) * SCALE


# ---- a softmax that belongs to no attention


@spelling("decoy", reasons=("not-attention",))
class moe_router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        share = torch.softmax(self.gate(x), dim=-1)
        stacked = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return (share.unsqueeze(-1) * stacked).sum(-2)


@spelling("decoy", reasons=("not-attention",))
class moe_router_top_k(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.table = nn.Parameter(torch.randn(4, WIDTH, WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        weight, index = torch.topk(torch.softmax(self.gate(x), dim=-1), 2, dim=-1)
        dense = torch.zeros_like(self.gate(x)).scatter(-1, index, weight)
        return torch.einsum("bte,ewc,btw->btc", dense, self.table, x)


@spelling("decoy", reasons=("not-attention",))
class classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.head(x), dim=-1)


@spelling("decoy", reasons=("not-attention",), dynamic_length=False, lengths=((2, 7), (3, 7)))
class synthesizer(nn.Module):
    """Weights predicted from the query alone: there is no key."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, 7)
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.dense(x), dim=-1) @ self.value(x)


@spelling("decoy", reasons=("not-attention", "axes"))
class attention_pooling(nn.Module):
    """A learned score per token, one weighted mean: no query."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.score(x), dim=1)
        return torch.matmul(weights.transpose(1, 2), x).expand_as(x)


@spelling("decoy", reasons=("not-attention", "axes"))
class mixture_over_codebook(nn.Module):
    """Soft quantisation: the keys are a parameter table; no sequence of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.book = nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(F.linear(x, self.book), dim=-1) @ self.book


@spelling("decoy", reasons=("not-attention", "score-step"), may_be_silent=True)
class deformable_points(nn.Module):
    """Deformable attention: softmax over sampling points predicted by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(WIDTH, 3)
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        v = self.value(x)
        points = torch.stack([v, v.roll(1, 1), v.roll(-1, 1)], dim=-1)
        return torch.einsum("btp,btcp->btc", torch.softmax(self.weights(x), -1), points)


# ---- no softmax over keys


@spelling("decoy", reasons=("not-attention", "score-step"), may_be_silent=True)
def sigmoid_attention(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(product(q, k)) @ v


@spelling("decoy", reasons=("not-attention",), may_be_silent=True)
def relu_attention(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.relu(product(q, k)) @ v


@spelling("decoy", reasons=("softmax-axis",))
def softmax_over_queries(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(product(q, k), dim=-2) @ v


@spelling("decoy", reasons=("softmax-axis",))
def softmax_over_heads(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(product(q, k), dim=1) @ v


@spelling("decoy", reasons=("softmax-axis", "value-step", "weights-escape", "not-attention"))
def slot_attention(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax over queries, then normalised over keys."""
    weights = torch.softmax(product(q, k), dim=-2)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling("decoy", reasons=("softmax-axis", "axes", "not-attention", "head-mixing"))
def softmax_over_keys_and_heads(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads compete: one softmax over (head, key)."""
    b, h, t, _ = q.shape
    flat = product(q, k).transpose(1, 2).reshape(b, t, h * t)
    return torch.softmax(flat, -1).view(b, t, h, t).transpose(1, 2) @ v


@spelling("decoy", reasons=("not-attention", "value-step", "score-step"), may_be_silent=True)
def log_softmax_weights(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(product(q, k), dim=-1) @ v


# ---- scores that are not a product of q and k plus known terms


@spelling("decoy", reasons=("score-step", "not-attention"))
def l2_distance(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(-torch.cdist(q, k), dim=-1) @ v


@spelling("decoy", reasons=("score-step", "not-attention"))
def additive_attention(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bahdanau: tanh(q + k) summed over features."""
    return torch.softmax(torch.tanh(q.unsqueeze(3) + k.unsqueeze(2)).sum(-1), dim=-1) @ v


@spelling("decoy", reasons=("score-step", "weights-escape", "softcap-unsupported"))
def softcap_after_subtracting_max(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The row maximum is neutral only as long as nothing after it can tell; tanh can."""
    scores = product(q, k)
    return torch.softmax(torch.tanh(scores - scores.amax(-1, keepdim=True)), dim=-1) @ v


def _sink(m: Attention) -> None:
    m.sinks = nn.Parameter(torch.zeros(HEADS))


@spelling("decoy", reasons=("score-step", "weights-escape", "sinks-unsupported"), setup=_sink)
def sink_after_subtracting_max(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The maximum is taken from the scores and not from the sink: the sink moves with every row."""
    b, h, t, _ = q.shape
    scores = product(q, k)
    scores = scores - scores.amax(-1, keepdim=True)
    scores = torch.cat([scores, m.sinks.view(1, h, 1, 1).expand(b, h, t, 1)], dim=-1)
    return torch.softmax(scores, dim=-1)[..., :-1] @ v


@spelling("decoy", reasons=("score-step", "weights-escape"), culprit="pow")
def squared_scores(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(product(q, k).pow(2), dim=-1) @ v


@spelling("decoy", reasons=("score-step", "weights-escape", "mask-data-dependent", "bias-unsupported"))
def top_k_attention(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask depends on the scores themselves."""
    scores = product(q, k)
    least = scores.topk(3, dim=-1).values[..., -1:]
    return torch.softmax(scores.masked_fill(scores < least, float("-inf")), dim=-1) @ v


@spelling("decoy", reasons=("score-step", "bias-unsupported", "mask-unknown", "mask-data-dependent"))
def gumbel(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Random scores: two runs differ, so no rewrite can be checked."""
    scores = product(q, k)
    noise = -torch.log(-torch.log(torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)))
    return torch.softmax(scores + noise, dim=-1) @ v


def _heads(m: Attention) -> None:
    m.mix = nn.Linear(HEADS, HEADS, bias=False)


@spelling("decoy", reasons=("head-mixing", "score-step", "not-attention"), setup=_heads)
def talking_heads_before_softmax(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = m.mix(product(q, k).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return torch.softmax(scores, dim=-1) @ v


@spelling("decoy", reasons=("head-mixing", "value-step", "not-attention"), setup=_heads)
def talking_heads_after_softmax(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = m.mix(torch.softmax(product(q, k), dim=-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return weights @ v


@spelling("decoy", reasons=("head-mixing", "value-step", "not-attention", "axes"), setup=_heads)
def talking_heads_einsum(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mixing einsum looks like a contraction with values."""
    weights = torch.einsum("bhij,gh->bgij", torch.softmax(product(q, k), dim=-1), m.mix.weight)
    return weights @ v


@spelling(
    "decoy",
    facts=Facts(mask="other"),
    reference=False,
    reasons=("mask-data-dependent", "mask-unknown", "score-step", "bias-unsupported"),
    fx=False,
)
class mask_from_hidden_state(nn.Module):
    """Visibility decided by the hidden state of query and key: a different mask for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(y, HEADS) for y in self.qkv(x).chunk(3, dim=-1))
        seen = (x @ x.mT > 0) | torch.eye(x.shape[1], dtype=torch.bool)
        return merge(torch.softmax(product(q, k).masked_fill(~seen[:, None], float("-inf")), -1) @ v)


# ---- weights used for more than one contraction


@spelling("decoy", reasons=("weights-escape",))
def weights_returned(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(product(q, k), dim=-1)
    return weights @ v + weights.sum()


@spelling("decoy", reasons=("weights-escape",))
class weights_as_second_output(Attention):
    def __init__(self) -> None:
        super().__init__(lambda m, q, k, v: v)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = split(self.q_proj(x), HEADS), split(self.k_proj(x), HEADS), split(self.v_proj(x), HEADS)
        weights = torch.softmax(product(q, k), dim=-1)
        return self.o_proj(merge(weights @ v)), weights


@spelling("decoy", reasons=("weights-escape",))
class scores_as_second_output(Attention):
    """Whoever rewrites this would still have to compute every score."""

    def __init__(self) -> None:
        super().__init__(lambda m, q, k, v: v)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = split(self.q_proj(x), HEADS), split(self.k_proj(x), HEADS), split(self.v_proj(x), HEADS)
        scores = product(q, k)
        return self.o_proj(merge(torch.softmax(scores, dim=-1) @ v)), scores


@spelling("decoy", reasons=("weights-escape",))
def weights_used_twice(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(product(q, k), dim=-1)
    return weights @ v + weights @ k


@spelling(
    "decoy",
    facts=Facts(mask="full+bias", label="other+bias"),
    reference=False,
    reasons=("weights-escape", "score-step", "bias-unsupported"),
    fx=False,
)
class realformer(nn.Module):
    """The second layer adds the first layer's scores to its own: those of the first escape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(y, HEADS) for y in self.first(x).chunk(3, dim=-1))
        before = product(q, k)
        x = x + merge(torch.softmax(before, dim=-1) @ v)
        q, k, v = (split(y, HEADS) for y in self.second(x).chunk(3, dim=-1))
        return merge(torch.softmax(product(q, k) + before, dim=-1) @ v)


@spelling("decoy", reasons=("weights-escape", "score-step", "bias-unsupported", "not-attention"))
def bidirectional_fusion(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GroundingDINO: one score matrix, softmax along both axes."""
    scores = product(q, k)
    return torch.softmax(scores, dim=-1) @ v + torch.softmax(scores.transpose(-1, -2), dim=-1) @ q


# ---- weights changed after the softmax


@spelling("decoy", reasons=("value-step", "weights-escape"))
class gated_weights(Attention):
    """A data-dependent gate per (head, key) on the weights."""

    def __init__(self) -> None:
        super().__init__(lambda m, q, k, v: v)
        self.gate = nn.Linear(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.q_proj(x), HEADS), split(self.k_proj(x), HEADS), split(self.v_proj(x), HEADS)
        gate = torch.sigmoid(self.gate(x)).transpose(1, 2).unsqueeze(2)
        return self.o_proj(merge((torch.softmax(product(q, k), dim=-1) * gate) @ v))


@spelling("decoy", reasons=("value-step", "weights-escape", "not-attention"))
def renormalised_weights(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(product(q, k), dim=-1).pow(2)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling("decoy", facts=Facts(), reasons=("value-step",), reference=False)
def signed_and_halved_weights(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A constant factor after the softmax could be folded into the values; accepting needs exactness."""
    return (torch.softmax(product(q, k), dim=-1) * -0.5) @ v


@spelling("decoy", reasons=("axes", "softmax-axis"))
def values_along_the_wrong_axis(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """weights^T @ v sums over queries."""
    return torch.softmax(product(q, k), dim=-1).transpose(-1, -2) @ v


@spelling("decoy", reasons=("axes", "head-mixing", "softmax-axis", "not-attention"))
def values_of_all_heads_summed(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The value contraction also sums over heads."""
    weights = torch.softmax(product(q, k), dim=-1)
    return torch.einsum("bhij,bhjd->bid", weights, v).unsqueeze(1).expand_as(q)


# ---- effects and others


@spelling("decoy", facts=Facts(), reasons=("mutation",), reference=False)
def values_mutated_between(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The values change after the scores were computed and before they are read: a write nobody else sees."""
    v = v.clone()
    before = v + 0.0
    weights = torch.softmax(product(q, before), dim=-1)
    v.mul_(before.mean())
    return weights @ v


@spelling("decoy", facts=Facts(), reasons=("mutation",), reference=False)
def keys_mutated_after_the_scores(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A call placed at the value contraction would read the changed keys."""
    k = k.clone()
    scores = product(q, k)
    k.add_(1.0)
    return torch.softmax(scores, dim=-1) @ v + k


@spelling("decoy", facts=Facts(), reasons=("mutation",), reference=False)
def write_seen_through_an_earlier_slice(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A slice taken before the write shows it afterwards: the write is not private."""
    k = k.clone()
    last = k.select(2, -1)
    scores = product(q, k)
    k.add_(1.0)
    return torch.softmax(scores, dim=-1) @ v + last.unsqueeze(2)


def _store(m: Attention) -> None:
    m.register_buffer("store", torch.randn(1, HEADS, 9, DIM), persistent=False)


@spelling("decoy", reasons=("mutation",), setup=_store)
def key_buffer_overwritten_between(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A buffer read as keys and written before the values are read: everyone can see the write."""
    scores = product(q, m.store)
    m.store.add_(1.0)
    return torch.softmax(scores, dim=-1) @ v.mean(2, keepdim=True).expand(-1, -1, 9, -1)


@spelling("decoy", reasons=("mutation",), setup=_store, fx=False)
def key_view_overwritten_through_another(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values are views of one buffer, written through another view between their readers."""
    keys = m.store.transpose(1, 2)
    scores = product(q, keys.transpose(1, 2))
    m.store[:, :, 0] = 0.0
    return torch.softmax(scores, dim=-1) @ keys.transpose(1, 2).expand(q.shape[0], -1, -1, -1)


@spelling(
    "decoy",
    facts=Facts(sites=2, paths=("attn", "attn")),
    reasons=("not-attention", "value-step", "weights-escape", "axes", "softmax-axis"),
    reference=False,
    lengths=((2, 8), (3, 8)),
    dynamic_length=False,
)
def nystrom(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three softmax kernels. The outer two are cross-attentions with landmarks in their own right; the one in
    between is inverted and is none."""
    b, h, t, d = q.shape
    ql, kl = q.reshape(b, h, 4, t // 4, d).mean(3), k.reshape(b, h, 4, t // 4, d).mean(3)
    one, two, three = (torch.softmax(product(a, c), -1) for a, c in ((q, kl), (ql, kl), (ql, k)))
    inverse = two.mT / two.sum(-2).amax() / two.sum(-1).amax()
    inverse = 2 * inverse - inverse @ two @ inverse
    return one @ (inverse @ (three @ v))
