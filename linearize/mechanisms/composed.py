"""Mechanisms as compositions: maps of query and key, calls of the one core operator, and what joins them.

A mechanism is described by `terms`, which maps one call's query, key and value to the arguments of core
calls, and by `combine`, which joins the results. Both look at each token alone. So the same description gives
every form: the parallel one here, and one decoding step, where each term keeps its own constant state (the
sum of k^T v over finished groups, the rows of the open group and of the convolution). The mechanisms that are
more than core calls, `linformer` and those of `windowed.py`, say what they are in `mix` instead, and after a
state in `mix_after`.

What all of them share:
- `augmentation` adds the paper's convolution over values (arXiv 2406.07368), one filter per head, zero at
  first, after whatever normalisation the mechanism has, to causal and bidirectional sites.
- A normalised mechanism gets numerator and denominator from one call with value' = [value | 1] in float32.
- The site's attention dropout is not applied: it would zero entries of a weight matrix that is never formed.
- The output of a padded query is zero, and a query without any key gets zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.padding import Ranks, without_padding
from ..kernels.tensors import as_autocast, full_precision, unit
from ..kernels.tensors import widen as widen
from ..ops import attention as ops
from ..ops.arguments import check_not_empty
from ..ops.state import AttentionState, Part, States
from .module import AttentionModule
from .onnx_form import Nodes
from .spec import SiteSpec
from .summary import Summary, block_of, summed
from .term import Given
from .term import Term as Term

if TYPE_CHECKING:
    from .base import Settings


class ComposedAttention(AttentionModule):
    """A site's attention as core calls. Subclasses give `terms`, and `combine` unless a sum will do.

    They create their parameters, on themselves (the compile backend finds them by plain names), then call
    `reset_parameters`, which subclasses with parameters extend.
    """

    conv_joins: bool = False
    """The terms carry the convolution themselves: nothing but a sum follows them."""

    linear_parameters: tuple[str, ...] = ("conv_weight",)

    multiplies_padding: ClassVar[bool] = False
    """`mix` multiplies padding by zero instead of leaving it out."""

    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec)
        self.group_size = config.group_size
        self.conv_weight: nn.Parameter | None = None
        if config.augments and not spec.cross:
            width = ops.conv_width(config.conv_taps, spec.causal)
            self.conv_weight = nn.Parameter(torch.empty(spec.num_heads, width))

    def reset_parameters(self) -> None:
        """Initial values; call it after `to_empty` when the module was built on the meta device."""
        with torch.no_grad():
            if self.conv_weight is not None:
                self.conv_weight.zero_()

    def terms(self, query: Tensor, key: Tensor, value: Tensor) -> list[Term]:
        """The core calls of one forward pass; every subclass gives them.

        query [B, H, T, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], any floating dtypes.
        """
        raise NotImplementedError

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        """One tensor per term -> [B, H, T, Dv]."""
        total = outputs[0]
        for output in outputs[1:]:
            total = total + output
        return total

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None = None,
        query_start: int | Tensor | None = None,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        check_not_empty(query, key, value)
        start = query_start if self.spec.causal or self.spec.cross else None
        query, key, value = as_autocast(query, key, value)
        if key_mask is not None:
            tokens = query, key, value, key_mask, self.spec.cross
            query, key, value = without_padding(*tokens, self.multiplies_padding)
        with full_precision(value.device):
            return self.total(query, key, value, key_mask, start).to(value.dtype)

    def total(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        """The mechanism and the convolution, [B, H, T, Dv]."""
        out = self.mix(query, key, value, key_mask, query_start)
        if self.conv_weight is not None and not self.conv_joins:
            out = out + self._convolution(query, key, value, key_mask, query_start)
        return out

    def _convolution(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        """Of value alone; query and key give shapes."""
        return self.run(Term(query, key, value, conv_weight=self.conv_weight), key_mask, query_start)

    def base(self, given: Given) -> Tensor:
        """The output without what `linear_parameters` give: [B, H, T, Dv], float32 or wider."""
        out = widen(self.mix(*given))
        return out - self._convolution(*given) if self.conv_joins else out

    def columns(self, base: Tensor, given: Given, rows: Tensor) -> dict[str, Tensor]:
        """What each of `linear_parameters` is multiplied with.

        Args:
            base: What `base` gave.
            given: As for `base`.
            rows: The queries that are asked for, int64 [N], indices of [B * T].

        Returns:
            For a parameter [H] or [H, n] columns [H, N, Dv, n], for one [H, Dv, F] features [H, N, F].
        """
        return {"conv_weight": self.taps(given, rows)}

    def complete(self, base: Tensor, given: Given) -> Tensor:
        """The output [B, H, T, Dv], from what `base` gave."""
        return base + self._convolution(*given)

    def taps(self, given: Given, rows: Tensor) -> Tensor:
        """The values that `conv_weight` [H, n] weighs, [H, N, Dv, n], for the queries `rows` of [B * T].

        Padding does not count: a tap is so many real tokens away.
        """
        assert self.conv_weight is not None
        query, _, value, key_mask, query_start = given
        queries = query.shape[2]
        number = self.conv_weight.shape[1]
        ahead = 0 if self.spec.causal else number // 2
        start = value.shape[2] - queries if query_start is None else query_start
        column = torch.arange(queries, device=value.device).expand(value.shape[0], -1) + start
        if key_mask is not None:
            rank = key_mask.cumsum(1) - 1
            column = rank.gather(1, column)
            value = Ranks(key_mask).to_front(value)
        lag = torch.arange(number, device=value.device) - ahead
        index = (column.flatten()[rows, None] - lag) % (value.shape[2] + number)  # [N, n]; past the end: zero
        padded = F.pad(widen(value), (0, 0, 0, number))
        batch = torch.div(rows, queries, rounding_mode="floor")
        found = padded.transpose(1, 2)[batch[:, None], index]  # [N, n, Hkv, Dv]
        return self.of_query_heads(found.permute(2, 0, 3, 1))

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        """The mechanism without the convolution (with it, if `conv_joins`)."""
        terms = self.terms(query, key, value)
        return self.combine([self.run(term, key_mask, query_start) for term in terms])

    def run(
        self,
        term: Term,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
        causal: bool | None = None,
    ) -> Tensor:
        """One core call. causal: other than the site's own."""
        return ops.augmented_attention(
            term.query,
            term.key,
            term.value,
            alpha=term.alpha,
            conv_weight=term.conv_weight,
            local_scale=term.local_scale,
            local_bias=term.local_bias,
            activation=term.activation,
            group_size=self.group_size,
            causal=self.spec.causal if causal is None else causal,
            cross=self.spec.cross,
            kv_layout=self.spec.kv_layout,
            key_mask=key_mask,
            query_start=query_start,
            normalize=term.normalize,
        )

    @property
    def has_state(self) -> bool:
        return self.spec.causal

    def new_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device, max_rewind: int = 0
    ) -> States | None:
        if not self.has_state:
            return None
        heads, kv_heads = self.spec.num_heads, self.spec.num_key_value_heads
        sizes = (heads, self.spec.head_dim), (kv_heads, self.spec.head_dim), (kv_heads, self.spec.value_dim)
        token = [torch.zeros(1, n, 1, size, dtype=dtype, device=device) for n, size in sizes]
        with torch.no_grad(), full_precision(device):
            terms = [*self.terms(*token), *self._apart(*token)]
        return States(
            tuple(
                AttentionState.new(
                    batch,
                    kv_heads,
                    term.key.shape[3],
                    term.value.shape[3],
                    group_size=self.group_size,
                    taps=0 if term.conv_weight is None else term.conv_weight.shape[1],
                    max_rewind=max_rewind,
                    dtype=term.key.dtype,
                    device=device,
                )
                for term in terms
            )
        )

    def extend(
        self, query: Tensor, key: Tensor, value: Tensor, state: States, *, key_mask: Tensor | None = None
    ) -> Tensor:
        """`forward` of the next tokens after a state, without gradients.

        Args:
            query: [B, H, T, D].
            key: [B, Hkv, T, D].
            value: [B, Hkv, T, Dv].
            state: Made by `new_state`; brought up to date in place.
            key_mask: Bool [B, T], False for tokens that change nothing.

        Returns:
            [B, H, T, Dv] in the dtype of `value`.

        Raises:
            InputError: The tokens do not fit together or to the state, which is then unchanged.
        """
        check_not_empty(query, key, value)
        query, key, value = as_autocast(query, key, value)
        with full_precision(value.device):
            return self.total_after(query, key, value, state, key_mask, None).to(value.dtype)

    def tree(
        self, query: Tensor, key: Tensor, value: Tensor, state: States, parents: Tensor | ops.Lineage
    ) -> Tensor:
        """`forward` of N draft tokens that form a tree after a state, which is only read.

        Args:
            query: [B, H, N, D].
            key: [B, Hkv, N, D].
            value: [B, Hkv, N, Dv].
            state: Made by `new_state`.
            parents: As for `ops.augmented_tree`.

        Returns:
            [B, H, N, Dv] in the dtype of `value`.

        Raises:
            InputError: The arguments do not fit.
        """
        query, key, value = as_autocast(query, key, value)
        with full_precision(value.device):
            return self.total_after(query, key, value, state, None, parents).to(value.dtype)

    def commit(
        self, query: Tensor, key: Tensor, value: Tensor, state: States, path: Tensor | None = None
    ) -> None:
        """Append tokens whose outputs are known, such as the accepted branch of a tree.

        Args:
            query: [B, H, N, D].
            key: [B, Hkv, N, D].
            value: [B, Hkv, N, Dv].
            state: Made by `new_state`; brought up to date in place.
            path: As for `ops.augmented_commit`.

        Raises:
            InputError: The arguments do not fit.
        """
        query, key, value = as_autocast(query, key, value)
        with full_precision(value.device):
            terms = [*self.terms(query, key, value), *self._apart(query, key, value)]
            for term, part in zip(terms, state.parts, strict=True):
                assert isinstance(part, AttentionState)
                ops.augmented_commit(term.key, term.value, part, path, normalize=term.normalize)

    def emit_onnx(self, nodes: Nodes, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if type(self).mix_after is not ComposedAttention.mix_after:
            return super().emit_onnx(nodes, query, key, value)  # more than the core calls of `terms`
        terms = self.terms(query, key, value)
        out = self.combine([nodes.core(term, self.group_size, self.spec.kv_layout) for term in terms])
        return self.emit_apart(nodes, out, query, key, value)

    def emit_apart(self, nodes: Nodes, out: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """out [B, H, T, Dv] and, where it is a term of its own, the convolution, in ONNX."""
        for term in self._apart(query, key, value):
            out = out + nodes.core(term, self.group_size, self.spec.kv_layout)
        return out

    @property
    def has_summary(self) -> bool:
        return self.spec.cross

    def summarize(self, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Summary:
        key, value = as_autocast(key, value)
        with full_precision(value.device):
            query = key.new_zeros(key.shape[0], self.spec.num_heads, 1, key.shape[3])
            terms = self.terms(query, key, value)
            sums = tuple(
                None if term.alpha is None else summed(term.key, term.value, key_mask, term.normalize)
                for term in terms
            )
        return Summary.of(sums, any(_is_near(term) for term in terms), key_mask)

    def recall(
        self, query: Tensor, key: Tensor, value: Tensor, summary: Summary, query_start: int | Tensor | None
    ) -> Tensor:
        start = 0 if query_start is None else query_start
        query, key, value = as_autocast(query, key, value)
        block = block_of(key, value, summary, query.shape[2], start, self.group_size)
        with full_precision(value.device):
            terms = self.terms(widen(query), widen(block.key), widen(block.value))
            outputs = [
                self._recall(term, total, block.real, block.query_start)
                for term, total in zip(terms, summary.sums, strict=True)
            ]
            return self.combine(outputs).to(value.dtype)

    def _recall(self, term: Term, total: Tensor | None, real: Tensor, query_start: int | Tensor) -> Tensor:
        """`run` on the groups that queries meet, with the sum over all keys at hand."""
        near = self.run(replace(term, alpha=None), real, query_start) if _is_near(term) else None
        if total is None or term.alpha is None:
            assert near is not None
            return near
        query = unit(term.query) if term.normalize else term.query
        if isinstance(term.alpha, Tensor):
            query = query * term.alpha.to(query.dtype).reshape(-1, 1, 1)
        else:
            query = query * term.alpha
        out = self.merge_heads(self.split_heads(query) @ total.unsqueeze(2))
        return out if near is None else out + near

    def mix_after(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        parts: Sequence[Part],
        key_mask: Tensor | None,
        parents: Tensor | ops.Lineage | None,
    ) -> Tensor:
        """`mix` of the next tokens after a state, or of a tree of drafts if `parents` is given."""
        terms = zip(self.terms(query, key, value), parts, strict=True)
        return self.combine([self._run_after(term, part, key_mask, parents) for term, part in terms])

    def total_after(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: States,
        key_mask: Tensor | None,
        parents: Tensor | ops.Lineage | None,
    ) -> Tensor:
        """`total` of the next tokens after a state, or of a tree of drafts if `parents` is given."""
        apart = self._apart(query, key, value)
        own = len(state.parts) - len(apart)
        out = self.mix_after(query, key, value, state.parts[:own], key_mask, parents)
        for term, part in zip(apart, state.parts[own:], strict=True):
            out = out + self._run_after(term, part, key_mask, parents)
        return out

    def _run_after(
        self, term: Term, part: Part, key_mask: Tensor | None, parents: Tensor | ops.Lineage | None
    ) -> Tensor:
        """`run` after a state."""
        assert isinstance(part, AttentionState)
        options: dict[str, Any] = dict(
            alpha=term.alpha,
            conv_weight=term.conv_weight,
            local_scale=term.local_scale,
            activation=term.activation,
            kv_layout=self.spec.kv_layout,
            normalize=term.normalize,
        )
        if parents is not None:
            return ops.augmented_tree(term.query, term.key, term.value, part, parents, **options)
        return ops.augmented_extend(term.query, term.key, term.value, part, key_mask=key_mask, **options)

    def _apart(self, query: Tensor, key: Tensor, value: Tensor) -> list[Term]:
        """The convolution, where it is a term of its own, outside of whatever `combine` does."""
        if self.conv_weight is None or self.conv_joins:
            return []
        # One column: the convolution reads no scores, and its state needs no keys.
        return [Term(query[..., :1], key[..., :1], value, conv_weight=self.conv_weight)]

    def over_all(self, query: Tensor, key: Tensor, value: Tensor, weight: float = 1.0, **more: Any) -> Term:
        """weight * sum of q.k v over every key the site lets a query see: the linear kernel's term.

        Causal: the query's own group up to itself, and all earlier groups. Otherwise the core's grouped part
        counts every group already.
        """
        local = weight if self.spec.causal else None
        return Term(query, key, value, alpha=weight, local_scale=local, **more)

    @property
    def scale(self) -> float:
        """Factor of the site's scores."""
        return self.spec.head_dim**-0.5 if self.spec.scale is None else self.spec.scale

    def of_query_heads(self, x: Tensor) -> Tensor:
        """x [Hkv, ...], a parameter per key/value head -> [H, ...], for the query heads that read it."""
        repeats = self.spec.num_heads // self.spec.num_key_value_heads
        if self.spec.kv_layout == "tiled":
            return x.repeat(repeats, *(1,) * (x.dim() - 1))
        return x.repeat_interleave(repeats, 0)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, H, T, D] -> [B, Hkv, R, T, D]: the R query heads of each key/value head."""
        if self.spec.kv_layout == "tiled":
            return x.unflatten(1, (-1, self.spec.num_key_value_heads)).transpose(1, 2)
        return x.unflatten(1, (self.spec.num_key_value_heads, -1))

    def merge_heads(self, x: Tensor) -> Tensor:
        """Inverse of `split_heads`."""
        return (x.transpose(1, 2) if self.spec.kv_layout == "tiled" else x).flatten(1, 2)

    def extra_repr(self) -> str:
        taps = 0 if self.conv_weight is None else self.conv_weight.shape[1]
        return f"{super().extra_repr()}, group_size={self.group_size}, taps={taps}"


def _is_near(term: Term) -> bool:
    """Whether something of a cross-attention's term is left once the sum over all keys is known."""
    return term.local_scale is not None or term.alpha is None


def of_queries(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, H, T, n] -> [H, N, n], the queries `rows`, int64 [N], of [B * T]."""
    return x.transpose(0, 1).flatten(1, 2).index_select(1, rows)
