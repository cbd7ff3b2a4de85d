"""Attention in two parts: nearby and first tokens weighed by their scores, all others by features.

    o[t] = (sum_{near j} w(scale q[t].k[j]) v[j] + c sum_{far j} f(A q[t]).f(B k[j]) v[j])
                                                                       over the sum of the weights w and c f.f
    near is t - window < j <= t (causal) or |t - j| < window (bidirectional), and the first `sinks` tokens
    far is all earlier j (causal) or all other j (bidirectional); with tail="none" nothing

Subclasses say what w, f and c are. Cross-attention has no near tokens and is refused.

A site with a window of its own that `window` covers sees exactly that, and neither sinks nor a tail: the
keyword `window` of the modules.

Parallel form: the window in blocks of as many queries, in O(T window) memory and without repeated heads
(`kernels/window_chunk.py`). The far part is one linear core call on keys and values delayed by `window`
tokens; without causality there is a second one on the reversed sequence. Each sum comes divided by its
weights, together with their `size`, in whichever scale does not overflow; the parts are joined by the share
that each has in all weights.
State: the last `window` keys and values (and as many more as can be taken back), the first ones, and
[2D, Dv + 1] per key/value head for the tokens that are in neither (`kernels/window_recurrent.py`). Fixed
weights c f.f that suit every length do not exist: a tail that starts heavy harms more, the longer the text,
so it starts at `FAR` of the weight of a token whose features say nothing, and calibration or training finds
the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..common.checks import require_true
from ..kernels import window_recurrent
from ..kernels.padding import Ranks
from ..kernels.tensors import (
    are_ordinary,
    as_autocast,
    full_precision,
    per_kv_head,
    take_rows,
    widen,
    with_one,
)
from ..ops.arguments import check_no_gradients, check_state
from ..ops.attention import Lineage, checked_path, lineage
from ..ops.state import Part, States, WindowState
from .base import choice, whole
from .composed import ComposedAttention, Term
from .hedgehog import set_identity, square
from .spec import SiteSpec

if TYPE_CHECKING:
    from .base import Settings


FAR = 1 / 1024
"""What a far token weighs at first, whose features say nothing of it, where a score of 0 weighs 1."""

OPTIONS = {
    "sinks": whole(4, "first tokens of the sequence that are seen as the near ones are, for ever", 0),
    "tail": choice("linear", "what is seen of all other tokens", ("linear", "none")),
}
"""Options of all mechanisms of this kind, beside `window`."""

_HOLES = (
    "the attention mask hides tokens between others, in a sequence longer than the attention's own window; "
    "this window can be followed with padding on the sides only: move the hidden tokens there, or use "
    "mechanism='softmax'"
)


def reach(spec: SiteSpec, window: int) -> int:
    """The widest window of a site, as `SiteSpec.window` counts it, that the option `window` covers."""
    return window if spec.causal else window - 1


class WindowedAttention(ComposedAttention):
    """Subclasses give `near`, `weigh`, `joint_size`, `features` and `far_share`, and `far_weight_at_first`.

    window: exactly this, and nothing else, is seen (as `near` counts); None for what the options say.
    """

    multiplies_padding = True

    def __init__(self, spec: SiteSpec, config: Settings, window: int | None = None) -> None:
        super().__init__(spec, config)
        self.keeps_window = alone = window is not None
        self.window: int = config.option("window") if window is None else window
        self.sinks: int = 0 if alone else config.option("sinks")
        self.query_map: nn.Parameter | None = None
        self.key_map: nn.Parameter | None = None
        self.far_weight: nn.Parameter | None = None
        if not alone and config.option("tail") == "linear":
            self.query_map = square(spec.num_heads, spec.head_dim)
            self.key_map = square(spec.num_key_value_heads, spec.head_dim)
            self.far_weight = nn.Parameter(torch.empty(spec.num_heads))
        self.reset_parameters()

    def check_key_mask(self, key_mask: Tensor) -> None:
        """A window counts real tokens. That of a site counts columns, which is another thing where a token
        between real ones is hidden, and they reach further than the window."""
        if not self.keeps_window or statically_known_true(key_mask.shape[1] <= self.window):
            return
        columns = torch.arange(1, key_mask.shape[1] + 1, device=key_mask.device)
        last = (columns * key_mask).amax(1)
        first = (columns.flip(0) * key_mask).amax(1)  # counted from the end
        span = last + first - key_mask.shape[1]
        require_true(((span <= self.window) | (span == key_mask.sum(1)) | (last == 0)).all(), _HOLES)

    @property
    def has_tail(self) -> bool:
        """Whether far tokens are seen at all."""
        return self.far_weight is not None

    @property
    def far_weight_at_first(self) -> float:
        """b with which a far token weighs `FAR`."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.query_map is not None and self.key_map is not None and self.far_weight is not None:
            set_identity(self.query_map, self.key_map)
            with torch.no_grad():
                self.far_weight.fill_(self.far_weight_at_first)

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

    def joint_size(self, size: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The size of two sums of weights together, and the share that the other has in it, of the sizes
        [..., 1] of both."""
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
        before: window_recurrent.State | None = None,
    ) -> Tensor:
        """before: the state of which the key columns before the queries are the window."""
        if key_mask is not None and before is None:
            self.check_key_mask(key_mask)
        query, key, value = widen(query), widen(key), widen(value)
        if not are_ordinary(query, key, value):  # scores leave float32
            query, key, value = query.double(), key.double(), value.double()
        rows = self.split_heads(query * self.scale)
        joined = self.near(rows, key, value, key_mask, query_start)
        near, size = joined[..., :-1], joined[..., -1:]
        if before is None and statically_known_true(key.shape[2] <= self.window):
            return self.merge_heads(near)
        if self.sinks:
            near, size = self._with_first(near, size, rows, key, value, key_mask, query_start, before)
        near, size = self.merge_heads(near), self.merge_heads(size)
        if self.query_map is None or self.key_map is None:
            return near
        query, key = self.features(query, self.query_map), self.features(key, self.key_map)
        value = with_one(value) * self._may_be_far(key, key_mask, before)
        far = self._far(query, key, value, key_mask, query_start)
        if before is not None:
            recurrent = before.recurrent.to(query.dtype)
            far = far + self.merge_heads(per_kv_head(self.split_heads(query), recurrent))
        return self._join(near, size, far)

    def _may_be_far(
        self, key: Tensor, key_mask: Tensor | None, before: window_recurrent.State | None
    ) -> Tensor | float:
        """1 for keys that are not among the first tokens, [B, 1, S, 1] or [S, 1]."""
        if not self.sinks:
            return 1.0
        if key_mask is None:
            return (torch.arange(key.shape[2], device=key.device) >= self.sinks)[:, None]
        position = key_mask.cumsum(1) - 1 + (0 if before is None else before.folded[:, None])
        return (position >= self.sinks)[:, None, :, None]

    def _with_first(
        self,
        near: Tensor,
        size: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
        before: window_recurrent.State | None,
    ) -> tuple[Tensor, Tensor]:
        """`near` and its size [B, Hkv, R, T, ...] of scaled queries [B, Hkv, R, T, D], with the first tokens
        added where these are outside the window."""
        start = query_start
        if start is None:
            start = key.shape[2] - query.shape[3] if self.spec.causal else 0
        column = torch.arange(query.shape[3], device=query.device) + start
        first = torch.arange(self.sinks, device=query.device)
        held = first.clamp(max=key.shape[2] - 1)  # as many rows, whatever the length
        if key_mask is None:
            position, there = column[None], (first < key.shape[2])[None]
            first_keys, first_values = take_rows(key, held), take_rows(value, held)
        else:
            position = (key_mask.cumsum(1) - 1).index_select(1, column)
            there = first < key_mask.sum(1, keepdim=True)
            front = torch.argsort(~key_mask, dim=1, stable=True).index_select(1, held)
            first_keys, first_values = take_rows(key, front), take_rows(value, front)
        if before is not None:
            position, there = position + before.folded[:, None], torch.ones_like(there)
            first_keys, first_values = before.first_keys.to(key.dtype), before.first_values.to(key.dtype)
        lag = position[:, :, None] - first
        outside = (lag if self.spec.causal else lag.abs()) >= self.window
        outside = (outside & there[:, None])[:, None, None]  # [B, 1, 1, T, sinks]
        # What lies in rows that no query sees may be anything.
        seen = outside.any(3)[:, 0, :, :, None]
        first_keys, first_values = (x.masked_fill(~seen, 0) for x in (first_keys, first_values))
        weights, other = self.weigh(per_kv_head(query, first_keys.mT), ~outside)
        some = outside.any(-1, keepdim=True)
        joint, share = self.joint_size(size, other)
        share = torch.where(some, share, torch.zeros_like(share))
        # Not near + 0 * NaN where no first token is seen.
        found = torch.where(some, near + share * (per_kv_head(weights, first_values) - near), near)
        if key_mask is not None:
            found = found * key_mask.index_select(1, column)[:, None, None, :, None]
        return found, torch.where(some, joint, size)

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
        part = WindowState.of_window(
            batch,
            spec.num_key_value_heads,
            spec.head_dim,
            spec.value_dim,
            window=self.window,
            sinks=self.sinks,
            features=2 * spec.head_dim if self.has_tail else 0,
            max_rewind=max_rewind,
            dtype=dtype,
            device=device,
        )
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
        assert isinstance(part, WindowState)
        check_state(query, key, value, None, part, key_mask)
        check_no_gradients(*(x for x in (self.query_map, self.key_map, self.far_weight) if x is not None))
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
                if self.sinks:
                    self._keep_first(key, value, key_mask, state)
                out = self.mix(query, *columns, before=state)
            window_recurrent.append(key, value, state, rules, key_mask)
        return out if key_mask is None else out * real

    def _keep_first(
        self, key: Tensor, value: Tensor, real: Tensor | None, state: window_recurrent.State
    ) -> None:
        """Write the first tokens of their sequences, which queries of the same call may see."""
        if real is not None:
            ranks = Ranks(real)
            key, value, count = ranks.to_front(key), ranks.to_front(value), ranks.count
        else:
            count = torch.full_like(state.length, key.shape[2])
        window_recurrent.write_first(key, value, state, count)

    @property
    def _rules(self) -> window_recurrent.Rules:
        def scoring(query: Tensor) -> Tensor:
            return self.split_heads(query * self.scale)

        query_map, key_map = self.query_map, self.key_map
        if query_map is None or key_map is None:
            nothing = lambda key: key[..., :0]  # noqa: E731
            return window_recurrent.Rules(self.window, self.weigh, scoring, None, nothing)
        return window_recurrent.Rules(
            self.window,
            self.weigh,
            scoring,
            lambda query: self.split_heads(self.features(query, query_map)),
            lambda key: self.features(key, key_map),
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
        assert isinstance(part, WindowState)
        check_state(key, key, value, None, part, None)
        check_no_gradients(*(() if self.key_map is None else (self.key_map,)))
        path = None if path is None else checked_path(path, key)
        query, key, value = as_autocast(query, key, value)
        with full_precision(value.device):
            window_recurrent.append_along(path, key, value, part.tensors, self._rules)
        super().commit(query, key, value, States(tuple(convolution)), path)

    def extra_repr(self) -> str:
        tail = "linear" if self.has_tail else "none"
        return f"{super().extra_repr()}, window={self.window}, sinks={self.sinks}, tail={tail}"
