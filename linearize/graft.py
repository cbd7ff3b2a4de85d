"""The graft: owners that do not dispatch, plain modules and eager-only models.

The owner keeps its class (a subclass of it), parameters and children; its forward runs a graph of itself in
which the proved attention is replaced. Graphs are specific to dtype, device, training flag and the structure
of the arguments, are made when first needed, and are never copied or pickled: a copy makes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from . import cache as caches
from .attention import AttentionModule
from .errors import VerificationError
from .plan import SitePlan, child_name
from .subclass import Rewritten, become, original_class
from .variant import GraftError, Variant, trace


class Variants(dict[Any, list[Variant]]):
    """Graphs of one owner by form of call. Copies and pickles are empty."""

    def __deepcopy__(self, memo: Any) -> Variants:
        return Variants()

    def __copy__(self) -> Variants:
        return Variants()

    def __reduce__(self) -> Any:
        return Variants, ()


class GraftOwner(Rewritten):
    """Mixin of a rewritten owner that runs graphs of itself."""

    @staticmethod
    def run(owner: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the owner; `forward` is the original class's, used for tracing only."""
        cache = caches.find_cache(args, kwargs)
        layer = caches.self_layer(cache, owner._linearize_layer)
        caches.check_not_foreign(layer, owner._linearize_path)
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=caches.is_cache)
        tensors, shared = _distinct(leaves)
        past = 0 if layer is None else int(layer.get_seq_length())
        key = (owner.training, _form((args, kwargs)), shared, None if cache is None else min(past, 2))
        example = () if cache is None else _cache_example(owner, tensors, cache, past)
        sizes = [tensor.shape for tensor in (*tensors, *example)]
        known = owner._linearize_variants.setdefault(key, [])
        variant = next((variant for variant in known if variant.fits(sizes)), None)
        if variant is None:
            variant = _make(owner, forward, leaves, spec, example)
            known.append(variant)
        tensors.extend(example[:1])
        owner._linearize_start = caches.start_of_queries(layer)
        owner._linearize_seen = caches.decoded_length(cache, layer)
        try:
            return variant(owner, cache, tensors)
        finally:
            owner._linearize_start = owner._linearize_seen = None
            if cache is not None:
                caches.mark_filled(caches.self_layer(cache, owner._linearize_layer))


def apply_graft(owner: Any, path: str, sites: Sequence[SitePlan]) -> None:
    """Rewrite `owner` in place; its child modules are attached already. Graphs are made at the first call."""
    owner._linearize_path = path
    owner._linearize_layer = sites[0].layer_index
    owner._linearize_start = owner._linearize_seen = None
    owner._linearize_proof = False
    owner._linearize_log = None
    owner._linearize_padding = any("padding" in site.mask for site in sites)
    owner._linearize_plain = all(site.plain for site in sites)
    owner._linearize_slots = len(sites)
    owner._linearize_variants = Variants()
    become(owner, GraftOwner)
    if isinstance(owner, nn.MultiheadAttention):
        # A hooked module is what nn.TransformerEncoderLayer does not replace by its own fused call.
        owner.register_forward_hook(_keep_slow_path)


def use_no_nested_tensors(model: nn.Module) -> None:
    """`nn.TransformerEncoder` packs padded input into nested tensors, which rewritten layers do not take."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(m, GraftOwner) for m in module.modules()
        ):
            module.use_nested_tensor = False


def _keep_slow_path(module: nn.Module, args: Any, output: Any) -> None:
    return None


def _distinct(leaves: Sequence[Any]) -> tuple[list[Tensor], tuple[int, ...]]:
    """The tensors among `leaves`, each object once, and for every one in order which of those it is.

    Self-attention is often called with one tensor as query, key and value; the trace must know that they
    agree.
    """
    distinct: list[Tensor] = []
    places = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            place = next((i for i, tensor in enumerate(distinct) if tensor is leaf), len(distinct))
            if place == len(distinct):
                distinct.append(leaf)
            places.append(place)
    return distinct, tuple(places)


def _form(value: Any) -> Any:
    """What a graph is specific to: structure, dtypes, devices, axes of size one, and what is no tensor."""
    if isinstance(value, Tensor):
        return value.dtype, value.device, tuple(bool(size == 1) for size in value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(_form(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _form(item)) for name, item in value.items())
    if caches.is_cache(value):
        return "cache"
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


@torch.compiler.disable(recursive=True, reason="linearize: run the model once before compiling it")
def _make(owner: Any, forward: Any, leaves: list[Any], spec: Any, example: tuple[Tensor, ...]) -> Variant:
    """Trace the form of call that `leaves` has. Raises VerificationError when the owner cannot be grafted."""

    tensors, shared = _distinct(leaves)

    def rebuild(inputs: Sequence[Tensor], hole: Any) -> Any:
        rest = iter(shared)
        filled = [
            inputs[next(rest)] if isinstance(leaf, Tensor) else hole if caches.is_cache(leaf) else leaf
            for leaf in leaves
        ]
        return pytree.tree_unflatten(filled, spec)

    mixin = type(owner)
    owner.__class__ = original_class(mixin)
    try:
        return trace(owner, forward, rebuild, tensors, example, owner._linearize_slots)
    except Exception as error:
        # Capture raises nearly anything; what matters to the caller is that this owner cannot be grafted.
        raise VerificationError(
            f"{owner._linearize_path or 'the model'} ({mixin.__name__}) cannot be rewritten on its graph: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        owner.__class__ = mixin


def _cache_example(
    owner: Any, tensors: Sequence[Tensor], cache: Any, past: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Example past marker `[P]`, and keys `[B, Hkv, S, D]`, values `[B, Hkv, S, Dv]` of `cache.update`."""
    if hasattr(cache, "cross_attention_cache"):
        raise GraftError(f"{owner._linearize_path}: encoder-decoder caches are not followed on graphs")
    child: AttentionModule = getattr(owner, child_name(0))
    spec = child.spec
    hidden = next(tensor for tensor in tensors if tensor.is_floating_point())
    batch, length = hidden.shape[0], hidden.shape[1]
    total, _ = cache.get_mask_sizes(length, owner._linearize_layer or 0)
    shape = (batch, spec.num_key_value_heads, int(total))
    keys = hidden.new_empty(*shape, spec.head_dim, device="meta")
    values = hidden.new_empty(*shape, spec.value_dim, device="meta")
    return hidden.new_empty(past, device="meta"), keys, values
