"""The module that takes a site's place: one per site, a child of the module that owns the attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..errors import ExportError
from ..kernels.salient import Flat
from ..ops.state import States
from .onnx_form import Nodes
from .spec import SiteSpec
from .summary import Summary


class AttentionModule(nn.Module):
    """Attention as a function of query, key and value, whatever the mechanism.

    Child modules of a converted model are instances of this; `spec` says which site they stand for.
    """

    is_exact = False
    """Whether this is the site's own softmax attention: every mask, bias and sink is honoured, nothing is
    approximated, and the whole keys and values are needed.
    """

    keeps_bias = False
    """`forward` takes the site's relative position bias too, as `bias` [1, H, T, S]."""

    keeps_window = False
    """The site has a window of its own, and every token that is in it is seen, and no other."""

    linear_parameters: tuple[str, ...] = ()
    """Parameters in which each head's output is affine: what `lz.calibrate` fits. Either any number of them,
    [H] or [H, n], or a single one, [H, Dv, F]. `ComposedAttention` says how each enters.
    """

    def __init__(self, spec: SiteSpec) -> None:
        super().__init__()
        self.spec = spec

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
        """The attention of a whole call. Every subclass gives it.

        `mask` and `sinks` are for softmax only. Other mechanisms ignore them: what they carry of them
        (causality, padding) reaches them as `spec` and `key_mask`, and a site that needs more was refused by
        the planner or is approximated on the user's word.

        Args:
            query: [B, H, T, D].
            key: [B, Hkv, S, D], heads not repeated.
            value: [B, Hkv, S, Dv].
            key_mask: Bool [B, S], True for real tokens; None: all are.
            query_start: Causal sites: the key column of the first query, by default so that the queries are
                the last columns. Cross-attention: the position of the first query.
            mask: Bool (True keeps) or float (added to the scores), broadcastable to [B, H, T, S].
            sinks: Logits that join the denominator only: one per head, [H], or per query, [B, H, T, 1].

        Returns:
            [B, H, T, Dv] in the dtype of `value`.
        """
        raise NotImplementedError

    def check_key_mask(self, key_mask: Tensor) -> None:
        """Raise InputError (in a graph, assert) where key_mask [B, S] hides what this cannot leave out."""

    @property
    def has_state(self) -> bool:
        """Whether `new_state` makes a state of constant size; if so, `extend`, `tree` and `commit` exist."""
        return False

    def new_state(
        self, batch: int, *, dtype: torch.dtype, device: torch.device, max_rewind: int = 0
    ) -> States | None:
        """An empty state of constant size.

        Args:
            batch: Sequences.
            dtype: Of the query, key and value that will come.
            device: Of the query, key and value that will come.
            max_rewind: How many tokens can be taken back at any time.

        Returns:
            The state; None where this attention has none.
        """
        return None

    def extend_flat(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: States,
        flat: Flat,
    ) -> Tensor | None:
        """`extend` of many sequences that lie end to end, on states that are not copied.

        Args:
            query: [T, H, D].
            key: [T, Hkv, D].
            value: [T, Hkv, Dv].
            state: Of all slots; brought up to date in place.
            flat: Which tokens and which rows of the state are whose.

        Returns:
            [T, H, Dv] in the dtype of `value`, zeros for tokens of no sequence; None where this attention has
            no such form for these tensors, and nothing is changed then.
        """
        return None

    def emit_onnx(self, nodes: Nodes, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`extend` written as nodes of an ONNX graph, which bring the state along.

        Args:
            nodes: Writes the nodes, in the order of the calls.
            query: [B, H, T, D].
            key: [B, Hkv, T, D].
            value: [B, Hkv, T, Dv].

        Returns:
            [B, H, T, Dv].

        Raises:
            ExportError: This attention has no ONNX form with a state.
        """
        raise ExportError(
            f"{type(self).__name__} has no ONNX form with a state; choose another mechanism for this model"
        )

    @property
    def has_summary(self) -> bool:
        """Whether this is cross-attention that can `summarize` keys and values; then there is `recall`."""
        return False

    def summarize(self, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Summary:
        """What all queries of a cross-attention share. Subclasses that say `has_summary` give it.

        Args:
            key: [B, Hkv, S, D].
            value: [B, Hkv, S, Dv].
            key_mask: Bool [B, S], True for real tokens; None: all are.

        Returns:
            The summary, for `recall`.
        """
        raise NotImplementedError

    def recall(
        self, query: Tensor, key: Tensor, value: Tensor, summary: Summary, query_start: int | Tensor | None
    ) -> Tensor:
        """`forward` with a summary of key and value, so that at most a few groups of them are read.

        No gradients reach key and value through the summary. Subclasses that say `has_summary` give it.

        Args:
            query: [B, H, T, D].
            key: [B, Hkv, S, D], the same as `summary` was made of.
            value: [B, Hkv, S, Dv], likewise.
            summary: What `summarize` gave.
            query_start: Position of the first query; None for 0.

        Returns:
            [B, H, T, Dv] in the dtype of `value`.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        spec = self.spec
        kind = "cross" if spec.cross else "causal" if spec.causal else "bidirectional"
        return (
            f"{kind}, heads={spec.num_heads}/{spec.num_key_value_heads}, dim={spec.head_dim}/{spec.value_dim}"
        )


class SoftmaxAttention(AttentionModule):
    """The site's own attention, exactly: softmax in float32, weights in the dtype of query, then value.

    `mask`, when given, is the whole positional mask: causality and window of the spec are not applied again.
    key_mask always is. A row that boolean masks leave empty gives zero; a row under a finite additive mask
    (transformers' `finfo.min`) gives the average that those values imply.
    """

    is_exact = True

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
        dropout: float | None = None,
    ) -> Tensor:
        """As every attention module; dropout: in training, in place of the one that the spec says."""
        spec = self.spec
        dropout = (spec.dropout if dropout is None else dropout) if self.training else 0.0
        repeats = spec.num_heads // spec.num_key_value_heads
        if repeats > 1 and spec.kv_layout == "tiled":
            key, value = key.repeat(1, repeats, 1, 1), value.repeat(1, repeats, 1, 1)
        keep = None if key_mask is None else key_mask[:, None, None, :]
        if mask is None:
            if (
                self._is_plain_causal(query, key, keep, query_start)
                and spec.softcap is None
                and sinks is None
            ):
                return F.scaled_dot_product_attention(
                    query, key, value, None, dropout, True, scale=spec.scale, enable_gqa=repeats > 1
                )
            keep = _both(keep, self._positional(query, key, query_start))
        elif mask.dtype == torch.bool:
            keep, mask = _both(keep, mask), None
        fused = sinks is None and spec.softcap is None
        if fused and (mask is None or (keep is None and mask.dtype == query.dtype)):
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                keep if mask is None else mask,
                dropout,
                scale=spec.scale,
                enable_gqa=repeats > 1,
            )

        if repeats > 1 and spec.kv_layout == "interleaved":
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scores = query @ key.mT * (spec.head_dim**-0.5 if spec.scale is None else spec.scale)
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if mask is not None:
            scores = scores + mask
        weights = _softmax(scores, keep, sinks)
        weights = F.dropout(weights.to(query.dtype), dropout, self.training)
        return (weights.to(value.dtype) @ value).to(value.dtype)

    def _is_plain_causal(
        self, query: Tensor, key: Tensor, keep: Tensor | None, query_start: int | Tensor | None
    ) -> bool:
        """Queries are exactly the keys' tokens: the one causal mask that the fused kernels know."""
        same = self.spec.causal and statically_known_true(query.shape[2] == key.shape[2])
        return same and self.spec.window is None and keep is None and not isinstance(query_start, Tensor)

    def _positional(self, query: Tensor, key: Tensor, query_start: int | Tensor | None) -> Tensor | None:
        """bool [T, S] of causality and window, True keeps; None when it would keep everything."""
        spec, queries, keys = self.spec, query.shape[2], key.shape[2]
        if not spec.causal and spec.window is None:
            return None
        if (
            spec.causal
            and spec.window is None
            and query_start is None
            and statically_known_true(queries == 1)
        ):
            return None
        if query_start is None:
            query_start = keys - queries if spec.causal else 0
        lag = (
            torch.arange(queries, device=query.device)[:, None]
            + query_start
            - torch.arange(keys, device=key.device)
        )
        if spec.window is None:
            return lag >= 0
        return (lag >= 0) & (lag < spec.window) if spec.causal else lag.abs() <= spec.window


