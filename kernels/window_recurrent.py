"""A window of exact tokens and sums over all others, after a state of constant size: steps, trees, appending.

The window is that of `recurrent.py` with groups of one token: it holds the last tokens as they came, and
`recurrent` sums f(k)^T [v | 1] over the tokens that left it, for a feature map f. A token leaves only when
its row is needed, which makes taking tokens back exact; until then its features are made from its row where
it is far. The first S tokens of a sequence are kept beside it, in rows of their own: outside the window they
are seen by their scores, as the near ones are, and they are in no sum.

Outputs come in two parts, for the caller to join: the tokens seen by their scores, and the far ones, weighed
by features. `Rules` says what these weights are.

On a CPU most calls follow sequences of one length whose window has no row to spare. For these there are twins
of `step`, `tree` and `append` that need no mask and no gather: a quarter to a half of the time (measured).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .padding import Ranks
from .recurrent import State as Ring
from .recurrent import along, commit
from .softmax import product
from .tensors import are_finite, per_kv_head, take_rows, widen, with_one
from .window_chunk import Weigh


class State(NamedTuple):
    """Those of `recurrent.State`, and the first tokens; functions here change them in place.

    first_keys [B, Hkv, S, D], first_values [B, Hkv, S, Dv]: position p in row p, as it came; what lies in the
    rows from `length` on counts for nothing. recurrent: [B, Hkv, F, Dv + 1] float32, or of no features.
    """

    recurrent: Tensor
    key_window: Tensor
    value_window: Tensor
    length: Tensor
    folded: Tensor
    first_keys: Tensor
    first_values: Tensor

    @property
    def sinks(self) -> int:
        return self.first_keys.shape[2]

    @property
    def ring(self) -> Ring:
        return Ring(*self[:5])


class Rules(NamedTuple):
    """What a mechanism of this kind consists of. Every function gets and gives float32 or wider."""

    window: int
    """Tokens that are near, the present one included."""
    weigh: Weigh
    """Scores of near tokens to weights, as in `window_chunk`."""
    scoring: Callable[[Tensor], Tensor]
    """query [B, H, N, D] -> the rows [B, Hkv, R, N, D] whose products with near keys are the scores."""
    query_features: Callable[[Tensor], Tensor] | None
    """query [B, H, N, D] -> [B, Hkv, R, N, F], what weighs the far tokens. None: these are not seen."""
    key_features: Callable[[Tensor], Tensor]
    """key [B, Hkv, L, D] -> f(key), [B, Hkv, L, F]; of no features where far tokens are not seen."""


class Parts(NamedTuple):
    """near [B, Hkv, R, N, Dv]: divided by its weights, whose size is [B, Hkv, R, N, 1]. far
    [B, Hkv, R, N, Dv + 1]: sums of weights times [v | 1]; None where no token is far."""

    near: Tensor
    size: Tensor
    far: Tensor | None


def step(query: Tensor, key: Tensor, value: Tensor, state: State, rules: Rules, real: Tensor | None) -> Parts:
    """One token: query [B, H, 1, D], key [B, Hkv, 1, D], value [B, Hkv, 1, Dv]; the state takes it in.

    real: bool [B, 1], False for a row that changes nothing: its tensors must be finite, its output is unused.
    """
    even = _even(state, rules.window) if real is None else None
    if even is not None:
        return _even_step(query, key, value, state, rules, *even)
    alone = torch.ones(query.shape[0], 1, 1, dtype=torch.bool, device=query.device)
    parts = _tree(query, key, value, state, rules, torch.zeros_like(state.length)[:, None], alone)
    append(key, value, state, rules, real)
    return parts


def tree(
    query: Tensor, key: Tensor, value: Tensor, state: State, rules: Rules, depth: Tensor, ancestors: Tensor
) -> Parts:
    """N draft nodes after the state, which is only read; depth [B, N], ancestors [B, N, N] as in
    `recurrent.tree`."""
    even = _even(state, rules.window)
    # First tokens that are drafts themselves are told by position, which is `_tree`'s business.
    if even is not None and (not state.sinks or even[0] >= state.sinks):
        return _even_tree(query, key, value, state, rules, depth, ancestors, *even)
    return _tree(query, key, value, state, rules, depth, ancestors)


def append(key: Tensor, value: Tensor, state: State, rules: Rules, real: Tensor | None) -> None:
    """Write tokens key [B, Hkv, T, D], value [B, Hkv, T, Dv] into the state, those that are `real`
    (bool [B, T]; None: all), and what its window cannot hold any more into its sums."""
    even = _even(state, rules.window) if real is None and key.shape[2] <= rules.window else None
    if even is not None:
        return _even_append(key, value, state, rules, *even)
    ranks = None if real is None else Ranks(real)
    if ranks is not None:
        key, value = ranks.to_front(key), ranks.to_front(value)
    count = torch.full_like(state.length, key.shape[2]) if ranks is None else ranks.count

    def fold(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return rules.key_features(widen(k)), with_one(widen(v))

    write_first(key, value, state, count)
    commit(key, value, count, state.ring, 1, fold, state.sinks)


def write_first(key: Tensor, value: Tensor, state: State, count: Tensor) -> None:
    """Keep those of the next `count` [B] tokens (in front) that are among the first of their sequence."""
    if not state.sinks:
        return
    source = torch.arange(state.sinks, device=key.device) - state.length[:, None]
    here = ((source >= 0) & (source < count[:, None]))[:, None, :, None]
    source = source.clamp(0, key.shape[2] - 1)
    for rows, x in ((state.first_keys, key), (state.first_values, value)):
        rows.copy_(torch.where(here, take_rows(x, source).to(rows.dtype), rows))


def append_along(path: Tensor | None, key: Tensor, value: Tensor, state: State, rules: Rules) -> None:
    """`append` of the tokens on the path, int [B, P] with -1 for none; without a path of all of them."""
    if path is not None and path.is_cpu and len(path) == 1:
        nodes = path[0, path[0] >= 0]
        append(key.index_select(2, nodes), value.index_select(2, nodes), state, rules, None)
    else:
        new_key, new_value, real = along(path, key, value)
        append(new_key, new_value, state, rules, real)


def after_window(
    key: Tensor, value: Tensor, state: State, real: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Many tokens after the state, for the form that runs on whole sequences: the window's rows as columns
    ahead of them. -> key, value, which columns are tokens (bool [B, rows + T]; the first of them is at
    position `folded`), and the number of rows."""
    rows = state.key_window.shape[2]
    position = state.length[:, None] + torch.arange(-rows, 0, device=key.device)
    new = key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool) if real is None else real
    key, value = (
        torch.cat([take_rows(ring, position % rows).to(x.dtype), x], 2)
        for ring, x in ((state.key_window, key), (state.value_window, value))
    )
    return key, value, torch.cat([position >= state.folded[:, None], new], 1), rows


