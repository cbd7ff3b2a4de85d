"""Attention in two parts: nearby tokens weighed by their scores, all others by features, one normaliser.

    o[t] = (sum_{near j} w(scale q[t].k[j]) v[j] + c sum_{far j} f(A q[t]).f(B k[j]) v[j])
                                                                       over the sum of the weights w and c f.f
    causal:         near is t - window < j <= t, far is j <= t - window
    bidirectional:  near is |t - j| < window,    far is all other j

Subclasses say what w, f and c are. Cross-attention has no near tokens and is refused.

Parallel form: near in blocks of `window` queries, O(T window) memory, heads not repeated (`window.py`); the
far part is one linear core call on keys and values delayed by `window` tokens (without causality a second one
on the reversed sequence). The near sum comes divided by its weights and with their `size`, in whichever scale
does not overflow; the two parts are joined by the far part's share of all weights.
State: the last `window` keys and values (and as many more as can be taken back), and [2D, Dv + 1] per
key/value head for the tokens that left them. A token leaves only when its row is needed, which makes taking
tokens back exact; until then its features are made from its row where it is far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..kernels.padding import Ranks
from ..kernels.recurrent import State, along
from ..ops.arguments import check_no_gradients, check_state
from ..ops.attention import Lineage, checked_path, lineage
from ..ops.state import AttentionState, States
from .composed import ComposedAttention, Term, full_precision, widen, with_one
from .hedgehog import set_identity, square
from .spec import SiteSpec

if TYPE_CHECKING:
    from .base import Settings


class WindowedAttention(ComposedAttention):
    """Subclasses give `near`, `weigh`, `features` and `far_share`, and extend `reset_parameters` by
    `far_weight`."""

    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        self.window: int = config.option("window")
        self.query_map = square(spec.num_heads, spec.head_dim)
        self.key_map = square(spec.num_key_value_heads, spec.head_dim)
        self.far_weight = nn.Parameter(torch.empty(spec.num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        set_identity(self.query_map, self.key_map)

    def near(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        """Of scaled queries [B, Hkv, R, T, D] over the window: [B, Hkv, R, T, Dv + 1], the last the size."""
        raise NotImplementedError

    def weigh(self, scores: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [..., S] of scores [..., S], divided by their sum, and the size [..., 1] of that sum.

        hidden: bool, True for keys that weigh nothing. As in `near`.
        """
        raise NotImplementedError

    def features(self, x: Tensor, weight: Tensor) -> Tensor:
        """f: x [B, heads, L, D], A or B [heads, D, D] -> positive [B, heads, L, 2D]."""
        raise NotImplementedError

    def far_share(self, total: Tensor, size: Tensor) -> Tensor:
        """Share of the far part in all weights: its sum [B, H, T, 1], positive and not yet times c; the
        near part's size [B, H, T, 1]."""
        raise NotImplementedError

    def terms(self, query: Tensor, key: Tensor, value: Tensor) -> list[Term]:
        """None: `mix` is no sum of core calls."""
        return []

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
        before: Tensor | None = None,
    ) -> Tensor:
        """before: sums [B, Hkv, 2D, Dv + 1] over far tokens that are not among the keys."""
        query, key, value = widen(query), widen(key), widen(value)
        rows = self.split_heads(query * self.scale)
        joined = self.merge_heads(self.near(rows, key, value, key_mask, query_start))
        near, size = joined[..., :-1], joined[..., -1:]
        if statically_known_true(key.shape[2] <= self.window):
            return near
        query, key = self.features(query, self.query_map), self.features(key, self.key_map)
        far = self._far(query, key, with_one(value), key_mask, query_start)
        if before is not None:
            far = far + self.merge_heads(_per_kv_head(self.split_heads(query), before))
        return self._join(near, size, far)

    def _join(self, near: Tensor, size: Tensor, far: Tensor) -> Tensor:
        """near [B, H, T, Dv], divided by its weights, whose size is [B, H, T, 1]; far [B, H, T, Dv + 1],
        sums."""
        total = far[..., -1:]
        some = total > 0
        total = torch.where(some, total, torch.ones_like(total))
        share = torch.where(some, self.far_share(total, size), torch.zeros_like(total))
        return near + share * (far[..., :-1] / total - near)

    def _far(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        """Sums of weights times value over the tokens outside the window: [B, H, T, Dv + 1]."""
        past = self._delayed(query, key, value, key_mask, query_start)
        if self.spec.causal:
            return past
        flipped = [None if key_mask is None else key_mask.flip(1), None]
        future = self._delayed(query.flip(2), key.flip(2), value.flip(2), *flipped)
        return past + future.flip(2)

    def _delayed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        """sum q.k v over the keys at least `window` real tokens before each query."""
        if key_mask is None:
            key, value = (F.pad(x, (0, 0, self.window, 0))[:, :, : x.shape[2]] for x in (key, value))
        else:
            rank = key_mask.cumsum(1) - 1
            source = torch.argsort(~key_mask, dim=1, stable=True).gather(1, (rank - self.window).clamp(min=0))
            there = (rank >= self.window)[:, None, :, None]
            key, value = _rows(key, source) * there, _rows(value, source)
        term = Term(query, key, value, alpha=1.0, local_scale=1.0)
        return self.run(term, key_mask, query_start, causal=True)

    def new_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device, max_rewind: int = 0
    ) -> States | None:
        convolution = super().new_state(batch, dtype=dtype, device=device, max_rewind=max_rewind)
        if convolution is None:
            return None
        spec = self.spec
        part = AttentionState.new(
            batch,
            spec.num_key_value_heads,
            spec.head_dim,
            spec.value_dim,
            group_size=1,
            taps=self.window,
            max_rewind=max_rewind,
            dtype=dtype,
            device=device,
        )
        sums = part.recurrent.new_zeros(*part.recurrent.shape[:2], 2 * spec.head_dim, spec.value_dim + 1)
        part = replace(part, tensors=part.tensors._replace(recurrent=sums))
        return States((part, *convolution.parts))

    def mix_after(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        parts: Sequence[AttentionState],
        key_mask: Tensor | None,
        parents: Tensor | Lineage | None,
    ) -> Tensor:
        (part,) = parts
        check_state(query, key, value, None, part, key_mask)
        check_no_gradients(self.query_map, self.key_map, self.far_weight)
        batch, _, count, _ = query.shape
        if parents is not None:
            tree = lineage(parents, batch, count, query.device)
            even = _even(part.tensors, self.window)
            if even is not None:
                return self._even_tree(query, key, value, part.tensors, *tree, *even)
            return self._tree(query, key, value, part.tensors, *tree)
        if key_mask is not None:  # whatever padding holds, NaN included
            real = key_mask[:, None, :, None]
            query, key, value = (x.masked_fill(~real, 0) for x in (query, key, value))
        if count == 1 and key_mask is None and (even := _even(part.tensors, self.window)):
            return self._step(query, key, value, part.tensors, *even)
        if count == 1:
            alone = torch.ones(batch, 1, 1, dtype=torch.bool, device=query.device)
            out = self._tree(query, key, value, part.tensors, torch.zeros_like(part.length)[:, None], alone)
        elif not torch.compiler.is_compiling() and bool((part.length == 0).all()):
            # Most prompts: about two thirds of the time (measured). A compiled graph cannot ask.
            out = self.mix(query, key, value, key_mask, None)
        else:
            out = self._columns(query, key, value, part.tensors, key_mask)
        self._append(key, value, part.tensors, key_mask)
        return out if key_mask is None else out * real

    def commit(self, key: Tensor, value: Tensor, state: States, path: Tensor | None = None) -> None:
        part, *convolution = state.parts
        check_state(key, key, value, None, part, None)
        check_no_gradients(self.key_map)
        path = None if path is None else checked_path(path, key)
        if path is not None and path.is_cpu and len(path) == 1:
            nodes = path[0, path[0] >= 0]
            new_key, new_value, real = key.index_select(2, nodes), value.index_select(2, nodes), None
        else:
            new_key, new_value, real = along(path, key, value)
        with full_precision(value.device):
            self._append(new_key, new_value, part.tensors, real)
        super().commit(key, value, States(tuple(convolution)), path)

    def _step(
        self, query: Tensor, key: Tensor, value: Tensor, state: State, length: int, folded: int
    ) -> Tensor:
        """One token after sequences of one length, where no mask is needed: a quarter of `_tree`'s time."""
        slot = length % self.window
        place = slice(slot, slot + 1)
        if length - folded == self.window:
            features = self.features(widen(state.key_window[:, :, place]), self.key_map)
            state.recurrent.add_(features.mT @ with_one(widen(state.value_window[:, :, place])))
            state.folded.add_(1)
        state.key_window[:, :, place] = key
        state.value_window[:, :, place] = value
        state.length.add_(1)
        keys, values = (widen(x[:, :, : length + 1]) for x in (state.key_window, state.value_window))
        query = widen(query)
        scores = _per_kv_head(self.split_heads(query * self.scale), keys.mT)
        weights, size = self.weigh(scores)
        near = self.merge_heads(_per_kv_head(weights, values))
        if length < self.window:
            return near
        query = self.split_heads(self.features(query, self.query_map))
        far = self.merge_heads(_per_kv_head(query, state.recurrent))
        return self._join(near, self.merge_heads(size), far)

    def _columns(
        self, query: Tensor, key: Tensor, value: Tensor, state: State, key_mask: Tensor | None
    ) -> Tensor:
        """Many tokens after the state: the parallel form, with the window's rows as columns ahead of them."""
        rows = state.key_window.shape[2]
        position = state.length[:, None] + torch.arange(-rows, 0, device=key.device)
        new = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool) if key_mask is None else key_mask
        real = torch.cat([position >= state.folded[:, None], new], 1)
        key, value = (
            torch.cat([_rows(ring, position % rows).to(x.dtype), x], 2)
            for ring, x in ((state.key_window, key), (state.value_window, value))
        )
        return self.mix(query, key, value, real, rows, before=state.recurrent)

    def _tree(
        self, query: Tensor, key: Tensor, value: Tensor, state: State, depth: Tensor, ancestors: Tensor
    ) -> Tensor:
        """Drafts after the state, which is only read; depth [B, N], ancestors [B, N, N] as in `lineage`."""
        rows, count = state.key_window.shape[2], key.shape[2]
        query, key, value = widen(query), widen(key), widen(value)
        last = state.length[:, None] - 1
        held = last - (last - torch.arange(rows, device=key.device)) % rows  # position in each row
        node = state.length[:, None] + depth

        def seen(committed: Tensor, there: Tensor, near: bool) -> Tensor:
            """bool [B, 1, 1, N, n + N]: `there` of the tokens at `committed` [B, n], and the ancestors."""
            lag = node[:, :, None] - torch.cat([committed, node], 1)[:, None]
            all_ = torch.cat([there[:, None].expand(-1, count, -1), ancestors], 2)
            return (all_ & ((lag < self.window) == near))[:, None, None]

        keys, values = (
            torch.cat([ring.to(x.dtype), x], 2)
            for ring, x in ((state.key_window, key), (state.value_window, value))
        )
        scores = _per_kv_head(self.split_heads(query * self.scale), keys.mT)
        weights, size = self.weigh(scores, ~seen(held, held >= 0, True))
        near = self.merge_heads(_per_kv_head(weights, values))

        # Of the window's rows only the oldest are far, one more for each token that a branch is long.
        oldest = torch.arange(min(rows, rows - self.window + count), device=key.device)
        position = state.folded[:, None] + oldest
        far_keys, far_values = (
            torch.cat([_rows(ring, position % rows).to(x.dtype), x], 2)
            for ring, x in ((state.key_window, key), (state.value_window, value))
        )
        query = self.split_heads(self.features(query, self.query_map))
        weights = _per_kv_head(query, self.features(far_keys, self.key_map).mT)
        weights = weights * seen(position, position < state.length[:, None], False)
        far = _per_kv_head(weights, with_one(far_values)) + _per_kv_head(query, state.recurrent)
        return self._join(near, self.merge_heads(size), self.merge_heads(far))

    def _even_tree(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: State,
        depth: Tensor,
        ancestors: Tensor,
        length: int,
        folded: int,
    ) -> Tensor:
        """`_tree` after sequences of one length: half of its operations."""
        query, key, value = widen(query), widen(key), widen(value)
        ring_keys, ring_values = (widen(x[:, :, :length]) for x in (state.key_window, state.value_window))
        deepest = int(depth.max())
        age = (length - 1 - torch.arange(ring_keys.shape[2], device=key.device)) % self.window + 1
        beyond = age + depth[:, :, None] >= self.window
        hidden = ~ancestors
        if deepest >= self.window:
            hidden = hidden | (depth[:, :, None] - depth[:, None] >= self.window)
        hidden = torch.cat([beyond, hidden], 2)[:, None, None]
        rows = self.split_heads(query * self.scale)
        weights, size = self.weigh(_per_kv_head(rows, torch.cat([ring_keys, key], 2).mT), hidden)
        near = self.merge_heads(_per_kv_head(weights, torch.cat([ring_values, value], 2)))
        oldest = length + deepest + 1 - self.window - folded  # rows that are far from the deepest node
        if oldest <= 0 and not folded:
            return near
        query = self.split_heads(self.features(query, self.query_map))
        far = _per_kv_head(query, state.recurrent)
        if oldest > 0:
            place = (torch.arange(min(oldest, length - folded), device=key.device) + folded) % self.window
            keys, values = ring_keys.index_select(2, place), ring_values.index_select(2, place)
            outside = beyond.index_select(2, place)
            if deepest >= self.window:
                keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
                lag = depth[:, :, None] - depth[:, None]
                outside = torch.cat([outside, ancestors & (lag >= self.window)], 2)
            weights = _per_kv_head(query, self.features(keys, self.key_map).mT) * outside[:, None, None]
            far = far + _per_kv_head(weights, with_one(values))
        return self._join(near, self.merge_heads(size), self.merge_heads(far))

    def _append(self, key: Tensor, value: Tensor, state: State, real: Tensor | None) -> None:
        """Write tokens into the state, and what its window cannot hold any more into its sums."""
        even = _even(state, self.window) if real is None and key.shape[2] <= self.window else None
        if even is not None:
            return self._even_append(key, value, state, *even)
        ranks = None if real is None else Ranks(real)
        if ranks is not None:
            key, value = ranks.to_front(key), ranks.to_front(value)
        new, rows = key.shape[2], state.key_window.shape[2]
        count = torch.full_like(state.length, new) if ranks is None else ranks.count
        end = state.length + count
        folded = torch.maximum(state.folded, end - rows)

        oldest = state.folded[:, None] + torch.arange(min(new, rows), device=key.device)
        leaving = [
            (
                _rows(state.key_window, oldest % rows),
                _rows(state.value_window, oldest % rows),
                oldest < torch.minimum(folded, state.length)[:, None],
            )
        ]
        if new > rows:  # the first of the new tokens never see the window
            first = state.length[:, None] + torch.arange(new - rows, device=key.device)
            leaving.append((key[:, :, :-rows], value[:, :, :-rows], first < folded[:, None]))
        for k, v, leaves in leaving:
            features = self.features(widen(k), self.key_map) * leaves[:, None, :, None]
            state.recurrent.add_(features.mT @ with_one(widen(v)))

        # As many tokens as lie in different rows: the last ones, of which those before `length` are there.
        position = end[:, None] + torch.arange(-min(new, rows), 0, device=key.device)
        source = position - state.length[:, None]
        for ring, x in ((state.key_window, key), (state.value_window, value)):
            written = torch.where(
                (source >= 0)[:, None, :, None],
                _rows(x, source.clamp_min(0)).to(ring.dtype),
                _rows(ring, position % rows),
            )
            index = (position % rows)[:, None, :, None].expand_as(written)
            ring.scatter_(2, index, written)
        state.length.copy_(end)
        state.folded.copy_(folded)

    def _even_append(self, key: Tensor, value: Tensor, state: State, length: int, folded: int) -> None:
        """`_append` of no more tokens than the window holds, after sequences of one length."""
        leaving = max(0, length + key.shape[2] - self.window - folded)
        if leaving:
            place = (torch.arange(leaving, device=key.device) + folded) % self.window
            features = self.features(widen(state.key_window.index_select(2, place)), self.key_map)
            state.recurrent.add_(features.mT @ with_one(widen(state.value_window.index_select(2, place))))
            state.folded.add_(leaving)
        place = (torch.arange(key.shape[2], device=key.device) + length) % self.window
        state.key_window.index_copy_(2, place, key.to(state.key_window.dtype))
        state.value_window.index_copy_(2, place, value.to(state.value_window.dtype))
        state.length.add_(key.shape[2])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}"


def _even(state: State, window: int) -> tuple[int, int] | None:
    """Length and folded of every sequence, where these are the same and the window has no row to spare.

    None on other devices than the CPU and in compiled graphs, which cannot ask, or only by waiting.
    """
    if torch.compiler.is_compiling() or not state.length.is_cpu or state.key_window.shape[2] != window:
        return None
    found = set(zip(state.length.tolist(), state.folded.tolist(), strict=True))
    length, folded = found.pop()
    # Taken back after tokens left the window, a sequence has rows that hold nothing.
    full = length - folded >= window - 1
    return (length, folded) if not found and (full or folded == 0) else None


def _per_kv_head(x: Tensor, matrix: Tensor) -> Tensor:
    """x [B, Hkv, R, T, m] @ matrix [B, Hkv, m, n], which is not repeated -> [B, Hkv, R, T, n]."""
    return (x.flatten(2, 3) @ matrix).unflatten(2, x.shape[2:4])


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, n] of x [B, heads, L, D]."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
