"""From the masks transformers builds to what linear attention needs: which keys are real tokens.

A softmax mask is a square `[B, 1, T, S]`; linear attention needs one row per sequence, `[B, S]`. Positions
(causal or not) are known from the plan and the column of the first query, so the square is only read to learn
which keys are padding, and to notice when it says something else. Where every dispatching site is rewritten,
`compact_mask` is what transformers builds instead, and no square exists at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..passes.mask import MASKED


def visible(mask: Tensor) -> Tensor:
    """Bool mask, True where a key may be seen, from a bool keep-mask or a float additive mask.

    Additive masks hide with -inf, the dtype's minimum, or a large negative number such as GPT's -1e4; the
    matcher draws the same line.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.dtype.is_floating_point:
        return mask != 0
    return mask > MASKED


def key_mask_of(mask: Tensor | None, batch: int, key_length: int) -> Tensor | None:
    """Real keys `[batch, key_length]` (bool, True is a real token) from a mask of 2 to 4 dimensions, or None.

    A key is real when some query sees it: under a causal mask that is its own query or a later one.
    """
    if mask is None:
        return None
    seen = visible(mask)
    if seen.ndim == 4:
        seen = seen.flatten(1, 2).any(1) if seen.shape[1] * seen.shape[2] != 1 else seen[:, 0, 0]
    elif seen.ndim == 3:
        seen = seen.any(1)
    seen = seen[..., :key_length]
    return seen.expand(batch, key_length)


def new_tokens(
    mask: Tensor | None,
    batch: int,
    count: int,
    start: int | Tensor | None,
    where: str,
    window: int | None = None,
) -> Tensor | None:
    """Which of the last `count` tokens are real, bool `[batch, count]`; None when the mask does not say.

    start: column of the first of them; masks may be wider than what was seen so far (static caches). window:
    of the site, which a square mask says too.
    """
    if mask is None:
        return None
    key_mask = key_mask_of(mask, batch, mask.shape[-1])
    assert key_mask is not None
    start = mask.shape[-1] - count if start is None else start
    if mask.ndim == 4 and mask.shape[2] == count:
        check_structure(mask, key_mask, True, start, where, window)
    columns = torch.arange(count, device=mask.device) + start
    return key_mask.index_select(1, columns)


def position_mask(
    query_length: int,
    key_length: int,
    start: int | Tensor | None,
    device: torch.device,
    window: int | None = None,
) -> Tensor:
    """Causal keep mask `[T, S]`: query t is column `start + t` (default: the last columns), and sees the last
    `window` columns, its own included (default: all)."""
    offset = key_length - query_length if start is None else start
    queries = torch.arange(query_length, device=device) + offset
    keys = torch.arange(key_length, device=device)
    seen = keys <= queries[:, None]
    return seen if window is None else seen & (keys > queries[:, None] - window)


def check_structure(
    mask: Tensor,
    key_mask: Tensor,
    causal: bool,
    start: int | Tensor | None,
    where: str,
    window: int | None = None,
) -> None:
    """Raise InputError unless `mask` says exactly "position pattern and real keys"; window: of a causal one.

    Packed documents, prefix masks and hand-made 4-D masks say more than linear attention can carry; running
    on would be silently wrong. Skipped while tracing (it reads values) and for one query (nothing more can be
    said).
    """
    if mask.ndim != 4 or mask.shape[2] == 1 or torch.compiler.is_compiling() or _is_traced(mask):
        return
    expected = key_mask[:, None, None, :]
    if causal:
        expected = expected & position_mask(mask.shape[2], key_mask.shape[1], start, mask.device, window)
    seen = visible(mask)[..., : key_mask.shape[1]]
    if bool((seen != expected).any()):
        kind = "causal" if causal else "bidirectional"
        raise InputError(
            f"{where or 'the model'}: the attention mask is not a {kind} mask with padding (packed sequences "
            "or a custom 4-D mask?), which the rewritten attention cannot follow; give a 2-D padding mask"
        )


def _is_traced(tensor: Tensor) -> bool:
    # Fake tensors (torch.export, meta device) have no values to look at.
    return type(tensor) is not Tensor or tensor.is_meta


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask interface of transformers: real keys as `[B, 1, 1, S]` bool, or None when every key is real.

    `mask_function` (causal, window, packed) is dropped on purpose: the plan already decided which positional
    pattern each site has, and refused the ones it cannot carry.
    """
    if attention_mask is None:
        return None
    keys = attention_mask[:, kv_offset : kv_offset + kv_length]
    missing = kv_length - keys.shape[-1]
    if missing > 0:
        # A static cache is longer than what was seen so far; the rest are empty slots.
        keys = torch.nn.functional.pad(keys, (0, missing))
    elif not torch.compiler.is_compiling() and not _is_traced(keys) and bool(keys.all()):
        return None
    return keys.to(torch.bool)[:, None, None, :]
