"""The causal operator in plain PyTorch, group by group, with the state carried from one group to the next.

For each group of G tokens, all heads in one batched product (query heads that share a key/value head are
stacked as rows, so keys and values are never repeated):

    P   = [band over earlier values | band + local_scale * act(q k^T)]      band: convolution and bias by lag
    out = P [earlier v; v] + (alpha q) S                                    S: sum of k^T v, earlier groups
    S  += k^T v

The backward is one walk in reverse. There is no decay, so S_g = S_{g+1} - k_g^T v_g rebuilds each state from
the next; every `_ANCHOR` groups it starts again from a saved one, so that the rounding of the subtractions
does not grow with the length. Nothing of size [T, T] or [T / G, D, Dv] is allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .activations import ACTIVATIONS

_ANCHOR = 16
"""Groups between two saved states in the backward."""


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    *,
    local_bias: Tensor | None = None,
    state: Tensor | None = None,
    before: int = 0,
) -> Tensor:
    """query [B, H, T, D], key [B, Hkv, T, D], value [B, Hkv, before + T, Dv] -> [B, H, T, Dv] like value.

    alpha, local_scale [H]; conv_weight [H, K]; local_bias [H, G]; None leaves a part out. Query head h reads
    key/value head h // (H // Hkv). The first query starts a group; `state` [B, Hkv, D, Dv] sums k^T v over
    the groups before it, and the first `before` rows of value are the ones just before it.
    """
    walk = _Walk(query, key, value, alpha, local_scale, conv_weight, local_bias, group_size, before)
    act = ACTIVATIONS[activation].overwrite
    out = value.new_empty(*query.shape[:3], value.shape[3])
    total = walk.new_state(state)
    for start, size in walk.groups():
        q, _ = walk.rows(query, start, normalize)
        k, _ = walk.rows(key, start, normalize)
        v = walk.window(value, start)
        weights = None if walk.factor is None else act(torch.bmm(q, k.mT))
        weights = walk.weights(weights, size, v.shape[1] - size)
        x = None if weights is None else torch.bmm(weights, v)
        if walk.alpha is not None:
            q = q * walk.cut(walk.alpha, size)
            x = torch.bmm(q, total) if x is None else x.baddbmm_(q, total)
            total.baddbmm_(k.mT, v[:, -size:])
        place = out[:, :, start : start + size]
        place.zero_() if x is None else place.copy_(x.view(place.shape))
    return out


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    *,
    local_bias: Tensor | None = None,
    state: Tensor | None = None,
    before: int = 0,
) -> tuple[Tensor | None, ...]:
    """Gradients of `forward`'s query, key, value, alpha, local_scale, conv_weight, local_bias and state."""
    walk = _Walk(query, key, value, alpha, local_scale, conv_weight, local_bias, group_size, before)
    act = ACTIVATIONS[activation]
    dquery, dkey = query.new_empty(query.shape), key.new_empty(key.shape)
    dvalue = walk.zeros(value.shape[2], value.shape[3])
    rows = walk.repeats * group_size
    dalpha, dlocal = walk.zeros(rows, 1), walk.zeros(rows, 1)
    dband = walk.zeros(rows, walk.reach + group_size)
    dtotal = walk.new_state(None)
    saved = {} if alpha is None else _anchors(walk, key, value, state, normalize)
    total = dtotal

    for start, size in reversed(list(walk.groups())):
        q, q_norm = walk.rows(query, start, normalize)
        k, k_norm = walk.rows(key, start, normalize)
        v = walk.window(value, start)
        do, _ = walk.rows(grad, start, False)
        dq = dk = None
        end = before + start + size
        dweights = torch.bmm(do, v.mT) if walk.has_weights else None
        weights = None
        if walk.factor is not None and dweights is not None:
            weights = torch.bmm(q, k.mT)
            slope = act.derivative(weights)
            weights = act.overwrite(weights)
            visible = dweights[..., -size:] * walk.cut(walk.visible, size)[..., :size]
            walk.add(dlocal, (weights * visible).sum(-1, keepdim=True), size)
            ds = slope.mul_(visible).mul_(walk.cut(walk.scale, size))
            dq, dk = torch.bmm(ds, k), torch.bmm(ds.mT, q)
        weights = walk.weights(weights, size, v.shape[1] - size)
        if weights is not None:
            dvalue[:, end - v.shape[1] : end].baddbmm_(weights.mT, do)
        if walk.band is not None and dweights is not None:
            walk.add(dband[..., walk.reach + size - v.shape[1] : walk.reach + size], dweights, size)
        if walk.alpha is not None:
            scale = walk.cut(walk.alpha, size)
            total = saved.get(start + group_size, total)
            # A saved state is exact where one stands; an empty one would otherwise be rounding noise.
            total = saved[start] if start in saved else total.baddbmm(k.mT, v[:, -size:], alpha=-1)
            through = torch.bmm(do, total.mT)
            walk.add(dalpha, (through * q).sum(-1, keepdim=True), size)
            dq = through * scale if dq is None else dq.addcmul_(through, scale)
            seen = (v[:, -size:], dtotal.mT)
            dk = torch.bmm(*seen) if dk is None else dk.baddbmm_(*seen)
            dvalue[:, end - size : end].baddbmm_(k, dtotal)
            dtotal.baddbmm_((q * scale).mT, do)
        for out, x, unit, norm in ((dquery, dq, q, q_norm), (dkey, dk, k, k_norm)):
            place = out[:, :, start : start + size]
            place.zero_() if x is None else place.copy_(_through_norm(x, unit, norm).view(place.shape))

    band = walk.per_head(dband)
    return (
        dquery,
        dkey,
        dvalue.view(value.shape).to(value.dtype),
        None if alpha is None else walk.per_head(dalpha).sum((1, 2)).to(alpha.dtype),
        None if local_scale is None else walk.per_head(dlocal).sum((1, 2)).to(local_scale.dtype),
        None if conv_weight is None else _by_lag(band, walk.reach, conv_weight),
        None if local_bias is None else _by_lag(band[..., walk.reach :], 0, local_bias),
        None if state is None else dtotal.view(state.shape).to(state.dtype),
    )