def _tree(
    query: Tensor, key: Tensor, value: Tensor, state: State, rules: Rules, depth: Tensor, ancestors: Tensor
) -> Parts:
    window, rows, sinks = rules.window, state.key_window.shape[2], state.sinks
    query, key, value = widen(query), widen(key), widen(value)
    last = state.length[:, None] - 1
    held = last - (last - torch.arange(rows, device=key.device)) % rows  # position in each row
    node = state.length[:, None] + depth
    seen = _Seen(node, ancestors, window, sinks)
    first = torch.arange(sinks, device=key.device).expand(key.shape[0], -1)

    keys, values = (
        torch.cat([x.to(y.dtype) for x in kept] + [y], 2)
        for kept, y in (
            ((state.first_keys, state.key_window), key),
            ((state.first_values, state.value_window), value),
        )
    )
    there = torch.cat([seen.first(first, state.length), seen.near(held, held >= 0), seen.nodes()], 2)
    near, size = _near(query, keys, values, rules, ~there[:, None, None])
    if rules.query_features is None:
        return Parts(near, size, None)

    # Of the window's rows only the oldest are far, one more for each token that a branch is long.
    oldest = torch.arange(min(rows, rows - window + key.shape[2]), device=key.device)
    position = state.folded[:, None] + oldest
    far_keys, far_values = (
        torch.cat([take_rows(ring, position % rows).to(x.dtype), x], 2)
        for ring, x in ((state.key_window, key), (state.value_window, value))
    )
    features = rules.query_features(query)
    weights = per_kv_head(features, rules.key_features(far_keys).mT)
    weights = weights * seen.far(position, position < state.length[:, None])[:, None, None]
    far = per_kv_head(weights, with_one(far_values)) + per_kv_head(features, state.recurrent)
    return Parts(near, size, far)


