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
from .saved import save, saved
from .tensors import are_finite, are_ordinary, at_lag, norm_or_one, product_of_seen, unit

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
    plain: bool | None = None,
) -> Tensor:
    """The causal operator on aligned, unpadded tokens, of which the first one starts a group.

    Args:
        query: [B, H, T, D]; query head h reads key/value head h // (H // Hkv).
        key: [B, Hkv, T, D].
        value: [B, Hkv, before + T, Dv].
        alpha, local_scale: [H]; None leaves the part out.
        conv_weight: [H, K]; None leaves the convolution out.
        activation: One of `activations.ACTIVATIONS`.
        group_size: G.
        normalize: Divide rows of query and key by their norms.
        local_bias: [H, G], added to the weights inside a group by lag; None: no bias.
        state: [B, Hkv, D, Dv], the sum of k^T v over the groups before the first query; None: none.
        before: Rows at the beginning of `value` that stand just before the first query.
        plain: What `is_plain` says of the call, where that is known.

    Returns:
        [B, H, T, Dv] in the dtype of `value`.
    """
    groups = _Groups(query, key, value, alpha, local_scale, conv_weight, local_bias, group_size, before)
    act = ACTIVATIONS[activation].overwrite
    out = value.new_empty(*query.shape[:3], value.shape[3])
    total = groups.new_state(state)
    if plain is None:
        plain = is_plain(query, key, value, normalize)
    for start, size in groups.each():
        q, _ = groups.rows(query, start, normalize)
        k, _ = groups.rows(key, start, normalize)
        v = groups.window(value, start)
        weights = None if groups.factor is None else act(torch.bmm(q, k.mT))
        if not plain and weights is not None:
            weights.masked_fill_(groups.cut(groups.visible, size)[..., :size] == 0, 0)
        weights = groups.weights(weights, size, v.shape[1] - size)
        if weights is None or plain:
            x = None if weights is None else torch.bmm(weights, v)
        else:
            x = product_of_seen(weights, v, groups.seen(size, v.shape[1] - size))
        if groups.alpha is not None:
            q = q * groups.cut(groups.alpha, size)
            x = torch.bmm(q, total) if x is None else x.baddbmm_(q, total)
            total.baddbmm_(k.mT, v[:, -size:])
        place = out[:, :, start : start + size]
        place.zero_() if x is None else place.copy_(x.view(place.shape))
    return out


def is_plain(query: Tensor, key: Tensor, value: Tensor, normalize: bool) -> bool:
    """Whether masks may multiply: 0 * NaN is NaN, and so is 0 times the square of a large score."""
    return are_finite(key, value) if normalize else are_ordinary(query, key, value, most=1e18)


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
    """The gradients of `forward`.

    Args:
        grad: [B, H, T, Dv], of its result.
        query, key, value, ...: Its arguments.

    Returns:
        Gradients of query, key, value, alpha, local_scale, conv_weight, local_bias and state, each in the
        dtype of its argument, None for one that is None.
    """
    groups = _Groups(query, key, value, alpha, local_scale, conv_weight, local_bias, group_size, before)
    found = _Gradients(groups, query, key, value, activation)
    anchors = {} if alpha is None else _anchors(groups, key, value, state, normalize)
    for start, size in reversed(list(groups.each())):
        do, _ = groups.rows(grad, start, False)
        found.add_group(do, query, key, value, start, size, normalize, anchors)
    band = groups.per_head(found.band)
    return (
        found.query,
        found.key,
        found.value.view(value.shape).to(value.dtype),
        None if alpha is None else groups.per_head(found.alpha).sum((1, 2)).to(alpha.dtype),
        None if local_scale is None else groups.per_head(found.local).sum((1, 2)).to(local_scale.dtype),
        None if conv_weight is None else _by_lag(band, groups.reach, conv_weight),
        None if local_bias is None else _by_lag(band[..., groups.reach :], 0, local_bias),
        None if state is None else found.total.view(state.shape).to(state.dtype),
    )


