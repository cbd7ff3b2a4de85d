"""Augmented linear attention whose local part is exact.

    o[t] = softmax over window, sinks and salient tokens of (scale q[t].k[j]) v[j] + convolution(v)[t],
    and what `kernels/salient_tail.py` estimates of all other tokens is added

    window: the last `window` tokens, and up to 31 before them    sinks: the first `sinks` tokens
    salient: per key/value head, `salient` tokens that got most attention, as an exponential average

The idea of the paper (arXiv 2406.07368), near tokens by their scores and a masked depthwise convolution, with
a near part that a pretrained softmax model needs no training for. The first tokens are those of StreamingLLM
(arXiv 2309.17453), salient tokens the heavy hitters of H2O (arXiv 2306.14048); how they are chosen is said in
`kernels/salient.py`. While all tokens fit this is the site's own attention, exactly, a softcap
included. The convolution and the tail start at zero.

A site with a window of its own that `window` covers sees exactly that, and nothing else; its form and state
are those of `softmax_window` without sinks and tail.

Bidirectional sites see `window` tokens on either side, and one selection serves the whole sequence. Cross-
attention has no window: such sites get the form of `augmented_paper`.

State: as many keys and values as are seen exactly, with scores and the weights that were not counted yet. The
convolution reads the same values, unless it reaches farther back than the window. In ONNX: `salient_onnx.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..errors import InputError
from ..kernels import registered_salient, salient, salient_chunk
from ..kernels import salient_tail as tail
from ..kernels.tensors import as_autocast, full_precision, widen
from ..ops.arguments import check_held
from ..ops.attention import Lineage, checked_path, lineage
from ..ops.state import Part, SalientState, States, check_sizes
from . import salient_onnx
from .augmented_paper import PaperAttention
from .base import EVERYWHERE, Mechanism, switch, whole
from .composed import Term, of_queries
from .module import AttentionModule
from .onnx_form import Nodes
from .salient_calls import SalientCalls
from .softmax_window import exact_window
from .spec import SiteSpec
from .term import Given

if TYPE_CHECKING:
    from .base import Settings


class AugmentedAttention(SalientCalls):
    """Attention of `kernels/salient.py`, plus the convolution, plus the tail."""

    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        self.sizes = salient.Sizes(*(config.option(name) for name in ("window", "sinks", "salient")))
        self.tail_weight: nn.Parameter | None = None
        if config.option("tail"):  # [A | B | c] of each head
            columns = spec.head_dim + spec.value_dim + 1
            self.tail_weight = nn.Parameter(torch.empty(spec.num_heads, spec.value_dim, columns))
        self.linear_parameters = ("conv_weight",) if self.tail_weight is None else ("tail_weight",)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            if self.tail_weight is not None:
                self.tail_weight.zero_()

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
    ) -> Tensor:
        self._check(query, key, value, key_mask, query_start)
        if self.spec.causal and not statically_known_true(query.shape[2] == key.shape[2]):
            key, value, key_mask = self._until_last(query, key, value, key_mask, query_start)
        rows = registered_salient.salient_attention(
            self.split_heads(query), key, value, key_mask, self.spec.causal, *self.sizes, *self.rule
        )
        return self.merge_heads(rows)

    def total(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        if self.may_be_one_call(query, key, value):
            if self.spec.causal or key_mask is not None:  # else the kernel looks itself
                self._check(query, key, value, key_mask, query_start)
            found = self.in_one_call(query, key, value, key_mask)
            if found is not None:
                return found
        out = super().total(query, key, value, key_mask, query_start)
        if not self.spec.causal or statically_known_true(query.shape[2] == key.shape[2]):
            return self.with_tail(query, out, key_mask)
        key, value, key_mask = self._until_last(query, key, value, key_mask, query_start)
        before = key.shape[2] - query.shape[2]
        real = None if key_mask is None else key_mask[:, before:]
        return self.with_tail(query, out, real, _ranks(key, key_mask)[:, before:])

    def with_tail(
        self, query: Tensor, out: Tensor, key_mask: Tensor | None, position: Tensor | None = None
    ) -> Tensor:
        """out [B, H, T, Dv], the rest of the output, and the tail.

        position: Of the queries, int64 [B, T]; None: those of a whole sequence.
        """
        if self.tail_weight is None:
            return out
        return out + self.tail_features(query, out, key_mask, position) @ self.tail_weight.to(out.dtype).mT

    def base(self, given: Given) -> Tensor:
        return super().base(given) if self.tail_weight is None else widen(super().total(*given))

    def columns(self, base: Tensor, given: Given, rows: Tensor) -> dict[str, Tensor]:
        if self.tail_weight is None:
            return super().columns(base, given, rows)
        found = self.tail_features(given.query, base, given.key_mask)
        return {"tail_weight": of_queries(found, rows)}

    def complete(self, base: Tensor, given: Given) -> Tensor:
        if self.tail_weight is None:
            return super().complete(base, given)
        return self.with_tail(given.query, base, given.key_mask)

    def tail_features(
        self, query: Tensor, out: Tensor, key_mask: Tensor | None, position: Tensor | None = None
    ) -> Tensor:
        """What `tail_weight` [H, Dv, F] is multiplied with, [B, H, T, F]; arguments as in `with_tail`."""
        if position is None:
            position = _ranks(query, key_mask)
        if self.spec.causal:
            dropped = tail.dropped_after(position, self.sizes)
        else:
            count = position.amax(1) + 1 if key_mask is None else key_mask.sum(1)
            dropped = tail.dropped_of(count, query.shape[2], self.sizes)
        found = tail.features(widen(query) * self.scale, out, dropped, self.sizes)
        if key_mask is None:
            return found
        return found.masked_fill(~key_mask[:, None, :, None], 0)  # whatever padding holds, NaN included

    def _until_last(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The keys up to the last query, which is after cached tokens. Raises InputError, or in a graph the
        operator does, where the queries of those are needed."""
        if isinstance(query_start, Tensor):
            raise InputError(
                "mechanism 'augmented' needs its state after tokens of a static cache: give the call an "
                "empty cache under torch.no_grad(), or use a DynamicCache"
            )
        if query_start is not None:
            end = query_start + query.shape[2]
            key, value = key[:, :, :end], value[:, :, :end]
            key_mask = None if key_mask is None else key_mask[:, :end]
        queries, keys = query.shape[2], key.shape[2]
        if isinstance(queries, int) and isinstance(keys, int) and not torch.compiler.is_compiling():
            known = keys if key_mask is None or key_mask.is_meta else int(key_mask.sum(1).max())
            problem = registered_salient.missing_queries(queries, known, self.sizes)
            if problem:
                raise InputError(problem)
        return key, value, key_mask

    def new_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device, max_rewind: int = 0
    ) -> States | None:
        convolution = super().new_state(batch, dtype=dtype, device=device, max_rewind=max_rewind)
        if convolution is None:
            return None
        spec = self.spec
        check_sizes(batch, spec.num_key_value_heads, spec.head_dim, spec.value_dim)
        tensors = salient.new(
            batch,
            spec.num_key_value_heads,
            spec.head_dim,
            spec.value_dim,
            self.sizes,
            max_rewind,
            dtype=dtype,
            device=device,
        )
        return States((SalientState(tensors, self.sizes, max_rewind), *convolution.parts))

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
        assert isinstance(part, SalientState)
        self._check(query, key, value, key_mask)
        check_held(query, key, value, part.tensors.keys, part.tensors.values)
        tokens = self.split_heads(query), key, value
        if parents is None:
            tables = self._joined_weight(), self._joined_tail()
            options = *part.tensors, *self.sizes, *self.rule, *tables, key_mask
            return self.merge_heads(torch.ops.linearize.salient_extend(*tokens, *options))
        depth, ancestors = lineage(parents, query.shape[0], query.shape[2], query.device)
        deepest = min(self.sizes.window, salient.DELAY)
        if not torch.compiler.is_compiling() and int(depth.max()) > deepest:
            raise InputError(
                f"this tree is {int(depth.max()) + 1} tokens deep; mechanism 'augmented' with a window of "
                f"{self.sizes.window} takes trees of at most {deepest + 1}"
            )
        rows = torch.ops.linearize.salient_tree(
            *tokens, *part.tensors, *self.sizes, *self.rule, self._joined_weight(), depth, ancestors
        )
        return self.merge_heads(rows)

    def total_after(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: States,
        key_mask: Tensor | None,
        parents: Tensor | Lineage | None,
    ) -> Tensor:
        if parents is None:
            if self._tail_joins:
                return super().total_after(query, key, value, state, key_mask, None)
            ahead = _ranks(query, key_mask)
        else:
            parents = lineage(parents, query.shape[0], query.shape[2], query.device)
            ahead = parents[0]
        position = state.length[:, None] + ahead  # before the tokens are taken in
        out = super().total_after(query, key, value, state, key_mask, parents)
        return self.with_tail(query, out, key_mask, position)

    def commit(
        self, query: Tensor, key: Tensor, value: Tensor, state: States, path: Tensor | None = None
    ) -> None:
        part, *convolution = state.parts
        assert isinstance(part, SalientState)
        self._check(query, key, value, key_mask=None)
        check_held(query, key, value, part.tensors.keys, part.tensors.values)
        path = None if path is None else checked_path(path, key)
        query, key, value = as_autocast(query, key, value)
        with full_precision(value.device):
            torch.ops.linearize.salient_append(
                self.split_heads(query), key, value, *part.tensors, *self.sizes, *self.rule, path
            )
        super().commit(query, key, value, States(tuple(convolution)), path)

    def emit_onnx(self, nodes: Nodes, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, joined = self.split_heads(query), self._joined_weight()
        weight = None if joined is None else joined.flatten(0, 1)
        node = salient_onnx.node(rows.flatten(1, 2), key, value, weight, self.sizes, self.rule)
        out = self.merge_heads(nodes.operator(node).unflatten(1, rows.shape[1:3]))
        out = self.emit_apart(nodes, out, query, key, value)
        if self.tail_weight is None:
            return out
        real, past = nodes.tokens(value)
        return self.with_tail(query, out.float(), real, past[:, None] + _ranks(query, real))

    def _apart(self, query: Tensor, key: Tensor, value: Tensor) -> list[Term]:
        return [] if self._ring_serves else super()._apart(query, key, value)

    def extra_repr(self) -> str:
        window, sinks, number = self.sizes
        return f"{super().extra_repr()}, window={window}, sinks={sinks}, salient={number}"


def _ranks(query: Tensor, key_mask: Tensor | None) -> Tensor:
    """How many real tokens of the call come before each, int64 [B, T]."""
    if key_mask is None:
        return torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    return (key_mask.cumsum(1) - 1).clamp_min(0)


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sizes: tuple[int, int, int],
    scale: float,
    softcap: float | None = None,
    causal: bool,
) -> Tensor:
    """Token by token, of what `kernels/salient.py` says; float64.

    Args:
        query: [R, T, D], the heads that share a key/value head.
        key: [T, D].
        value: [T, Dv].
        sizes: window, sinks, salient.
        scale: Factor of the scores.
        softcap: c where scores become c tanh(score / c); None without.
        causal: Which of the two forms.

    Returns:
        [R, T, Dv].
    """
    (window, sinks, number), length = sizes, key.shape[0]
    out = query.new_zeros(*query.shape[:2], value.shape[1])

    def weights_of(query: Tensor, key: Tensor) -> Tensor:
        scores = query @ key.T * scale
        return (scores if softcap is None else (scores / softcap).tanh() * softcap).softmax(-1)

    score, kept = [0.0] * length, list[int]()
    given: list[dict[int, float]] = []  # for each block the weights that its queries gave
    if not causal:
        voters = [place * length // salient_chunk.VOTERS for place in range(salient_chunk.VOTERS)]
        mass = weights_of(query[:, voters], key).nan_to_num(0).sum((0, 1))
        others = sorted(range(sinks, length), key=lambda j: -float(mass[j].detach()))
        kept = [*range(min(sinks, length)), *others[:number]]
    for t in range(length):
        block = t // salient.BLOCK
        first = max(0, block * salient.BLOCK - window)
        if causal and t % salient.BLOCK == 0:
            given.append({})
            if block > 0:
                score = [salient.DECAY * s for s in score]
                for j, weight in given[block - 3].items() if block >= 3 else ():
                    score[j] += weight
                rivals = [*kept, *range(max(0, first - salient.BLOCK), first)]
                kept = sorted(rivals, key=lambda j: -math.inf if j < sinks else -score[j])[: sinks + number]
        near = range(first, t + 1) if causal else range(max(0, t - window), min(length, t + window + 1))
        visible = [*near, *(j for j in kept if j not in near)]
        weights = weights_of(query[:, t], key[visible])
        out[:, t] = weights @ value[visible]
        for j, weight in zip(visible, weights.nan_to_num(0).sum(0).tolist(), strict=True) if causal else ():
            given[-1][j] = given[-1].get(j, 0.0) + weight
    return out


def _build(spec: SiteSpec, config: Settings) -> AttentionModule:
    if spec.cross:
        return PaperAttention(spec, config, alpha=0.0, local_scale=config.local_scale)
    if MECHANISM.covers(spec, config.options):
        return exact_window(spec, config)
    return AugmentedAttention(spec, config)


MECHANISM = Mechanism(
    name="augmented",
    formula="softmax over the last `window`, the first `sinks` and `salient` other tokens + convolution of v",
    supports=EVERYWHERE,
    build=_build,
    augmentation=True,
    reach=lambda spec, window: window + 1 if spec.causal else window,
    carries=lambda spec: frozenset() if spec.cross else frozenset({"softcap"}),
    onnx=salient_onnx.OPERATOR,
    parts={"salient tokens": {"salient": 0}, "linear part": {"tail": False}},
    sizes=("window", "salient"),
    options={
        "window": whole(128, "tokens before a query that it sees exactly; up to 31 more are", 0),
        "sinks": whole(4, "first tokens of the sequence that are seen exactly for ever", 0),
        "salient": whole(128, "tokens per key/value head that are kept for the attention they got", 0),
        "tail": switch(True, "whether all other tokens get an estimate, zero until it is fitted or trained"),
    },
)
