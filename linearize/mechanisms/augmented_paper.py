"""The paper's augmented linear attention (arXiv 2406.07368), its default here, and its two ablations.

o = local_scale * local + alpha * grouped + convolution(v); the formula and its source are in
`kernels/naive.py`, the forms beside it. All three weights are parameters per head. alpha and the convolution
start at zero and local_scale at one, so a fresh module computes the local part alone. (The paper's code has
one alpha and one local factor per layer; a head of its own size is what `lz.calibrate` fits.)

State: [D, Dv] per key/value head, the sum of k^T v over finished groups, and a window of keys and values that
serves the open group and the convolution.

The grouped sum grows with the length of the text, so an alpha that was fitted at one length is too large at
longer ones. options={"grouped": "mean"} divides it by the number of tokens in it, which is ours and not the
paper's: o = local_scale * local + alpha * grouped / max(n, 1) + convolution(v). It takes three core calls,
the third of ones to count, and its state has a window for each of them.

A site with a relative position bias is refused unless `approximate=("bias",)`: outside the group it has no
place. options={"position_bias": "local"} then keeps it inside, added after relu(q.k)^2 as the paper's T5
does; such a site has no state and keeps keys and values. Untuned it is a poor start: it was made for the
exponent of a softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels import naive as core
from ..kernels.padding import without_padding
from ..kernels.tensors import as_autocast, ones, widen
from .base import EVERYWHERE, Mechanism, choice
from .composed import ComposedAttention, Term, of_queries
from .spec import SiteSpec
from .term import Given

if TYPE_CHECKING:
    from .base import Settings

POSITION_BIAS = {
    "position_bias": choice(
        "drop",
        "what becomes of T5's relative position bias: nothing, or added to the weights inside a group",
        ("drop", "local"),
    )
}
GROUPED = {
    "grouped": choice(
        "sum",
        "what earlier groups give: the paper's sum, or that divided by how many tokens are in it",
        ("sum", "mean"),
    )
}


class PaperAttention(ComposedAttention):
    """One core call with the paper's parts; query and key are divided by their norms, so no scale is left.

    alpha, local_scale: initial weights of the grouped and of the local part, parameters of shape [H]; None
        leaves the part out.
    """

    conv_joins = True
    linear_parameters = ("local_scale", "alpha", "conv_weight")

    def __init__(
        self, spec: SiteSpec, config: Settings, *, alpha: float | None, local_scale: float | None
    ) -> None:
        super().__init__(spec, config)
        self._initial = {"alpha": alpha, "local_scale": local_scale}
        self.averages = config.options.get("grouped") == "mean"
        self.keeps_bias = config.options.get("position_bias") == "local" and not spec.cross
        self.alpha: nn.Parameter | None = None
        self.local_scale: nn.Parameter | None = None
        for name, value in self._initial.items():
            if value is not None:
                setattr(self, name, nn.Parameter(torch.empty(spec.num_heads)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            for name, value in self._initial.items():
                if value is not None:
                    getattr(self, name).fill_(value)

    @property
    def has_state(self) -> bool:
        # A bias is between a query and a key of the whole sequence, which the state does not keep.
        return self.spec.causal and not self.keeps_bias

    def terms(self, query: Tensor, key: Tensor, value: Tensor) -> list[Term]:
        whole = Term(
            query,
            key,
            value,
            alpha=self.alpha,
            local_scale=self.local_scale,
            conv_weight=self.conv_weight,
            activation="relu2",
            normalize=True,
        )
        if not self.averages:
            return [whole]
        # Widened: half precision counts to a few hundred.
        each = [ones(widen(x)) for x in (query, key, value)]
        return [
            replace(whole, alpha=None),
            replace(whole, local_scale=None, conv_weight=None),
            Term(each[0], each[1], each[2], alpha=1.0),
        ]

    def combine(self, outputs: Sequence[Tensor]) -> Tensor:
        if not self.averages:
            return super().combine(outputs)
        near, grouped, count = outputs
        return near + (grouped / count.clamp(min=1)).to(near.dtype)

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
        bias: Tensor | None = None,
    ) -> Tensor:
        """As every attention module; bias [1, H, T, S] is read, and needed, if `keeps_bias`."""
        start = query_start if self.spec.causal or self.spec.cross else None
        query, key, value = as_autocast(query, key, value)
        if key_mask is not None:
            query, key, value = without_padding(query, key, value, key_mask, self.spec.cross, always=False)
        terms = self.terms(query, key, value)
        if self.keeps_bias:
            table = _bias_by_lag(bias, self.group_size, self.spec.causal, start)
            terms[0] = replace(terms[0], local_bias=table)
        return self.combine([self.run(term, key_mask, start) for term in terms])

    def base(self, given: Given) -> Tensor:
        return widen(given.value).new_zeros(*given.query.shape[:3], given.value.shape[3])

    def columns(self, base: Tensor, given: Given, rows: Tensor) -> dict[str, Tensor]:
        found = {}
        query, key, value = map(widen, given[:3])
        plain = Term(query, key, value, activation="relu2", normalize=True)
        one = {"local_scale": replace(plain, local_scale=1.0), "alpha": replace(plain, alpha=1.0)}
        for name, term in one.items():
            if getattr(self, name) is not None:
                out = self.run(term, given.key_mask, given.query_start)
                if name == "alpha" and self.averages:
                    count = Term(ones(query), ones(key), ones(value), alpha=1.0)
                    out = out / self.run(count, given.key_mask, given.query_start).clamp(min=1)
                found[name] = of_queries(out, rows)[..., None]
        if self.conv_weight is not None:
            found["conv_weight"] = self.taps(given, rows)
        return found

    def complete(self, base: Tensor, given: Given) -> Tensor:
        *tokens, key_mask, query_start = given
        return self.forward(*tokens, key_mask=key_mask, query_start=query_start)


def _bias_by_lag(
    bias: Tensor | None, group_size: int, causal: bool, query_start: int | Tensor | None
) -> Tensor:
    """A relative position bias [1, H, T, S] as `ops.augmented_attention` wants it: [H, lags]."""
    if bias is None:
        raise InputError(
            "position_bias='local' needs a site that hands its bias to transformers' attention interface, as "
            "T5 does; use position_bias='drop'"
        )
    queries, keys = bias.shape[2], bias.shape[3]
    readable = type(bias) in (Tensor, nn.Parameter) and not bias.is_meta
    if readable and not torch.compiler.is_compiling():
        if bias.shape[0] != 1 or not torch.equal(bias[..., 1:, 1:], bias[..., :-1, :-1]):
            raise InputError(
                "this position bias does not depend on the distance alone; use position_bias='drop'"
            )
    lag = torch.arange(group_size, device=bias.device)
    start = keys - queries if query_start is None else query_start
    last = (start if causal else 0) + queries - 1
    past = _columns_at(bias[0, :, -1], last - lag)
    if causal:
        return past
    return torch.cat([_columns_at(bias[0, :, 0], lag[1:].flip(0)), past], dim=1)


def _columns_at(row: Tensor, index: Tensor) -> Tensor:
    """row [H, S] at `index`, zero where there is no such column."""
    inside = (index >= 0) & (index < row.shape[1])
    return row.index_select(1, index.clamp(0, row.shape[1] - 1)) * inside


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    *,
    group_size: int,
    causal: bool,
    cross: bool,
) -> Tensor:
    """With `grouped="mean"`, float64 [B, H, T, D] with heads repeated; alpha, local_scale [H]."""
    rest: dict[str, Any] = dict(group_size=group_size, causal=causal, cross=cross, conv_weight=None)
    near = core.augmented_attention(query, key, value, alpha=None, local_scale=local_scale, **rest)
    far = core.augmented_attention(query, key, value, alpha=alpha, local_scale=None, **rest)
    own = torch.arange(query.shape[2], dtype=query.dtype) // group_size
    count = own * group_size if causal else torch.full_like(own, key.shape[2])
    return near + far / count.clamp(min=1)[:, None]


def _build(spec: SiteSpec, config: Settings) -> PaperAttention:
    return PaperAttention(spec, config, alpha=0.0, local_scale=config.local_scale)


MECHANISM = Mechanism(
    name="augmented_paper",
    formula="local_scale * relu(q.k)^2 in the group + alpha * q.k over earlier groups + convolution of v",
    supports=EVERYWHERE,
    build=_build,
    augmentation=True,
    options={**POSITION_BIAS, **GROUPED},
)
