from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Figures:
    """Of one model at one length; None where it does not apply or was not measured.

    perplexity: exp of the mean negative log-likelihood of the scored tokens. forward_tokens_per_second: of
    one pass over `length` tokens, without a cache, all logits computed. decode_tokens_per_second: greedy, one
    token at a time, up to `length`. cache_bytes: what the cache of one sequence of `length` tokens holds.
    """

    perplexity: float | None = None
    forward_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """What was measured at one length.

    length: tokens of a window, or that texts are cut to; None where batches came as they are. tokens: how
    many were scored. agreement: share of these at which both models' likeliest token is the same. kl: mean
    KL(reference || model) in nats. cosine: mean cosine of both models' embeddings of a text. spearman: rank
    correlation of the similarities of all pairs of texts, None where all are the same.
    """

    length: int | None
    tokens: int
    model: Figures
    reference: Figures | None = None
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    spearman: float | None = None
