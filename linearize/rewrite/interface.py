"""The interface route: owners that dispatch through transformers' attention interface.

The owner keeps its Python, parameters and children. Two things change: its `config` becomes a copy that names
our registered attention function, and its class becomes a subclass of itself that gives the call to the
interface as a keyword argument (the interface is never shown the cache). Everything else, dropout,
checkpointing, LoRA, device and dtype moves, is untouched Python.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..cache import lookup as caches
from ..cache.adopt import cross_layer, keep_everything, state_layer
from ..common.checks import is_traced
from ..errors import InputError, InvalidModelError
from ..mechanisms.spec import SiteSpec
from ..passes.site import Pattern
from ..planning.plan import child_name
from .attend import attend
from .call import Call
from .documents import of_lengths
from .masks import compact_mask, position_mask
from .owner import OwnerRecord, Rewritten, become

NAME = "linearize"
KEYWORD = "linearize_call"
"""The keyword argument by which a call travels from the owner to the attention function."""


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


class InterfaceOwner(Rewritten):
    """Mixin of a rewritten owner that dispatches through the attention interface."""

    @staticmethod
    def run(owner: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the owner; `forward` is the original class's."""
        record: OwnerRecord = owner._linearize_owner
        record.check_unchanged(owner)
        cache, index = caches.find_cache(args, kwargs), record.layer_of(args, kwargs)
        child = None
        if cache is None:
            call = Call(owner, layer_index=index)
        else:
            children = [getattr(owner, child_name(slot)) for slot in range(len(record.sites))]
            child = children[0] if len(children) == 1 else None
            call = _call_with(cache, index, owner, children, child)
        if record.takes_keywords:
            kwargs = {**kwargs, KEYWORD: call}
        elif cache is not None:
            raise InvalidModelError(
                f"{record.name} takes no keyword arguments, by which a call with a cache would travel"
            )
        try:
            return forward(owner, *args, **kwargs)
        except BaseException:
            call.failed()
            raise
        finally:
            if cache is not None:
                call.ended(caches.own_layer(cache, index, child))


def _call_with(cache: Any, index: int | None, owner: Any, children: list[Any], child: Any) -> Call:
    """A call with a cache, its layer ready for it; child: the owner's only one, or None."""
    state = state_layer(cache, index, child)
    caches.check_not_foreign(caches.own_layer(cache, index, child), owner._linearize_owner.path)
    # A site whose window was dropped reads every key.
    whole = state is None and any(c.spec.window is not None and not c.is_exact for c in children)
    if whole:
        keep_everything(cache, index)
    call = Call(owner, cache, state, cross_layer(cache, index, child), whole, index)
    if state is not None:
        state.expected = True
    return call


def apply_interface(owner: Any, record: OwnerRecord) -> None:
    """Rewrite `owner` in place; its child modules are attached by the caller."""
    register()
    owner.config = copy.copy(owner.config)
    owner.config._attn_implementation_internal = NAME
    become(owner, InterfaceOwner, record)


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
    sinks: Tensor | None = None,
    linearize_call: Call | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered function: query `[B,H,T,D]`, key/value `[B,Hkv,S,*]` -> `[B,T,H,Dv]`, and no weights.

    `softcap`, `sliding_window`, `scaling` and `is_causal` are in the plan already; the identity check proves
    that the plan says the same.
    """
    call = _call_of(module) if linearize_call is None else linearize_call
    slot = call.next_slot()
    call.notice(slot, kwargs.get("sliding_window"))
    child = call.child(slot)
    key, value = (_heads_as_planned(x, child.spec) for x in (key, value))
    if attention_mask is None and child.is_exact:
        attention_mask = _unwritten_mask(call, slot, module, query, key, kwargs.get("is_causal"))
    # The plan was made in evaluation mode, where the owner does not say how much it drops in training.
    output = attend(
        call,
        child,
        query,
        key,
        value,
        attention_mask,
        bias=position_bias,
        sinks=sinks if s_aux is None else s_aux,
        dropout=dropout or None,
        documents=None if key.shape[2] != query.shape[2] else _flattened(query, kwargs.get("cu_seq_lens_q")),
    )
    return output.transpose(1, 2).contiguous(), None


def _unwritten_mask(
    call: Call, slot: int, module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None
) -> Tensor | None:
    """Causal mask of a site whose own mask is not understood, in a call for which transformers writes none.

    For SDPA it leaves out a mask that would say nothing but causality, which SDPA then does by itself.
    """
    unread = call.record.sites[slot].mask.startswith(Pattern.OTHER.value)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not (unread and causal and call.record.implementation == "sdpa" and query.shape[2] > 1):
        return None
    return position_mask(query.shape[2], key.shape[2], 0, query.device)[None, None]


def _heads_as_planned(x: Tensor, spec: SiteSpec) -> Tensor:
    """Keys or values with the number of heads that the plan knows.

    Those that are shared in different ways count as one per query head there; functions of the interface are
    left to repeat them. An owner that repeats them itself gives more, and the plan knows how it does.
    """
    shared, repeated = spec.num_key_value_heads // x.shape[1], x.shape[1] // spec.num_key_value_heads
    if shared > 1:
        return x.repeat_interleave(shared, 1)
    if repeated > 1:
        return x[:, : spec.num_key_value_heads] if spec.kv_layout == "tiled" else x[:, ::repeated]
    return x


def _flattened(query: Tensor, ends: Tensor | None) -> Tensor | None:
    """Documents `[1, T]` of the one row that transformers' flattening collator makes; None for one document.

    ends: `cu_seq_lens_q` of the collator, which only flash attention obeys: other implementations go by the
    position ids, and by nothing at all when there is a cache.
    """
    if ends is None or ends.shape[0] <= 2:
        return None
    if query.shape[0] != 1 or is_traced(ends):
        raise InputError(
            f"cu_seq_lens_q of {ends.shape[0] - 1} documents can be followed in one flattened row, and "
            f"without compiling; this call has {query.shape[0]} rows"
        )
    return of_lengths(ends.to(query.device), query.shape[2])


def _call_of(module: nn.Module) -> Call:
    """The call of an owner that keeps keyword arguments to itself, which is enough where order is nothing.

    Raises InvalidModelError where the call knows more than the module: a causal site, or several sites.
    """
    if not isinstance(module, Rewritten):
        raise InvalidModelError(
            f"{type(module).__name__} was asked for attention '{NAME}' but was not rewritten by linearize(); "
            "set its attention implementation back to 'sdpa'"
        )
    record = module._linearize_owner
    if len(record.sites) > 1 or record.sites[0].spec.causal:
        raise InvalidModelError(
            f"{record.name} does not pass its keyword arguments on to the attention interface"
        )
    return Call(module)
