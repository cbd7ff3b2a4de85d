"""What transformers' mask functions say: `f(batch, head, query, key) -> may be seen`, made of smaller ones.

A function that transformers made of its own parts is read from these parts, so that what is read is what it
says at every length. Of any other nothing is concluded.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

MaskFunction = Callable[..., Any]


def parts_of(function: MaskFunction) -> list[MaskFunction] | None:
    """The functions all of which must hold where `function` holds; None where one is not transformers'."""
    from transformers import masking_utils as made

    if function in (made.causal_mask_function, made.bidirectional_mask_function):
        return [function]
    if _was_made_by(function, made.and_masks):
        parts = [parts_of(part) for part in _captured(function)["mask_functions"]]
        return None if any(part is None for part in parts) else [f for part in parts for f in part or ()]
    positional = (made.sliding_window_overlay, made.sliding_window_bidirectional_overlay)
    if any(_was_made_by(function, overlay) for overlay in positional):
        return [function]
    if _was_made_by(function, made.packed_sequence_mask_function):
        return [function]
    if _was_made_by(function, made.remap_positions_for_packed_sequence):
        # Within a document positions go up by one, so there the function says what it says of columns.
        return parts_of(_captured(function)["mask_function"])
    return None


def documents_of(parts: list[MaskFunction]) -> Tensor | None:
    """Documents `[B, T]` as in `documents.py`, of the parts of a mask function; None without any."""
    from transformers import masking_utils as made

    for part in parts:
        if _was_made_by(part, made.packed_sequence_mask_function):
            numbers: Tensor = _captured(part)["packed_sequence_mask"]
            return numbers + 1
    return None


def one_document(
    function: MaskFunction, batch: int, queries: int, start: int | Tensor, device: torch.device
) -> Tensor:
    """Bool: every query sees the key before it, and the keys after the queries are all seen or all hidden.

    For graphs, which cannot look into a function: documents and blocks that see themselves show beside the
    diagonal.
    """
    row, head = (
        torch.arange(batch, device=device)[:, None],
        torch.zeros(1, 1, dtype=torch.long, device=device),
    )
    query = torch.arange(1, queries, device=device)[None] + start
    before, after = (function(row, head, a, b) for a, b in ((query, query - 1), (query - 1, query)))
    return before.all() & (after.all() | ~after.any())


def _was_made_by(function: MaskFunction, maker: MaskFunction) -> bool:
    """Whether `function` is one that `maker` defines and returns."""
    if not isinstance(function, FunctionType) or not isinstance(maker, FunctionType):
        return False
    return any(constant is function.__code__ for constant in maker.__code__.co_consts)


def _captured(function: Any) -> dict[str, Any]:
    """What a function refers to of the one that made it, by name."""
    cells = function.__closure__ or ()
    return {n: cell.cell_contents for n, cell in zip(function.__code__.co_freevars, cells, strict=True)}
