"""The seam: owners that dispatch through transformers' attention interface.

The owner keeps its Python, parameters and children. Two things change: its `config` becomes a copy that names
our registered attention function, and its class becomes a subclass of itself that notes where the queries of
the call start (the interface is never shown the cache). Everything else, dropout, checkpointing, LoRA, device
and dtype moves, is untouched Python.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import lookup as caches
from ..cache.adopt import cross_layer, state_layer
from ..errors import InvalidModelError
from ..mechanisms.module import AttentionModule, SoftmaxAttention
from ..planning.plan import SitePlan, child_name
from .masks import check_structure, compact_mask, key_mask_of, new_tokens, position_mask
from .owner import Rewritten, become

NAME = "linearize"


def register() -> None:
    """Make the attention function and its mask known to transformers. Idempotent."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function of the same name transformers drops every mask without a word.
    AttentionMaskInterface.register(NAME, compact_mask)


def dispatches(owner: nn.Module) -> bool:
    """Whether the owner may dispatch through the interface: it holds a transformers config that names one."""
    return hasattr(getattr(owner, "config", None), "_attn_implementation_internal")


class SeamOwner(Rewritten):
    """Mixin of a rewritten owner that dispatches through the attention interface."""

    @staticmethod
    def run(owner: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the owner: `forward` is the original class's."""
        cache, child = caches.find_cache(args, kwargs), sole_child(owner)
        owner._linearize_state = state = state_layer(cache, owner._linearize_layer, child)
        if state is not None:
            state.expected = True
        layer = caches.self_layer(cache, owner._linearize_layer)
        own = caches.own_layer(cache, owner._linearize_layer, child)
        caches.check_not_foreign(own, owner._linearize_path)
        whole = drops_window(owner) and state is None
        if whole:
            caches.keep_everything(cache, owner._linearize_layer)
            layer = caches.self_layer(cache, owner._linearize_layer)
        if state is None:
            owner._linearize_start = caches.start_of_queries(layer, whole)
        else:
            owner._linearize_start = caches.length_of(state)
        owner._linearize_seen = caches.decoded_length(cache, layer)
        owner._linearize_cross = cross_layer(cache, owner._linearize_layer, child)
        owner._linearize_slot = 0
        try:
            return forward(owner, *args, **kwargs)
        except BaseException:
            if state is not None:
                state.forget_since(owner._linearize_start)
            raise
        finally:
            owner._linearize_start = owner._linearize_seen = owner._linearize_state = None
            owner._linearize_cross = None
            if cache is not None:
                caches.mark_filled(caches.own_layer(cache, owner._linearize_layer, child))


def apply_seam(owner: Any, path: str, sites: Sequence[SitePlan]) -> None:
    """Rewrite `owner` in place; its child modules are attached by the caller."""
    register()
    owner.config = copy.copy(owner.config)
    owner.config._attn_implementation_internal = NAME
    owner._linearize_path = path
    owner._linearize_layer = sites[0].layer_index
    owner._linearize_plain = all(site.plain for site in sites)
    owner._linearize_start = owner._linearize_seen = owner._linearize_state = None
    owner._linearize_slot = 0
    owner._linearize_proof = False
    owner._linearize_log = None
    become(owner, SeamOwner)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered function: query `[B,H,T,D]`, key/value `[B,Hkv,S,*]` -> `[B,T,H,Dv]`, and no weights.

    `softcap`, `sliding_window`, `scaling` and `is_causal` are in the plan already; the identity check proves
    that the plan says the same.
    """
    if not isinstance(module, Rewritten):
        raise InvalidModelError(
            f"{type(module).__name__} was asked for attention '{NAME}' but was not rewritten by linearize(); "
            "set its attention implementation back to 'sdpa'"
        )
    slot = module._linearize_slot
    module._linearize_slot = slot + 1
    if module._linearize_log is not None:
        module._linearize_log.append((slot, kwargs.get("sliding_window")))
    start = module._linearize_start
    child = getattr(module, child_name(slot))
    if dropout and dropout != child.spec.dropout and isinstance(child, SoftmaxAttention):
        # The plan was made in evaluation mode, where the owner does not say how much it drops in training.
        child.spec = dataclasses.replace(child.spec, dropout=dropout)
    if module._linearize_seen is not None and child.spec.cross:
        # The decoder's own attention of this layer ran before and already counted this call's tokens.
        start = module._linearize_seen - query.shape[2]
    shared = child.spec.num_key_value_heads // key.shape[1]
    if shared > 1:
        # Keys and values that are shared in different ways count as one per query head in the plan; functions
        # of the interface are left to repeat them.
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    output = attend(module, slot, query, key, value, attention_mask, start, bias=position_bias, sinks=s_aux)
    return output.transpose(1, 2).contiguous(), None


def attention_children(owner: Any) -> list[Any]:
    """The owner's attention modules, told by what they have: PEFT wraps those it trains with an adapter."""
    return [child for child in owner.children() if hasattr(child, "has_state")]


def sole_child(owner: Any) -> AttentionModule | None:
    """The owner's one attention module; None when it has several, which would share a cache layer."""
    children = attention_children(owner)
    return children[0] if len(children) == 1 else None


def drops_window(owner: Any) -> bool:
    """Some site of the owner had a causal window, which its linear form does not follow."""
    children = attention_children(owner)
    return any(c.spec.window is not None and not isinstance(c, SoftmaxAttention) for c in children)


def exact_call(owner: Any, slot: int) -> bool:
    """Run the site's own program: its child is softmax, and no plain site is being proved."""
    child: AttentionModule = getattr(owner, child_name(slot))
    return isinstance(child, SoftmaxAttention) and not (owner._linearize_proof and owner._linearize_plain)


def attend(
    owner: Any,
    slot: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    start: int | Tensor | None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Run the owner's `slot`-th child on one call's tensors: `[B,H,T,D]`, `[B,Hkv,S,*]` -> `[B,H,T,Dv]`.

    start: column of the first query (causal sites; None for the last columns), or the position of the first
    query in its own sequence (cross-attention; None for 0).
    """
    child: AttentionModule = getattr(owner, child_name(slot))
    spec = child.spec
    start = start if spec.causal or spec.cross else None
    if owner._linearize_state is not None:
        state, real = owner._linearize_state, None
        if state.tree is None:  # the nodes of a draft tree are all real, and its mask is not causal
            real = new_tokens(mask, key.shape[0], key.shape[2], start, owner._linearize_path)
        return state.extend(child, query, key, value, real)
    key_mask = key_mask_of(mask, key.shape[0], key.shape[2])
    cross = owner._linearize_cross
    if cross is not None and key is cross.keys and value is cross.values:
        return child.recall(query, key, value, cross.summary(child, key_mask), start)
    if start is not None and spec.causal:
        # Static caches: slots after the last query are empty.
        columns = torch.arange(key.shape[2], device=key.device)
        filled = (columns < start + query.shape[2])[None].expand(key.shape[0], -1)
        key_mask = filled if key_mask is None else key_mask & filled
    softmax = isinstance(child, SoftmaxAttention)
    plain = owner._linearize_plain and bias is None and sinks is None
    if mask is not None and key_mask is not None and plain and (owner._linearize_proof or not softmax):
        check_structure(mask, key_mask, spec.causal, start, owner._linearize_path)
    if not softmax:
        more = {"bias": bias} if child.keeps_bias else {}
        return child(query, key, value, key_mask=key_mask, query_start=start, **more)
    if plain and owner._linearize_proof:
        # Exactly what the linear form will see: equality then proves the key mask and the start as well.
        return child(query, key, value, key_mask=key_mask, query_start=start)
    full = mask if mask is not None and mask.shape[-2] == query.shape[2] else None
    if full is None and spec.causal and bias is not None:
        full = position_mask(query.shape[2], key.shape[2], start, key.device)
    if bias is not None:
        full = _biased(bias[..., : key.shape[2]], full)
    return child(query, key, value, key_mask=key_mask, query_start=start, mask=full, sinks=sinks)


def _biased(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Additive mask of a score bias where `mask` (bool or additive) lets it be seen."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask
