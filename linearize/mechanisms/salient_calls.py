"""By which calls of the kernels `augmented` runs: whole sequences in one, one token by one laid out before.

What is left over goes by the operators that `augmented.py` composes, graphs above all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import registered_salient, salient
from ..kernels.salient import Flat
from ..kernels.softmax import Scores
from ..kernels.tensors import as_autocast, runs_at_once
from ..ops.arguments import check, check_held
from ..ops.state import SalientState, States
from .composed import ComposedAttention


class SalientCalls(ComposedAttention):
    """Attributes: sizes, how many tokens are seen exactly; tail_weight, as in `augmented.py`."""

    sizes: salient.Sizes
    tail_weight: nn.Parameter | None

    @property
    def rule(self) -> Scores:
        """How the site makes its scores."""
        return Scores(self.scale, self.spec.softcap)

    def extend(
        self, query: Tensor, key: Tensor, value: Tensor, state: States, *, key_mask: Tensor | None = None
    ) -> Tensor:
        tokens = as_autocast(query, key, value)
        ready = self._ready(tokens, state, key_mask)
        if ready is None:
            return super().extend(query, key, value, state, key_mask=key_mask)
        return ready(*tokens, key_mask).to(tokens[2].dtype)

    def _ready(self, tokens: tuple[Tensor, ...], state: States, key_mask: Tensor | None) -> Any:
        """The call that takes one token of each sequence into the state, laid out before or now; None where
        all has to be looked at, graphs and calls that cannot run among it."""
        query, key, value = tokens
        part = state.parts[0]
        assert isinstance(part, SalientState)
        if torch.is_grad_enabled() or not runs_at_once(query, key, value) or query.shape[2] != 1:
            return None
        if key_mask is not None and not _is_column(key_mask, query):
            return None
        call, weights = part.ready.call, (self.conv_weight, self.tail_weight)
        if call is None or not call.fits(query, key, value, part.tensors, weights):
            part.ready.call = call = self._laid_out(query, key, value, state)
        return call

    def _laid_out(self, query: Tensor, key: Tensor, value: Tensor, state: States) -> Any:
        """The call of `_ready` for tokens like these, None where there is none."""
        part, *apart = state.parts
        assert isinstance(part, SalientState)
        weights = self.conv_weight, self.tail_weight
        if apart or not self._tail_joins or self.spec.kv_layout == "tiled":
            return None
        if any(x is not None and x.is_inference() for x in weights):
            return None  # no one counts their versions
        self._check(query, key, value, None)
        check_held(query, key, value, part.tensors.keys, part.tensors.values)
        rows = self.split_heads(query)
        compiled = registered_salient.after_state(rows, key, value, part.tensors, self.sizes)
        if compiled is None:
            return None
        made = compiled.OneToken(query, key, value, part.tensors, self.sizes, self.rule, *weights)
        return made if made.fits(query, key, value, part.tensors, weights) else None

    def extend_flat(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        state: States,
        flat: Flat,
    ) -> Tensor | None:
        part, *apart = state.parts
        assert isinstance(part, SalientState)
        if apart or not self._tail_joins or torch.is_grad_enabled() or not runs_at_once(query, key, value):
            return None
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        rows = self.split_heads(query)
        compiled = registered_salient.after_state(rows, key, value, part.tensors, self.sizes)
        if compiled is None:
            return None
        joined, known = (self._joined_weight(), self._joined_tail()), part.ready.weights
        if known is None or not known.fits(*joined):
            part.ready.weights = known = compiled.Weights(*joined)
        options = self.sizes, self.rule, *known.speaking
        found = compiled.extend_flat(rows, key, value, part.tensors, *options, flat)
        return self.merge_heads(found)[0].transpose(0, 1).to(value.dtype)

    def may_be_one_call(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether one compiled call could do all of a whole sequence."""
        tensors = query, key, value
        if torch.compiler.is_compiling() or any(type(x) is not Tensor or x.is_meta for x in tensors):
            return False
        if query.shape[2] != key.shape[2] or (self.spec.causal and not self._tail_joins):
            return False
        return not torch.is_grad_enabled() or not registered_salient.follows(*tensors, *self.parameters())

    def in_one_call(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None
    ) -> Tensor | None:
        """`total` of a whole sequence in compiled code, a causal one after an empty state; None where there
        is none that takes it."""
        if self.spec.causal:
            state = self.new_state(query.shape[0], dtype=key.dtype, device=key.device)
            assert state is not None
            (part, *_) = state.parts
            assert isinstance(part, SalientState)
            rows = self.split_heads(query)
            if registered_salient.after_state(rows, key, value, part.tensors, self.sizes) is None:
                return None
            return self.total_after(query, key, value, state, key_mask, None)
        compiled = registered_salient.both_ways(query, key, value)
        if compiled is None:
            return None
        tables: tuple[Tensor | None, ...] = self.conv_weight, self.tail_weight
        tiled = self.spec.kv_layout == "tiled"
        if tiled:  # the kernel wants the heads that share a key/value head side by side
            query = self.split_heads(query).flatten(1, 2)
            tables = tuple(None if x is None else self._split_weight(x).flatten(0, 1) for x in tables)
        tokens = query, key, value
        if runs_at_once(*tokens):  # an encoder of a hundred tokens notices what an operator costs
            try:
                out = registered_salient.bidirectional(
                    compiled, *tokens, key_mask, self.sizes, self.rule, *tables
                )
            except ValueError:
                self._check(query, key, value, key_mask)  # says which of them does not fit
                raise
        else:
            wide = *self.sizes, *self.rule, *tables
            out = torch.ops.linearize.salient_both_ways(*tokens, key_mask, *wide)
        return self.merge_heads(out.unflatten(1, (key.shape[1], -1))) if tiled else out

    @property
    def _ring_serves(self) -> bool:
        """Whether the state's own ring holds the values that the convolution reads."""
        return self.conv_weight is not None and self.conv_weight.shape[1] <= self.sizes.window + 1

    @property
    def _tail_joins(self) -> bool:
        """Whether nothing comes between the operator after a state and the tail."""
        return self.tail_weight is None or self.conv_weight is None or self._ring_serves

    def _joined_tail(self) -> Tensor | None:
        """Weights of the tail [Hkv, R, Dv, D + Dv + 1] where the operator after a state adds it."""
        if self.tail_weight is None or not self._tail_joins:
            return None
        return self._split_weight(self.tail_weight)

    def _joined_weight(self) -> Tensor | None:
        """Weights of the convolution [Hkv, R, K] where the state's ring serves it."""
        if self.conv_weight is None or not self._ring_serves:
            return None
        return self._split_weight(self.conv_weight)

    def _split_weight(self, weight: Tensor) -> Tensor:
        """weight [H, ...] -> [Hkv, R, ...], as `split_heads` does."""
        if self.spec.kv_layout == "tiled":
            return weight.unflatten(0, (-1, self.spec.num_key_value_heads)).transpose(0, 1)
        return weight.unflatten(0, (self.spec.num_key_value_heads, -1))

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None = None,
    ) -> None:
        """Raise InputError for arguments that do not fit together."""
        of_site = self.conv_weight, self.group_size, self.spec.causal, False, self.spec.kv_layout
        check(query, key, value, *of_site, key_mask, query_start)


def _is_column(key_mask: Tensor, query: Tensor) -> bool:
    """Whether the mask is one of the sequences of one token each."""
    return type(key_mask) is Tensor and key_mask.dtype == torch.bool and key_mask.shape == query.shape[:3:2]