class Walk(torch.autograd.Function):
    """`forward` and `backward` as one differentiable function; arguments as in `forward`, by position."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.tensors = [index for index, item in enumerate(args) if isinstance(item, Tensor)]
        ctx.args = [None if isinstance(item, Tensor) else item for item in args]
        ctx.save_for_backward(*(args[index] for index in ctx.tensors))
        *first, local_bias, state, before = args
        return forward(*first, local_bias=local_bias, state=state, before=before)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.args)
        for index, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[index] = tensor
        *first, local_bias, state, before = args
        grads = backward(grad, *first, local_bias=local_bias, state=state, before=before)
        return (*grads[:6], None, None, None, *grads[6:], None)


class _Walk:
    """The tables that all groups share, as rows [B * Hkv, R * G, ...], and the slices of one group."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: Tensor | None,
        local_scale: Tensor | None,
        conv_weight: Tensor | None,
        local_bias: Tensor | None,
        group_size: int,
        before: int,
    ) -> None:
        self.batch, self.heads, self.length, self.head_dim = query.shape
        self.kv_heads, self.value_dim = key.shape[1], value.shape[3]
        self.repeats, self.group, self.before = self.heads // self.kv_heads, group_size, before
        self.dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        self.device = value.device
        self.reach = 0 if conv_weight is None else conv_weight.shape[1] - 1
        self.alpha = None if alpha is None else self._table(alpha[:, None, None].expand(-1, group_size, 1))
        self.scale = self.visible = self.factor = self.band = None
        place = torch.arange(group_size, device=self.device)
        lag = place[:, None] - place
        if local_scale is not None:
            self.scale = self._table(local_scale[:, None, None].expand(-1, group_size, 1))
            self.visible = self._table((lag >= 0).expand(self.heads, -1, -1))
            self.factor = self.scale * self.visible
        if conv_weight is not None or local_bias is not None:
            lag = place[:, None] - torch.arange(-self.reach, group_size, device=self.device)
            band = torch.zeros(1, device=self.device)
            if conv_weight is not None:
                band = _at_lag(conv_weight, lag)
            if local_bias is not None:
                own = torch.arange(-self.reach, group_size, device=self.device) >= 0
                band = band + _at_lag(local_bias, lag) * own
            self.band = self._table(band)
            self._work = self.band.clone()
        self.has_weights = self.factor is not None or self.band is not None

    def _table(self, x: Tensor) -> Tensor:
        """[H, G, n] -> [B * Hkv, R * G, n]"""
        x = x.to(self.dtype).reshape(self.kv_heads, self.repeats * self.group, -1)
        return x.repeat(self.batch, 1, 1)

    def zeros(self, rows: int, columns: int) -> Tensor:
        return torch.zeros(self.batch * self.kv_heads, rows, columns, dtype=self.dtype, device=self.device)

    def new_state(self, state: Tensor | None) -> Tensor:
        if state is None:
            return self.zeros(self.head_dim, self.value_dim)
        return state.to(self.dtype).reshape(-1, *state.shape[2:]).clone()

    def groups(self) -> Iterator[tuple[int, int]]:
        """First token and number of tokens of each group."""
        for start in range(0, self.length, self.group):
            yield start, min(self.group, self.length - start)

    def rows(self, x: Tensor, start: int, normalize: bool) -> tuple[Tensor, Tensor | None]:
        """One group of x [B, n, T, D] as [B * Hkv, n / Hkv * size, D], and the norms it was divided by."""
        part = x[:, :, start : start + self.group].to(self.dtype)
        norm = None
        if normalize:
            norm = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
            part = part / norm.masked_fill_(norm == 0, 1)
            norm = norm.reshape(self.batch * self.kv_heads, -1, 1)
        return part.reshape(self.batch * self.kv_heads, -1, x.shape[3]), norm

    def window(self, value: Tensor, start: int) -> Tensor:
        """Values of one group after the earlier ones that its convolution reads: [B * Hkv, n, Dv]."""
        start += self.before
        part = value[:, :, max(0, start - self.reach) : start + self.group]
        return part.reshape(self.batch * self.kv_heads, -1, self.value_dim).to(self.dtype)

    def cut(self, table: Tensor | None, size: int) -> Tensor:
        """Rows of the first `size` tokens of a group."""
        assert table is not None
        if size == self.group:
            return table
        if self.repeats == 1:
            return table[:, :size]
        return table.unflatten(1, (self.repeats, self.group))[:, :, :size].flatten(1, 2)

    def add(self, table: Tensor, x: Tensor, size: int) -> None:
        """Add x to the rows that `cut` takes, in place."""
        split = (self.repeats, -1)
        table.unflatten(1, split)[:, :, :size].add_(x.unflatten(1, split))

    def weights(self, scores: Tensor | None, size: int, earlier: int) -> Tensor | None:
        """The matrix P of one group; `scores` (overwritten) are activated, `earlier` its columns before."""
        if self.band is None:
            return None if scores is None else scores.mul_(self.cut(self.factor, size)[..., :size])
        whole = size == self.group
        work = self._work if whole else self.cut(self._work, size)[..., : self.reach + size]
        if scores is not None:
            band = self.cut(self.band, size)[..., self.reach : self.reach + size]
            factor = self.cut(self.factor, size)[..., :size]
            torch.addcmul(band, scores, factor, out=work[..., self.reach :])
        return work[..., self.reach - earlier :]

    def per_head(self, table: Tensor) -> Tensor:
        """[B * Hkv, R * G, n] -> [H, G, n], summed over the batch."""
        return table.view(self.batch, self.heads, self.group, -1).sum(0)