def _near(
    query: Tensor, keys: Tensor, values: Tensor, rules: Rules, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`near` and `size` of `Parts` over keys [B, Hkv, n, D], values. hidden: bool [B, 1, 1, N, n] or None."""
    scores = per_kv_head(rules.scoring(query), keys.mT)
    if not are_finite(scores):  # float32 may be too narrow for the scores, and for the sizes too
        scores = per_kv_head(rules.scoring(query.double()), keys.double().mT)
        values = values.double()
    weights, size = rules.weigh(scores, hidden)
    if hidden is None:
        return per_kv_head(weights, values), size
    return product(weights, values, ~hidden), size


class _Seen(NamedTuple):
    """What the nodes at positions `node` [B, N] see, bool [B, N, n], of committed tokens at positions [B, n]
    that are there (bool [B, n]), and of their ancestors."""

    node: Tensor
    ancestors: Tensor
    window: int
    sinks: int

    def near(self, position: Tensor, there: Tensor) -> Tensor:
        return there[:, None] & (self._lag(position) < self.window)

    def first(self, position: Tensor, length: Tensor) -> Tensor:
        """Of the rows of the first tokens, where they are not near."""
        return (position < length[:, None])[:, None] & (self._lag(position) >= self.window)

    def nodes(self) -> Tensor:
        lag = self._lag(self.node)
        return self.ancestors & ((lag < self.window) | (self.node < self.sinks)[:, None])

    def far(self, position: Tensor, there: Tensor) -> Tensor:
        """Of committed tokens and, after them, of ancestors."""
        position = torch.cat([position, self.node], 1)
        all_ = torch.cat([there[:, None].expand(-1, self.node.shape[1], -1), self.ancestors], 2)
        return all_ & (self._lag(position) >= self.window) & (position >= self.sinks)[:, None]

    def _lag(self, position: Tensor) -> Tensor:
        return self.node[:, :, None] - position[:, None]


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


def _even_step(
    query: Tensor, key: Tensor, value: Tensor, state: State, rules: Rules, length: int, folded: int
) -> Parts:
    """`step` after sequences of one length: a quarter of the time of `_tree`."""
    slot = length % rules.window
    place = slice(slot, slot + 1)
    if length - folded == rules.window:
        if rules.query_features is not None and folded >= state.sinks:
            features = rules.key_features(widen(state.key_window[:, :, place]))
            state.recurrent.add_(features.mT @ with_one(widen(state.value_window[:, :, place])))
        state.folded.add_(1)
    state.key_window[:, :, place] = key
    state.value_window[:, :, place] = value
    _write_first_even(key, value, state, length)
    state.length.add_(1)
    keys, values = _with_first(
        state,
        length - rules.window + 1,
        state.key_window[:, :, : length + 1],
        state.value_window[:, :, : length + 1],
    )
    query = widen(query)
    near, size = _near(query, keys, values, rules, None)
    if length < rules.window + state.sinks or rules.query_features is None:
        return Parts(near, size, None)
    return Parts(near, size, per_kv_head(rules.query_features(query), state.recurrent))


def _with_first(state: State, outside: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, wide, and those of the first tokens ahead of them that are before `outside`."""
    count = max(0, min(state.sinks, outside))
    if count:
        keys = torch.cat([state.first_keys[:, :, :count], keys], 2)
        values = torch.cat([state.first_values[:, :, :count], values], 2)
    return widen(keys), widen(values)


def _write_first_even(key: Tensor, value: Tensor, state: State, length: int) -> None:
    """`write_first` after sequences of one length."""
    count = min(state.sinks - length, key.shape[2])
    if count > 0:
        state.first_keys[:, :, length : length + count] = key[:, :, :count]
        state.first_values[:, :, length : length + count] = value[:, :, :count]


def _even_tree(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    rules: Rules,
    depth: Tensor,
    ancestors: Tensor,
    length: int,
    folded: int,
) -> Parts:
    """`_tree` after sequences of one length, which holds all first tokens: half of its operations."""
    window = rules.window
    query, key, value = widen(query), widen(key), widen(value)
    ring_keys, ring_values = (widen(x[:, :, :length]) for x in (state.key_window, state.value_window))
    deepest = int(depth.max())
    age = (length - 1 - torch.arange(ring_keys.shape[2], device=key.device)) % window + 1
    beyond = age + depth[:, :, None] >= window
    hidden = ~ancestors
    if deepest >= window:
        hidden = hidden | (depth[:, :, None] - depth[:, None] >= window)
    hidden = torch.cat([beyond, hidden], 2)
    keys, values = _with_first(state, length + deepest + 1 - window, ring_keys, ring_values)
    first = keys.shape[2] - ring_keys.shape[2]
    if first:
        near = length + depth[:, :, None] - torch.arange(first, device=key.device) < window
        hidden = torch.cat([near, hidden], 2)
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    near, size = _near(query, keys, values, rules, hidden[:, None, None])
    oldest = length + deepest + 1 - window - folded  # rows that are far from the deepest node
    if rules.query_features is None or (oldest <= 0 and folded <= state.sinks):
        return Parts(near, size, None)
    features = rules.query_features(query)
    far = per_kv_head(features, state.recurrent)
    if oldest > 0:
        place = (torch.arange(min(oldest, length - folded), device=key.device) + folded) % window
        keys, values = ring_keys.index_select(2, place), ring_values.index_select(2, place)
        outside = beyond.index_select(2, place)
        if folded < state.sinks:
            outside[:, :, : state.sinks - folded] = False
        if deepest >= window:
            keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
            lag = depth[:, :, None] - depth[:, None]
            outside = torch.cat([outside, ancestors & (lag >= window)], 2)
        weights = per_kv_head(features, rules.key_features(keys).mT) * outside[:, None, None]
        far = far + per_kv_head(weights, with_one(values))
    return Parts(near, size, far)


def _even_append(key: Tensor, value: Tensor, state: State, rules: Rules, length: int, folded: int) -> None:
    """`append` of no more tokens than the window holds, after sequences of one length."""
    leaving = max(0, length + key.shape[2] - rules.window - folded)
    if leaving:
        place = (torch.arange(leaving, device=key.device) + folded) % rules.window
        place = place[max(0, state.sinks - folded) :]
        if rules.query_features is not None and len(place):
            features = rules.key_features(widen(state.key_window.index_select(2, place)))
            state.recurrent.add_(features.mT @ with_one(widen(state.value_window.index_select(2, place))))
        state.folded.add_(leaving)
    _write_first_even(key, value, state, length)
    place = (torch.arange(key.shape[2], device=key.device) + length) % rules.window
    state.key_window.index_copy_(2, place, key.to(state.key_window.dtype))
    state.value_window.index_copy_(2, place, value.to(state.value_window.dtype))
    state.length.add_(key.shape[2])
