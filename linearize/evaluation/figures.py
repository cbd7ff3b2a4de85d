"""The figures of an evaluation: of one model, and of what was measured at one length."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """The figures of one model at one length; None where one does not apply or was not measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the scored tokens.
        forward_tokens_per_second: The rate of one pass over `length` tokens without a cache, all logits
            computed.
        decode_tokens_per_second: The rate of greedy decoding, one token at a time, up to `length` tokens.
        cache_bytes: The memory of the cache of one sequence of `length` tokens.
    """

    perplexity: float | None = None
    forward_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Measurement:
    """What was measured at one length.

    Attributes:
        length: Tokens of a window, or of the longest texts; None where batches were used as they are.
        tokens: How many tokens were scored.
        model: The figures of the model.
        reference: The figures of the reference.
        agreement: The share of the scored tokens at which the likeliest tokens of both models are the same.
        kl: Mean KL(reference || model) in nats.
        cosine: The mean cosine of both models' embeddings of the same text.
        spearman: The rank correlation of the similarities of all pairs of texts; None if all are the same.
    """

    length: int | None
    tokens: int
    model: Figures
    reference: Figures | None = None
    agreement: float | None = None
    kl: float | None = None
    cosine: float | None = None
    spearman: float | None = None
