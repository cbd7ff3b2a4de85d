"""Linformer (Wang et al., arXiv 2006.04768): keys and values projected along the sequence to r rows.

    o[t] = softmax_i(scale q[t].(E k)[i]) (F v)[i],   (E k)[i] = sum_j E[rank(j), i] k[j],  i < r

rank(j) counts the real keys before j, so padding, wherever it is, changes nothing. E and F [max_length, r]
are shared by all heads of the site (section 4's head-wise sharing). A sum over the whole sequence mixes the
future into every row, so causal sites are refused. `max_length` bounds the key columns, padding included;
more raise InputError. A query of a sequence without any real key gets zero.

Parallel form: two products along the sequence, then softmax over r rows: O(T r), no core call.
State: none, as there is no decoding; in cross-attention r rows are all that is kept of an encoder's output.
Initialisation: E and F Gaussian with variance 1 / r, from `seed` (the projection of the paper's proof).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.tensors import as_autocast, full_precision, widen
from .base import EVERYWHERE, Mechanism, whole
from .composed import ComposedAttention
from .spec import SiteSpec
from .summary import Summary

if TYPE_CHECKING:
    from .base import Settings


class LinformerAttention(ComposedAttention):
    multiplies_padding = True

    def __init__(self, spec: SiteSpec, config: Settings) -> None:
        super().__init__(spec, config)
        self.seed: int = config.option("seed")
        shape = (config.option("max_length"), config.option("rank"))
        self.key_projection = nn.Parameter(torch.empty(shape))
        self.value_projection = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        generator = torch.Generator("cpu").manual_seed(self.seed)
        with torch.no_grad():
            for projection in (self.key_projection, self.value_projection):
                drawn = torch.randn(projection.shape, generator=generator, device="cpu", dtype=torch.float32)
                projection.copy_(drawn * projection.shape[1] ** -0.5)

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        query_start: int | Tensor | None,
    ) -> Tensor:
        out = self._read(query, *self._project(key, value, key_mask))
        if key_mask is None or self.spec.cross:
            return out
        return out * key_mask[:, None, :, None]

    def summarize(self, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Summary:
        key, value = as_autocast(key, value)
        with full_precision(value.device):
            return Summary(self._project(key, value, key_mask), False, key_mask, None)

    def recall(
        self, query: Tensor, key: Tensor, value: Tensor, summary: Summary, query_start: int | Tensor | None
    ) -> Tensor:
        keys, values = summary.sums
        assert keys is not None and values is not None
        query, value = as_autocast(query, value)
        with full_precision(value.device):
            return self._read(query, keys, values).to(value.dtype)

    def _project(self, key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """E k [B, Hkv, 1, r, D] and F v [B, Hkv, 1, r, Dv]."""
        longest = self.key_projection.shape[0]
        if key.shape[2] > longest:
            raise InputError(
                f"linformer has projections for {longest} tokens and got {key.shape[2]}; convert with "
                "options={'max_length': ...} for longer sequences"
            )
        keys = self._rows(widen(key), self.key_projection, key_mask)
        return keys, self._rows(widen(value), self.value_projection, key_mask)

    def _read(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores = self.split_heads(widen(query) * self.scale) @ keys.mT
        return self.merge_heads(scores.softmax(-1) @ values)

    def _rows(self, x: Tensor, projection: Tensor, key_mask: Tensor | None) -> Tensor:
        """x [B, Hkv, S, D] -> [B, Hkv, 1, r, D]."""
        if key_mask is None:
            weights = projection[: x.shape[2]].to(x.dtype)
        else:
            rank = (key_mask.cumsum(1) - 1).clamp(min=0)
            weights = (projection[rank].to(x.dtype) * key_mask.unsqueeze(-1)).unsqueeze(1)
        return (weights.mT @ x).unsqueeze(2)

    def extra_repr(self) -> str:
        longest, rank = self.key_projection.shape
        return f"{super().extra_repr()}, max_length={longest}, rank={rank}, seed={self.seed}"


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    *,
    scale: float,
) -> Tensor:
    """float64 [B, H, T, D] with heads repeated; projections [max_length, r]."""
    key = torch.einsum("jr,bhjd->bhrd", key_projection[: key.shape[2]], key)
    value = torch.einsum("jr,bhjd->bhrd", value_projection[: value.shape[2]], value)
    return torch.softmax(query @ key.mT * scale, -1) @ value


MECHANISM = Mechanism(
    name="linformer",
    formula="softmax(scale q.(E k)) (F v), E and F along the sequence",
    supports=EVERYWHERE - {"causal"},
    build=LinformerAttention,
    options={
        "rank": whole(64, "rows that keys and values are projected to"),
        "max_length": whole(512, "longest sequence of keys, padding included"),
        "seed": whole(0, "seed of the first projections", least=0, most=2**32),
    },
)