def _anchors(
    walk: _Walk, key: Tensor, value: Tensor, state: Tensor | None, normalize: bool
) -> dict[int, Tensor]:
    """The state before token n, for n every `_ANCHOR` groups from 0 to the end (rounded up to a group)."""
    step = _ANCHOR * walk.group
    total = walk.new_state(state)
    saved = {0: total}
    for start in range(0, walk.length, step):
        k = key[:, :, start : start + step].to(walk.dtype)
        if normalize:
            norm = torch.linalg.vector_norm(k, dim=-1, keepdim=True)
            k = k / norm.masked_fill_(norm == 0, 1)
        v = value[:, :, walk.before + start : walk.before + start + step].to(walk.dtype)
        total = total + (k.mT @ v).flatten(0, 1)
        groups = -(-k.shape[2] // walk.group)
        saved[start + groups * walk.group] = total
    return saved


def _through_norm(grad: Tensor, unit: Tensor, norm: Tensor | None) -> Tensor:
    """The gradient of x, where unit = x / norm."""
    if norm is None:
        return grad
    return torch.addcmul(grad, unit, (grad * unit).sum(-1, keepdim=True), value=-1).div_(norm)


def _at_lag(weight: Tensor, lag: Tensor) -> Tensor:
    """weight [H, n] at lags of any shape: [H, ...], zero outside 0..n-1."""
    inside = (lag >= 0) & (lag < weight.shape[1])
    return weight[:, lag.clamp(0, weight.shape[1] - 1)] * inside


def _by_lag(band: Tensor, reach: int, like: Tensor) -> Tensor:
    """Adjoint of `_at_lag`: sums of band [H, G, reach + G] along its diagonals, in the shape of `like`."""
    place = torch.arange(band.shape[1], device=band.device)[:, None]
    column = place + reach - torch.arange(like.shape[1], device=band.device)
    picked = band.gather(2, column.clamp_min(0).expand(band.shape[0], -1, -1))
    return (picked * (column >= 0)).sum(1).to(like.dtype)