class PlainSoftmaxAttention(SoftmaxAttention):
    """Softmax of what a linear form is shown: the key mask and where the queries start, and nothing else.

    It stands in the place of plain sites while a conversion is proved: where it equals the original, these
    two say all that the original's masks say.
    """

    is_exact = False

    def __init__(self, spec: SiteSpec, hidden: Callable[[Tensor], None] | None = None) -> None:
        """hidden: is told, bool [B], which sequences have no real token at all."""
        super().__init__(spec)
        self._hidden = hidden

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_mask: Tensor | None = None,
        query_start: int | Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        """As every attention module."""
        if key_mask is not None and self._hidden is not None:
            self._hidden(~key_mask.any(1))
        return super().forward(query, key, value, key_mask=key_mask, query_start=query_start)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a & b


def _softmax(scores: Tensor, keep: Tensor | None, sinks: Tensor | None) -> Tensor:
    """float32 (or wider) weights [B, H, T, S]; sinks, [H] or [B, H, T, 1], join the denominator only."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if keep is not None:
        # Not -inf: a row without any key must have a finite gradient as well.
        scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks if sinks.ndim == 4 else sinks.reshape(1, -1, 1, 1)
        column = column.to(scores.dtype).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights if keep is None else weights.masked_fill(~keep, 0.0)