class Chunk(torch.autograd.Function):
    """`forward` and `backward` as one differentiable function; arguments as in `forward`, by position."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        save(ctx, args)
        *first, local_bias, state, before = args
        return forward(*first, local_bias=local_bias, state=state, before=before)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *first, local_bias, state, before = saved(ctx)
        grads = backward(grad, *first, local_bias=local_bias, state=state, before=before)
        return (*grads[:6], None, None, None, *grads[6:], None)


class _Groups:
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
                band = at_lag(conv_weight, lag)
            if local_bias is not None:
                own = torch.arange(-self.reach, group_size, device=self.device) >= 0
                band = band + at_lag(local_bias, lag) * own
            self.band = self._table(band)
            self._work = self.band.clone()
        self.has_bias = local_bias is not None
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

    def each(self) -> Iterator[tuple[int, int]]:
        """First token and number of tokens of each group."""
        for start in range(0, self.length, self.group):
            yield start, min(self.group, self.length - start)

    def rows(self, x: Tensor, start: int, normalize: bool) -> tuple[Tensor, Tensor | None]:
        """One group of x [B, n, T, D] as [B * Hkv, n / Hkv * size, D], and the norms it was divided by."""
        part = x[:, :, start : start + self.group].to(self.dtype)
        norm = None
        if normalize:
            norm = norm_or_one(part)
            part = part / norm
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

    def seen(self, size: int, earlier: int) -> Tensor:
        """Which values `weights` of the same arguments are of: bool [R * size, earlier + size]."""
        place = torch.arange(-earlier, size, device=self.device)
        lag = torch.arange(size, device=self.device)[:, None] - place
        seen = lag <= self.reach
        if self.factor is not None or self.has_bias:
            seen = seen | (place >= 0)
        seen = seen & (lag >= 0)
        return seen.repeat(self.repeats, 1)

    def per_head(self, table: Tensor) -> Tensor:
        """[B * Hkv, R * G, n] -> [H, G, n], summed over the batch."""
        return table.view(self.batch, self.heads, self.group, -1).sum(0)


class _Gradients:
    """The gradients of all arguments, filled group by group from the last to the first.

    total [B * Hkv, D, Dv]: the gradient of the state after the group at hand, and in the end of the first.
    """

    def __init__(self, groups: _Groups, query: Tensor, key: Tensor, value: Tensor, activation: str) -> None:
        self.groups, self.act = groups, ACTIVATIONS[activation]
        self.query, self.key = query.new_empty(query.shape), key.new_empty(key.shape)
        self.value = groups.zeros(value.shape[2], value.shape[3])
        rows = groups.repeats * groups.group
        self.alpha, self.local = groups.zeros(rows, 1), groups.zeros(rows, 1)
        self.band = groups.zeros(rows, groups.reach + groups.group)
        self.total = groups.new_state(None)
        self._before = self.total  # the state before the group that was added last

    def add_group(
        self,
        do: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: int,
        size: int,
        normalize: bool,
        anchors: dict[int, Tensor],
    ) -> None:
        """One group: do [B * Hkv, R * size, Dv] is the gradient of its outputs; anchors: see `_anchors`."""
        groups = self.groups
        q, q_norm = groups.rows(query, start, normalize)
        k, k_norm = groups.rows(key, start, normalize)
        v = groups.window(value, start)
        end = groups.before + start + size
        dq = dk = weights = None
        if groups.has_weights:
            dweights = torch.bmm(do, v.mT)
            if groups.factor is not None:
                weights, dq, dk = self._local(q, k, dweights, size)
            weights = groups.weights(weights, size, v.shape[1] - size)
            assert weights is not None
            self.value[:, end - v.shape[1] : end].baddbmm_(weights.mT, do)
            if groups.band is not None:
                lags = slice(groups.reach + size - v.shape[1], groups.reach + size)
                groups.add(self.band[..., lags], dweights, size)
        if groups.alpha is not None:
            v = v[:, -size:]
            self._before = anchors.get(start + groups.group, self._before)
            # A saved state is exact where one stands; an empty one would otherwise be rounding noise.
            before = anchors[start] if start in anchors else self._before.baddbmm(k.mT, v, alpha=-1)
            self._before = before
            dq, dk = self._earlier(do, q, k, v, dq, dk, size)
            self.value[:, end - size : end].baddbmm_(k, self.total)
            self.total.baddbmm_((q * groups.cut(groups.alpha, size)).mT, do)
        for out, x, rows, norm in ((self.query, dq, q, q_norm), (self.key, dk, k, k_norm)):
            place = out[:, :, start : start + size]
            place.zero_() if x is None else place.copy_(_through_norm(x, rows, norm).view(place.shape))

    def _local(self, q: Tensor, k: Tensor, dweights: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the part inside the group: its activated scores, and the gradients of q and k."""
        groups = self.groups
        weights = torch.bmm(q, k.mT)
        slope = self.act.derivative(weights)
        weights = self.act.overwrite(weights)
        visible = dweights[..., -size:] * groups.cut(groups.visible, size)[..., :size]
        groups.add(self.local, (weights * visible).sum(-1, keepdim=True), size)
        ds = slope.mul_(visible).mul_(groups.cut(groups.scale, size))
        return weights, torch.bmm(ds, k), torch.bmm(ds.mT, q)

    def _earlier(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor | None, dk: Tensor | None, size: int
    ) -> tuple[Tensor, Tensor]:
        """dq and dk with what comes through the state before the group, and goes into the one after it."""
        groups = self.groups
        scale = groups.cut(groups.alpha, size)
        through = torch.bmm(do, self._before.mT)
        groups.add(self.alpha, (through * q).sum(-1, keepdim=True), size)
        dq = through * scale if dq is None else dq.addcmul_(through, scale)
        dk = torch.bmm(v, self.total.mT) if dk is None else dk.baddbmm_(v, self.total.mT)
        return dq, dk


def _anchors(
    groups: _Groups, key: Tensor, value: Tensor, state: Tensor | None, normalize: bool
) -> dict[int, Tensor]:
    """The state before token n, for n every `_ANCHOR` groups from 0 to the end (rounded up to a group)."""
    step = _ANCHOR * groups.group
    total = groups.new_state(state)
    anchors = {0: total}
    for start in range(0, groups.length, step):
        k = key[:, :, start : start + step].to(groups.dtype)
        if normalize:
            k = unit(k)
        v = value[:, :, groups.before + start : groups.before + start + step].to(groups.dtype)
        total = total + (k.mT @ v).flatten(0, 1)
        whole = -(-k.shape[2] // groups.group)
        anchors[start + whole * groups.group] = total
    return anchors


def _through_norm(grad: Tensor, unit: Tensor, norm: Tensor | None) -> Tensor:
    """The gradient of x, where unit = x / norm."""
    if norm is None:
        return grad
    return torch.addcmul(grad, unit, (grad * unit).sum(-1, keepdim=True), value=-1).div_(norm)


def _by_lag(band: Tensor, reach: int, like: Tensor) -> Tensor:
    """Adjoint of `at_lag`: sums of band [H, G, reach + G] along its diagonals, in the shape of `like`."""
    place = torch.arange(band.shape[1], device=band.device)[:, None]
    column = place + reach - torch.arange(like.shape[1], device=band.device)
    picked = band.gather(2, column.clamp_min(0).expand(band.shape[0], -1, -1))
    return (picked * (column >= 0)).sum(1).to(like.dtype)
