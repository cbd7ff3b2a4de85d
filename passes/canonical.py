"""The exact canonical attention that every matched site is raised to.

`torch.ops.linearize.attention(query, key, value, terms, program, tiled)` runs the program of the site, step
by step in the original order and dtypes, on canonical layout. It is built from ATen operators, so autograd,
export, `torch.compile` and every decomposition see through it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .site import KVKind, Step

OP_NAME = "linearize::attention"


def encode(program: Sequence[Step]) -> str:
    """The program as text; terms are taken from the `terms` argument in order."""
    return json.dumps([[step.kind, step.value, step.term is not None] for step in program])


def repeat_heads(tensor: Tensor, num_heads: int, kind: KVKind | str) -> Tensor:
    """`[B, Hkv, S, D]` to `[B, num_heads, S, D]`: head h reads `h // groups`, or `h % Hkv` when tiled."""
    groups = num_heads // tensor.shape[1]
    if groups == 1:
        return tensor
    if kind == KVKind.TILED:
        return tensor.repeat(1, groups, 1, 1)
    return tensor.repeat_interleave(groups, dim=1)


def attention(
    query: Tensor, key: Tensor, value: Tensor, terms: list[Tensor], program: str, tiled: bool = False
) -> Tensor:
    """Softmax attention by `program`.

    query `[B, H, T, D]`, key `[B, Hkv, S, D]`, value `[B, Hkv, S, Dv]`, terms broadcastable to `[B, H, T, S]`
    (a sink: `[B, H, T, 1]`); returns `[B, H, T, Dv]`.
    """
    kind = KVKind.TILED if tiled else KVKind.INTERLEAVED
    key = repeat_heads(key, query.shape[1], kind)
    value = repeat_heads(value, query.shape[1], kind)
    steps = json.loads(program)
    remaining = iter(terms)
    if steps[0][0] == "sdpa":
        options = steps[0][1]
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=next(remaining, None),
            dropout_p=options["dropout"],
            is_causal=options["causal"],
            scale=options["scale"],
        )
    scores = torch.matmul(query, key.transpose(-1, -2))
    side = "last"
    for name, number, has_term in steps:
        term = next(remaining) if has_term else None
        if name == "sink":
            side = number
        scores = _run(name, number, term, scores, side)
    return torch.matmul(scores, value)


def _run(name: str, number: Any, term: Tensor | None, scores: Tensor, side: str) -> Tensor:
    """One step of the program; see `site.Step` for what each name means."""
    match name:
        case "scale":
            return scores * (number if term is None else term)
        case "div":
            return scores / (number if term is None else term)
        case "tanh":
            return torch.tanh(scores)
        case "offset":
            return scores + number
        case "add":
            assert term is not None
            return torch.add(scores, term, alpha=number) if number != 1.0 else scores + term
        case "fill":
            assert term is not None
            return scores.masked_fill(term.bool(), number)
        case "keep":
            assert term is not None
            return scores.masked_fill(~term.bool(), number)
        case "cast":
            return scores.to(getattr(torch, number))
        case "sink":
            assert term is not None
            column = term.expand(*scores.shape[:-1], 1)
            return torch.cat((scores, column) if number == "last" else (column, scores), dim=-1)
        case "drop_sink":
            return scores[..., :-1] if side == "last" else scores[..., 1:]
        case "softmax":
            return torch.softmax(scores, dim=-1, dtype=None if number is None else getattr(torch, number))
        case "safe_softmax":
            return torch.ops.aten._safe_softmax(
                scores, -1, None if number is None else getattr(torch, number)
            )
        case "dropout":
            return F.dropout(scores, number, training=True)
        case "nan_to_num":
            return torch.nan_to_num(scores)
    raise ValueError(f"unknown step {name!r} in an attention program")


_library = torch.library.Library("linearize", "FRAGMENT")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor[] terms, str program, bool tiled=False)"
    " -> Tensor"
)
_library.impl("attention", attention, "CompositeImplicitAutograd")
