"""From the masks transformers builds to what linear attention needs: which keys are real tokens.

A softmax mask is a square `[B, 1, T, S]`; linear attention needs one row per sequence, `[B, S]`. Positions
(causal or not) are known from the plan and the column of the first query, so the square is only read to learn
which keys are padding and where documents begin, and to notice when it says something else. Where every
dispatching site is rewritten, `compact_mask` is what transformers builds instead, and no square exists at
all: bool `[B, 1, 1, S]`, or int64 with the documents of `documents.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.checks import is_traced, require_true
from ..errors import InputError
from ..mechanisms.spec import SiteSpec
from ..passes.mask import MASKED
from .documents import of_square
from .mask_functions import documents_of, one_document, parts_of

PACKED_IN_GRAPH = (
    "packed documents (position_ids that restart) or blocks, which a compiled or exported model cannot "
    "follow; run it without compiling, or give an attention_mask"
)
DOCUMENTS_AND_CACHE = (
    "a row with several documents cannot continue a cache, nor be continued: start from an empty cache, or "
    "give each document a row of its own with padding and an attention_mask"
)
DOCUMENTS_APART = (
    "this attention has a window of its own, which can be followed in a row of several documents only where "
    "the tokens of each stand side by side"
)


def visible(mask: Tensor) -> Tensor:
    """Bool mask, True where a key may be seen, from a bool keep-mask or a float additive mask.

    Additive masks hide with -inf, the dtype's minimum, or a large negative number such as GPT's -1e4; the
    matcher draws the same line.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.dtype.is_floating_point:
        return mask > 0
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


def documents_of_row(mask: Tensor | None) -> Tensor | None:
    """Documents `[B, S]` where `compact_mask` gave them."""
    compact = mask is not None and mask.dtype == torch.int64 and mask.ndim == 4 and mask.shape[2] == 1
    return mask[:, 0, 0] if mask is not None and compact and mask.shape[3] > 1 else None


def new_tokens(key_mask: Tensor | None, count: int, start: int | Tensor | None) -> Tensor | None:
    """Which of the last `count` tokens are real, bool `[B, count]`; None when the mask does not say.

    start: column of the first of them; masks may be wider than what was seen so far (static caches).
    """
    if key_mask is None:
        return None
    start = key_mask.shape[-1] - count if start is None else start
    columns = torch.arange(count, device=key_mask.device) + start
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


def documents_in(
    mask: Tensor,
    key_mask: Tensor,
    spec: SiteSpec,
    start: int | Tensor | None,
    where: str,
    biased: bool = False,
) -> Tensor | None:
    """The documents of a mask that says "position pattern, real keys and documents"; None for one.

    Raises InputError where it says something else: a prefix or a mask made by hand may say more than linear
    attention can carry, and running on would be silently wrong. A graph cannot look at values, so there the
    comparison is an assertion, and documents are not carried. biased: finite values in the mask are the
    site's own.
    """
    if mask.ndim != 4 or mask.is_meta:
        return None
    seen = visible(mask)[..., : key_mask.shape[1]]
    sharp = None
    if mask.is_floating_point() and not biased:
        sharp = ((mask[..., : key_mask.shape[1]] == 0) | ~seen).all()
    kind = "causal" if spec.causal else "bidirectional"
    problem = (
        f"{where or 'the model'}: the attention mask is not a {kind} mask with padding and documents, "
        "and the rewritten attention follows no other; give one as in the example inputs, or padding alone"
    )
    if sharp is not None:
        require_true(sharp, problem)
    queries, keys = seen.shape[2], key_mask.shape[1]
    if seen.shape[1] > 1:  # heads may not see different keys
        require_true((seen == seen[:, :1]).all(), problem)
    if queries == 1:
        return None  # nothing more can be said of one query
    expected = key_mask[:, None, None, :]
    if spec.causal:
        expected = expected & position_mask(queries, keys, start, mask.device, spec.window)
    elif spec.window is not None:
        lag = torch.arange(queries, device=mask.device)[:, None] - torch.arange(keys, device=mask.device)
        expected = expected & (lag.abs() <= spec.window)
    same = (seen == expected).all()
    if is_traced(mask):
        require_true(same, f"{problem}, and packed documents without compiling")
        return None
    if bool(same):
        return None
    alike = seen.shape[1] == 1 or bool((seen == seen[:, :1]).all())
    if alike and queries == keys and not spec.cross:
        documents = of_square(seen, key_mask, spec.window is not None)
        number = documents.abs()
        expected = expected & (number[:, None, :, None] == number[:, None, None, :])
        if bool((seen == expected).all()):
            return documents
    raise InputError(problem)


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

    Of `mask_function` only documents are kept, as int64 `[B, 1, 1, S]`: the plan already decided which
    positional pattern (causal, window) each site has, and refused the ones it cannot carry. A function that
    may say more comes as the square it makes, which `documents_in` compares.
    """
    documents = None
    if mask_function is not None and q_length > 1:
        square = partial(
            _square,
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            kwargs,
        )
        device = kwargs.get("device") or torch.device("cpu")
        in_dynamo = torch.compiler.is_dynamo_compiling()  # which cannot look into a function
        parts = None if in_dynamo else parts_of(mask_function)
        documents = None if parts is None else documents_of(parts)
        if kwargs.get("use_vmap") or (parts is None and not in_dynamo):
            return square()
        if parts is None or (documents is not None and is_traced(documents)):
            one = one_document(mask_function, batch_size, q_length, q_offset, device)
            torch._assert_async(one, f"the attention mask has {PACKED_IN_GRAPH}")
            documents = None
    if attention_mask is None:
        return None if documents is None else documents[:, None, None, :]
    keys = attention_mask[:, kv_offset : kv_offset + kv_length]
    missing = kv_length - keys.shape[-1]
    if missing > 0:
        # A static cache is longer than what was seen so far; the rest are empty slots.
        keys = torch.nn.functional.pad(keys, (0, missing))
    elif not is_traced(keys) and bool(keys.all()):
        return None
    return keys.to(torch.bool)[:, None, None, :]


def _square(
    batch: int,
    queries: int,
    keys: int,
    query_start: int | Tensor,
    key_start: int,
    function: Callable[..., Any],
    padding: Tensor | None,
    settings: dict[str, Any],
) -> Tensor:
    """The mask as transformers makes it, bool `[B, 1, T, S]`."""
    from transformers.masking_utils import sdpa_mask

    settings = {**settings, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    made: Tensor | None = sdpa_mask(
        batch_size=batch,
        q_length=queries,
        kv_length=keys,
        q_offset=query_start,
        kv_offset=key_start,
        mask_function=function,
        attention_mask=padding,
        **settings,
    )
    assert made is not None
    return made
