"""Attention in two parts: nearby tokens weighed by their scores, all others by features, one normaliser.

    o[t] = (sum_{near j} w(scale q[t].k[j]) v[j] + c sum_{far j} f(A q[t]).f(B k[j]) v[j])
                                                                       over the sum of the weights w and c f.f
    causal:         near is t - window < j <= t, far is j <= t - window
    bidirectional:  near is |t - j| < window,    far is all other j

Subclasses say what w, f and c are. Cross-attention has no near tokens and is refused.

Parallel form: near in blocks of `window` queries, in O(T window) memory and without repeated heads
(`kernels/window_chunk.py`). The far part is one linear core call on keys and values delayed by `window`
tokens; without causality there is a second one on the reversed sequence. The near sum comes divided by its
weights, together with their `size`, in whichever scale does not overflow; the two parts are joined by the far
part's share of all weights.
State: the last `window` keys and values (and as many more as can be taken back), and [2D, Dv + 1] per
key/value head for the tokens that left them (`kernels/window_recurrent.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..kernels import window_recurrent
from ..kernels.tensors import full_precision, per_kv_head, take_rows, widen, with_one
from ..ops.arguments import check_no_gradients, check_state
from ..ops.attention import Lineage, checked_path, lineage
from ..ops.state import AttentionState, Part, States
from .composed import ComposedAttention, Term
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

    def weigh(self, scores: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
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
            far = far + self.merge_heads(per_kv_head(self.split_heads(query), before))
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
            key, value = take_rows(key, source) * there, take_rows(value, source)
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
        parts: Sequence[Part],
        key_mask: Tensor | None,
        parents: Tensor | Lineage | None,
    ) -> Tensor:
        (part,) = parts
        assert isinstance(part, AttentionState)
        check_state(query, key, value, None, part, key_mask)
        check_no_gradients(self.query_map, self.key_map, self.far_weight)
        batch, _, count, _ = query.shape
        state, rules = part.tensors, self._rules
        if parents is not None:
            tree = lineage(parents, batch, count, query.device)
            return self._joined(window_recurrent.tree(query, key, value, state, rules, *tree))
        if key_mask is not None:  # whatever padding holds, NaN included
            real = key_mask[:, None, :, None]
            query, key, value = (x.masked_fill(~real, 0) for x in (query, key, value))
        if count == 1:
            out = self._joined(window_recurrent.step(query, key, value, state, rules, key_mask))
        else:
            if not torch.compiler.is_compiling() and bool((part.length == 0).all()):
                # Most prompts: about two thirds of the time (measured). A compiled graph cannot ask.
                out = self.mix(query, key, value, key_mask, None)
            else:
                columns = window_recurrent.after_window(key, value, state, key_mask)
                out = self.mix(query, *columns, before=state.recurrent)
            window_recurrent.append(key, value, state, rules, key_mask)
        return out if key_mask is None else out * real

    @property
    def _rules(self) -> window_recurrent.Rules:
        return window_recurrent.Rules(
            self.window,
            self.weigh,
            lambda query: self.split_heads(query * self.scale),
            lambda query: self.split_heads(self.features(query, self.query_map)),
            lambda key: self.features(key, self.key_map),
        )

    def _joined(self, parts: window_recurrent.Parts) -> Tensor:
        near = self.merge_heads(parts.near)
        if parts.far is None:
            return near
        return self._join(near, self.merge_heads(parts.size), self.merge_heads(parts.far))

    def commit(
        self, query: Tensor, key: Tensor, value: Tensor, state: States, path: Tensor | None = None
    ) -> None:
        part, *convolution = state.parts
        assert isinstance(part, AttentionState)
        check_state(key, key, value, None, part, None)
        check_no_gradients(self.key_map)
        path = None if path is None else checked_path(path, key)
        with full_precision(value.device):
            window_recurrent.append_along(path, key, value, part.tensors, self._rules)
        super().commit(query, key, value, States(tuple(convolution)), path)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}"
