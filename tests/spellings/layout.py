"""Axes 13 to 15 of the taxonomy: layouts, packing, MLA, cross-attention, caches, several sites per owner."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import DIM, HEADS, WIDTH, Attention, Facts, causal_mask, merge, spelling, split

SCALE = DIM**-0.5


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * SCALE, dim=-1) @ v


@spelling("layout", layout="flat")
def sbhd_time_first(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Megatron: [T, B*H, D], transposed to bmm."""
    b, t, _ = q.shape

    def fold(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().view(t, b * HEADS, DIM).transpose(0, 1)

    weights = torch.softmax(torch.bmm(fold(q), fold(k).transpose(1, 2)) * SCALE, dim=-1)
    out = torch.bmm(weights, fold(v))
    return out.transpose(0, 1).reshape(t, b, HEADS * DIM).transpose(0, 1)


@spelling("layout", layout="flat")
def heads_before_batch(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[H*B, T, D] by splitting and concatenating, as the original tensor2tensor ports do."""
    b, t, _ = q.shape

    def fold(x: Tensor) -> Tensor:
        return x.view(b, t, HEADS, DIM).permute(2, 0, 1, 3).reshape(HEADS * b, t, DIM)

    out = attend(fold(q), fold(k), fold(v))
    return out.view(HEADS, b, t, DIM).permute(1, 2, 0, 3).reshape(b, t, HEADS * DIM)


class Packed(nn.Module):
    """One projection for q, k, v. `order` says how its output features are read: see each spelling."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)
        self.proj = nn.Linear(HEADS * DIM, WIDTH)

    def operands(self, named: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split(y, HEADS) for y in self.qkv(named["x"]).chunk(3, -1))
        return q, k, v

    def finish(self, out: Tensor) -> Tensor:
        return self.proj(merge(out))


@spelling("layout")
class packed_chunk(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(merge(attend(split(q, HEADS), split(k, HEADS), split(v, HEADS))))


@spelling("layout")
class packed_split(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(HEADS * DIM, dim=2)
        return self.proj(merge(attend(split(q, HEADS), split(k, HEADS), split(v, HEADS))))


@spelling("layout")
class packed_unbind(Packed):
    """timm: reshape to [3, B, H, T, D] and unbind."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(merge(attend(q, k, v)))


@spelling("layout")
class packed_select(Packed):
    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(x).reshape(b, t, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        return self.proj(merge(attend(qkv[0], qkv[1], qkv[2])))


@spelling("layout")
class packed_per_head(Packed):
    """Bloom, GPT-NeoX: each head's q, k, v lie together, [B, T, H, 3, D]."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(x).view(b, t, HEADS, 3, DIM)
        q, k, v = (qkv[..., i, :].transpose(1, 2) for i in range(3))
        return self.proj(merge(attend(q, k, v)))

    def operands(self, named: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        y = self.qkv(named["x"])
        q, k, v = y.unflatten(-1, (HEADS, 3, DIM)).permute(3, 0, 2, 1, 4)
        return q, k, v


@spelling("layout", facts=Facts(kv=("interleaved", 2)))
class packed_per_group(nn.Module):
    """Falcon: per key head, its query heads, then key, then value; keys broadcast to the group."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 4) * DIM)
        self.proj = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.qkv(x).view(b, t, 2, 4, DIM)
        query, key, value = y[:, :, :, :-2], y[:, :, :, [-2]], y[:, :, :, [-1]]
        key, value = torch.broadcast_to(key, query.shape), torch.broadcast_to(value, query.shape)
        q, k, v = (z.flatten(2, 3).transpose(1, 2) for z in (query, key, value))
        return self.proj(merge(attend(q, k, v)))

    def operands(self, named: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        y = self.qkv(named["x"]).unflatten(-1, (2, 4, DIM))
        return (
            y[:, :, :, :2].flatten(2, 3).transpose(1, 2),
            y[:, :, :, 2].transpose(1, 2),
            y[:, :, :, 3].transpose(1, 2),
        )

    def finish(self, out: Tensor) -> Tensor:
        return self.proj(merge(out))


@spelling("layout")
class addmm_conv1d(Packed):
    """GPT-2: the projection is an addmm on a flattened view."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        y = torch.addmm(self.qkv.bias, x.view(-1, w), self.qkv.weight.t()).view(b, t, 3 * HEADS * DIM)
        q, k, v = y.split(HEADS * DIM, dim=2)
        return self.proj(merge(attend(split(q, HEADS), split(k, HEADS), split(v, HEADS))))


@spelling("layout")
class conv_channel_first(nn.Module):
    """Vision: 1x1 convolution, tokens are the flattened last axes, features come before tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv1d(WIDTH, 3 * HEADS * DIM, 1)
        self.proj = nn.Conv1d(HEADS * DIM, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x.transpose(1, 2)).chunk(3, dim=1)
        q = q.reshape(b, HEADS, DIM, t).transpose(-2, -1)
        k = k.reshape(b, HEADS, DIM, t)
        v = v.reshape(b, HEADS, DIM, t)
        weights = torch.softmax(q @ k * SCALE, dim=-1)
        out = (v @ weights.transpose(-2, -1)).reshape(b, HEADS * DIM, t)
        return self.proj(out).transpose(1, 2)

    def operands(self, named: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        y = F.linear(named["x"], self.qkv.weight.squeeze(-1), self.qkv.bias)
        q, k, v = (split(z, HEADS) for z in y.chunk(3, -1))
        return q, k, v

    def finish(self, out: Tensor) -> Tensor:
        return F.linear(merge(out), self.proj.weight.squeeze(-1), self.proj.bias)


SIDE = 4  # tokens per window


@spelling("layout", lengths=((2, 12), (3, 12)), dynamic_length=False, reference=False, fx=False)
class window_partition(Packed):
    """Swin: [B, W*4, C] -> [B*W, 4, C], full attention inside each window."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        windows = x.view(b, t // SIDE, SIDE, w).reshape(-1, SIDE, w)
        q, k, v = (split(y, HEADS) for y in self.qkv(windows).chunk(3, dim=-1))
        return self.proj(merge(attend(q, k, v))).view(b, t // SIDE, SIDE, w).reshape(b, t, w)


class _Swin(Packed):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * SIDE - 1, HEADS))
        i = torch.arange(SIDE)
        self.register_buffer("index", i[:, None] - i[None, :] + SIDE - 1, persistent=False)
        shift = torch.zeros(3, SIDE, SIDE)
        shift[-1, :2, 2:] = -100.0
        shift[-1, 2:, :2] = -100.0
        self.register_buffer("shift", shift, persistent=False)

    def bias(self) -> Tensor:
        flat = self.table[self.index.view(-1)].view(SIDE, SIDE, HEADS)
        return flat.permute(2, 0, 1).contiguous().unsqueeze(0)


SWIN = dict(lengths=((2, 12), (3, 12)), dynamic_length=False, reference=False)


@spelling("layout", facts=Facts(mask="full+bias", operand_scale=SCALE), **SWIN, fx=False)
class swin_window_bias(_Swin):
    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        windows = x.view(b, t // SIDE, SIDE, w).reshape(-1, SIDE, w)
        q, k, v = (split(y, HEADS) for y in self.qkv(windows).chunk(3, dim=-1))
        scores = (q * SCALE) @ k.mT + self.bias()
        out = merge(torch.softmax(scores, -1) @ v)
        return self.proj(out).view(b, t // SIDE, SIDE, w).reshape(b, t, w)


@spelling("layout", facts=Facts(mask="full+bias", operand_scale=SCALE), **SWIN, fx=False)
class swin_shifted_windows(_Swin):
    """The shift mask differs by window: scores are viewed to five axes to add it."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        count = t // SIDE
        windows = torch.roll(x, -2, 1).view(b, count, SIDE, w).reshape(-1, SIDE, w)
        q, k, v = (split(y, HEADS) for y in self.qkv(windows).chunk(3, dim=-1))
        scores = (q * SCALE) @ k.mT + self.bias()
        scores = scores.view(b, count, HEADS, SIDE, SIDE) + self.shift.unsqueeze(1).unsqueeze(0)
        scores = scores.view(-1, HEADS, SIDE, SIDE)
        out = merge(torch.softmax(scores, -1) @ v)
        return torch.roll(self.proj(out).view(b, count, SIDE, w).reshape(b, t, w), 2, 1)


@spelling(
    "layout",
    facts=Facts(mask="full+bias", label="other+bias", operand_scale=SCALE),
    lengths=((2, 12), (3, 12)),
    dynamic_length=False,
    reference=False,
    reasons=(
        "bias-unsupported",
        "score-step",
        "mask-data-dependent",
        "mask-unknown",
        "weights-escape",
        "axes",
    ),
    fx=False,
)
class sam_decomposed_relative_position(Packed):
    """SAM: the token axis is a grid; row and column terms come from q and are added on five axes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, 3, DIM))
        self.columns = nn.Parameter(torch.randn(4, 4, DIM))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (split(y, HEADS).reshape(b * HEADS, t, DIM) for y in self.qkv(x).chunk(3, dim=-1))
        scores = (q * SCALE) @ k.transpose(-2, -1)
        grid = q.reshape(b * HEADS, 3, 4, DIM)
        by_row = torch.einsum("bhwc,hkc->bhwk", grid, self.rows)
        by_column = torch.einsum("bhwc,wkc->bhwk", grid, self.columns)
        scores = scores.view(b * HEADS, 3, 4, 3, 4) + by_row[:, :, :, :, None] + by_column[:, :, :, None, :]
        out = torch.softmax(scores.view(b * HEADS, t, t), dim=-1) @ v
        return self.proj(merge(out.view(b, HEADS, t, DIM)))


@spelling("layout", facts=Facts(sites=1), reference=False, lengths=((2, 12), (3, 12)), dynamic_length=False)
class axial_rows(Packed):
    """TimeSformer: one more batch axis, [B, rows, H, T, D]."""

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        y = self.qkv(x.view(b, 3, t // 3, w)).view(b, 3, t // 3, 3, HEADS, DIM)
        q, k, v = (y[:, :, :, i].transpose(2, 3) for i in range(3))
        return self.proj(attend(q, k, v).transpose(2, 3).reshape(b, t, HEADS * DIM))


# ---- positions and MLA


def _rotate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rope(m: Attention) -> None:
    angles = torch.arange(64)[:, None] * 10.0 ** -(torch.arange(DIM // 2) / (DIM // 2))
    m.register_buffer("cos", torch.cat([angles, angles], -1).cos(), persistent=False)
    m.register_buffer("sin", torch.cat([angles, angles], -1).sin(), persistent=False)

    def turn(x: Tensor) -> Tensor:
        t = x.shape[2]
        return x * m.cos[:t] + _rotate(x) * m.sin[:t]

    m.turn = turn
    plain = m.operands

    def operands(named: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = plain(named)
        return turn(q), turn(k), v

    m.operands = operands


@spelling(
    "layout",
    facts=Facts(mask="causal", kv=("interleaved", 2)),
    setup=_rope,
    fx=False,
)
def llama_eager(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Everything LLaMA does at once: rotary, repeat_kv, scale, mask, fp32 softmax, dropout, transpose."""
    q, k = m.turn(q), m.turn(k)
    b, h, t, d = k.shape
    k = k[:, :, None, :, :].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d)
    v = v[:, :, None, :, :].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d)
    scores = torch.matmul(q, k.transpose(2, 3)) * SCALE
    weights = F.softmax(scores + causal_mask(q), dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.0, training=m.training)
    return torch.matmul(weights, v)


@spelling("layout", facts=Facts(dim=DIM + 4, value_dim=6, scale=(DIM + 4) ** -0.5))
class mla(nn.Module):
    """DeepSeek: low-rank keys and values, a rotary part shared by all heads, Dv smaller than D."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * (DIM + 4))
        self.kv_down = nn.Linear(WIDTH, 10 + 4)
        self.kv_norm = nn.LayerNorm(10)
        self.kv_up = nn.Linear(10, HEADS * (DIM + 6))
        self.proj = nn.Linear(HEADS * 6, WIDTH)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        q = split(self.q_proj(x), HEADS)
        low, rope = self.kv_down(x).split([10, 4], dim=-1)
        nope, v = split(self.kv_up(self.kv_norm(low)), HEADS).split([DIM, 6], dim=-1)
        k = torch.cat([nope, rope.view(b, 1, t, 4).expand(b, HEADS, t, 4)], dim=-1)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        weights = torch.softmax(q @ k.transpose(-1, -2) * (DIM + 4) ** -0.5, dim=-1)
        return self.proj(merge(weights @ v))

    def operands(self, named: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.parts(named["x"])

    def finish(self, out: Tensor) -> Tensor:
        return self.proj(merge(out))


@spelling("layout", facts=Facts(dim=DIM, value_dim=5))
def narrow_values(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


# ---- cross-attention and caches


@spelling("layout", facts=Facts(cross=True), inputs=("x", "memory"))
def cross_attention(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v)


@spelling(
    "layout", facts=Facts(cross=True, mask="full+padding"), inputs=("x", "memory", "memory_keep"), fx=False
)
def cross_attention_padding(m: Attention, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE + (1.0 - keep[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return torch.softmax(scores, -1) @ v


@spelling("layout", facts=Facts(cross=True, mask="causal"), inputs=("x", "past_key", "past_value"))
def cached_keys_bottom_right(m: Attention, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    """Past keys in front: the mask is aligned at the last key."""
    k, v = torch.cat([pk, k], dim=2), torch.cat([pv, v], dim=2)
    t, s = q.shape[2], k.shape[2]
    i, j = torch.arange(t) + (s - t), torch.arange(s)
    scores = (q @ k.mT * SCALE).masked_fill(j[None, :] > i[:, None], float("-inf"))
    return torch.softmax(scores, -1) @ v


@spelling(
    "layout", facts=Facts(cross=True, mask="causal", top_left=True), inputs=("x", "past_key", "past_value")
)
def cached_keys_top_left(m: Attention, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor) -> Tensor:
    """The same with is_causal: legal, and something else."""
    return F.scaled_dot_product_attention(q, torch.cat([pk, k], 2), torch.cat([pv, v], 2), is_causal=True)


# ---- owners with several sites, or several calls


@spelling("layout", facts=Facts(sites=2, paths=("attn", "attn")), reference=False, fx=False)
class two_sites_one_owner(Packed):
    """DiffLlama: the difference of two attentions over the same values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(y, HEADS) for y in self.qkv(x).chunk(3, dim=-1))
        return self.proj(merge(attend(q, k, v) - 0.3 * attend(k, q, v)))


@spelling("layout", facts=Facts(sites=2, paths=("attn.shared", "attn.shared")), reference=False)
class shared_owner_called_twice(nn.Module):
    """ALBERT: one set of parameters, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = packed_chunk()

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.shared(x) + x)


@spelling("layout", facts=Facts(sites=2, paths=("attn.layers.0", "attn.layers.1")), reference=False)
class two_layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([packed_chunk(), packed_unbind()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@spelling("layout", facts=Facts(), reference=False, fx=False)
class softmax_in_a_child(Packed):
    """SqueezeBERT: the softmax is its own module; the owner is the module that holds both contractions."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(y, HEADS) for y in self.qkv(x).chunk(3, dim=-1))
        return self.proj(merge(self.dropout(self.softmax(q @ k.mT * SCALE)) @ v))
