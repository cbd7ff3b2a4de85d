"""Decoding with a cache during the proof: what a model's own `generate` computes, with and without a cache.

A model is compared with itself: the steps with a cache must give the scores of the same tokens without one.
Not every original does that on every input (some read padding wrongly from their cache), so the inputs to
compare on are chosen with the original, and its own difference is allowed to the rewritten model too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.lookup import is_cache
from ..common.precise import wide
from ..common.running import call, floats, generates, shortened, without_cache
from ..errors import VerificationError

STEPS = 4
"""Tokens that are generated for the proof, and that a model without `generate` continues by."""
AGREES = 0.05
"""Difference, relative to the largest score, above which a model's own cache is called wrong."""

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Decoded:
    """Scores `[B, vocabulary]` of greedy steps, and the tokens `[B, steps]` that they chose.

    tokens: None for a model whose `generate` returns something else than one row for each sequence.
    """

    scores: tuple[Tensor, ...]
    tokens: Tensor | None = None


@dataclass(frozen=True)
class CacheProof:
    """Inputs on which the original's cache is right, how much it differs from no cache there, and how much a
    rewritten model may differ."""

    inputs: Inputs
    gap: float
    allowed: float


class _Chosen:
    """A logits processor that lets greedy decoding choose the given tokens `[B, steps]`, one call a step.

    Two tokens may have almost the same score, and where decodings choose differently they cannot be compared.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens, self._step = tokens, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self._tokens[:, self._step, None].to(scores.device)
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def decode(
    model: nn.Module, inputs: Inputs, chosen: Tensor | None = None, must: bool = False, **settings: Any
) -> Decoded | None:
    """A few greedy steps of the model's own `generate`; None if it cannot generate.

    Args:
        model: any module.
        inputs: its inputs; those of a decoder beside an encoder are left out.
        chosen: tokens `[B, steps]` to go on with instead of its own.
        must: raise VerificationError instead, because the original could.
        settings: more for `generate`.
    """
    live: Any = model
    if not generates(model) or not hasattr(live, "generate"):
        return None
    # Copies: there are models whose `generate` writes the token they begin with into what they are given.
    prompt = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in inputs.items()
        if not name.startswith(("decoder_", "labels"))
    }
    if chosen is not None:
        settings["logits_processor"] = [_Chosen(chosen)]
    try:
        out = live.generate(
            **prompt,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
    except Exception as error:
        if must:
            raise VerificationError(
                f"the rewritten model no longer generates: {shortened(error)}; nothing changed"
            ) from error
        # Models with a generate() of their own; the caller learns from None that decoding was not compared.
        return None
    scores = getattr(out, "logits", None)
    if scores is None:
        return None
    tokens, rows = getattr(out, "sequences", None), scores[0].shape[0]
    usable = isinstance(tokens, Tensor) and tokens.ndim == 2 and len(tokens) == rows and len(scores) == STEPS
    return Decoded(tuple(scores), tokens[:, -STEPS:] if tokens is not None and usable else None)


def cache_proof(
    model: nn.Module, examples: Sequence[Inputs], generated: Sequence[Decoded | None] = ()
) -> CacheProof | None:
    """The inputs on which `model`, decoding with a cache, computes what it does without one.

    The last of the examples for which that is so, for it is the padded one where there is one. None where no
    example shows it, or the model keeps no cache. generated: what `model` decodes, where that is known.
    """
    # Scores come back in float32, whatever the model computes in.
    rounding = max((tolerance(p.dtype) for p in model.parameters() if p.is_floating_point()), default=0.0)
    known = generated or [None] * len(examples)
    for example, decoded in zip(reversed(examples), reversed(known), strict=True):
        gap = cache_gap(model, example, cached=decoded)
        if gap is not None and gap <= max(AGREES, rounding):
            return CacheProof(example, gap, rounding + 4 * gap)
    return None


def cache_gap(
    model: nn.Module, example: Inputs, must: bool = False, cached: Decoded | None = None
) -> float | None:
    """Largest difference that decoding with a cache makes, relative to the largest score.

    None where the model does not decode, or not without a cache; must: raise VerificationError instead where
    it does not run. cached: what it decodes with a cache, where that is known.
    """
    if not generates(model):
        return _continued_gap(model, example, must)
    cached = decode(model, example, must=must, use_cache=True) if cached is None else cached
    if cached is None or cached.tokens is None:
        return None
    without = decode(model, example, cached.tokens, must=must, use_cache=False)
    return None if without is None else relative_gap(without.scores, cached.scores)


def _continued_gap(model: nn.Module, example: Inputs, must: bool) -> float | None:
    """As `cache_gap`, for a decoder without `generate`: its last tokens after a cache of those before."""
    name = next((n for n in ("input_ids", "inputs_embeds") if n in example), None)
    if name is None or "past_key_values" not in inspect.signature(model.forward).parameters:
        return None
    if any(isinstance(x, Tensor) and n.endswith("mask") and not bool(x.all()) for n, x in example.items()):
        return None  # positions of padded rows are for the caller to tell
    tokens = example[name]
    before = {name: tokens[:, :-STEPS], "use_cache": True}
    try:
        whole = floats(call(model, without_cache(model, {name: tokens})))
        cache = getattr(call(model, before), "past_key_values", None)
        if not is_cache(cache) or tokens.shape[1] <= STEPS:
            return None
        after = call(model, {name: tokens[:, -STEPS:], "past_key_values": cache, "use_cache": True})
    except Exception as error:
        if must:
            raise VerificationError(
                f"the rewritten model does not run with a cache: {shortened(error)}; nothing was changed"
            ) from error
        return None
    return relative_gap((whole[0][:, -STEPS:],), floats(after)[:1])


def verify_cache(model: nn.Module, proof: CacheProof | None) -> None:
    """Decoding with a cache equals decoding without one, by the converted model itself.

    What its caches hold has another form than that of exact attention, so the exact proof says nothing about
    them. Raises VerificationError.
    """
    if proof is None:
        return
    gap = cache_gap(model, proof.inputs, must=True)
    if gap is not None and not gap <= proof.allowed:
        raise VerificationError(
            f"decoding with a cache differs from decoding without one by {gap:.3g} of the largest score "
            f"(allowed {proof.allowed:.3g}), as if its cache held something else; nothing was changed"
        )


def relative_gap(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest finite value; infinite where only one of them is finite."""
    if len(expected) != len(found) or any(a.shape != b.shape for a, b in zip(expected, found, strict=True)):
        return float("inf")
    worst = size = 0.0
    for a, b in zip(expected, found, strict=True):
        same = (a == b) | (a - b).isfinite()  # masked scores are -inf in both
        if not bool(same.all()):
            return float("inf")
        error = (wide(a) - wide(b)).abs().nan_to_num(nan=0.0)
        worst = max(worst, error.max().item())
        size = max(size, wide(a).abs().nan_to_num(posinf=0.0).max().item())
    return worst / max(size, 1e-3)


def tolerance(dtype: torch.dtype) -> float:
    """Largest error relative to the largest value that reordering the sums may cause."""
    return {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}.get(
        dtype, 2e-4
    )
