"""The registered operators of `salient.py`'s attention: whole sequences, and tokens after a state.

Each is one opaque node in any graph: how many blocks there are, and when the next selection is due, is known
when it runs. Those with a state change its tensors in place and have no gradient.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import salient_chunk, salient_recurrent, salient_tail
from .dispatch import Choice, load, mixes, say
from .padding import Ranks
from .recomputed import recomputed
from .recurrent import along
from .salient import Sizes, State, new
from .softmax import Scores
from .tensors import take_rows

_SIZES = "SymInt window, SymInt sinks, SymInt salient, float scale, float? softcap"
_STATE = (
    "Tensor(a!) keys, Tensor(b!) values, Tensor(c!) scores, Tensor(d!) votes, "
    "Tensor(e!) length, Tensor(f!) block"
)
_READ_STATE = "Tensor keys, Tensor values, Tensor scores, Tensor votes, Tensor length, Tensor block"
_TOKENS = "Tensor query, Tensor key, Tensor value"


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    window: int,
    sinks: int,
    salient: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """See `salient_chunk.forward` and `bidirectional`. Fewer queries than keys are the last of a causal
    sequence whose other queries are gone: ValueError where those would choose the tokens that are seen."""
    sizes, rule = Sizes(window, sinks, salient), Scores(scale, softcap)
    if not causal:
        compiled = None if follows(query, key, value) else both_ways(query, key, value)
        if compiled is None:
            return salient_chunk.bidirectional(query, key, value, sizes, rule, key_mask)
        out = bidirectional(compiled, query.flatten(1, 2), key, value, key_mask, sizes, rule)
        return out.unflatten(1, query.shape[1:3])
    gone = key.shape[2] - query.shape[3]
    if gone:
        count = key.shape[2] if key_mask is None else int(key_mask.sum(1).max())
        problem = missing_queries(query.shape[3], count, sizes)
        if problem:
            raise ValueError(problem)
        query = F.pad(query, (0, 0, gone, 0))
    if not follows(query, key, value):
        batch, kv_heads, _, dim = key.shape
        state = new(batch, kv_heads, dim, value.shape[3], sizes, dtype=key.dtype, device=key.device)
        if after_state(query, key, value, state, sizes) is not None:
            return _after(query, key, value, state, sizes, rule, real=key_mask)[:, :, :, gone:]
    return salient_chunk.forward(query, key, value, sizes, rule, key_mask, extend=_after)[:, :, :, gone:]


def bidirectional(
    compiled: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    sizes: Sizes,
    rule: Scores,
    conv_weight: Tensor | None = None,
    tail_weight: Tensor | None = None,
) -> Tensor:
    """`salient_chunk.bidirectional` in the form that `both_ways` gave; arguments and output as for that."""
    tables = sizes, rule, conv_weight, tail_weight
    if key_mask is None:
        return compiled.attend(query, key, value, *tables, None)
    if bool((key_mask[:, 1:] <= key_mask[:, :-1]).all()):  # all padding comes last
        return compiled.attend(query, key, value, *tables, key_mask.sum(1))
    ranks = Ranks(key_mask)
    query, key, value = (ranks.to_front(x) for x in (query, key, value))
    return ranks.to_columns(compiled.attend(query, key, value, *tables, ranks.count))


def follows(*tensors: Tensor) -> bool:
    """Whether autograd would follow what is computed of the tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    window: int,
    sinks: int,
    salient: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, ...] | None:
    """Of `_attention` by query, key and value, in C++; None where that does not take the call."""
    sizes, rule = Sizes(window, sinks, salient), Scores(scale, softcap)
    if not causal or key.shape[2] != query.shape[3]:
        return None
    batch, kv_heads, _, dim = key.shape
    state = new(batch, kv_heads, dim, 1, sizes, dtype=key.dtype, device=key.device)
    compiled = after_state(query, key, value, state, sizes)
    if compiled is None:
        return None
    ranks = None if key_mask is None else Ranks(key_mask)
    tokens = [x if ranks is None else ranks.to_front(x) for x in (query, key, value)]
    positions = salient_chunk.select(tokens[0].float(), tokens[1].float(), sizes, rule, _after)
    if ranks is not None:
        grad = ranks.to_front(grad)
    found = compiled.backward(grad, *tokens, positions, sizes, rule, None if ranks is None else ranks.count)
    if ranks is not None:
        found = tuple(ranks.to_columns(x) for x in found)
    return tuple(x.to(y.dtype) for x, y in zip(found, (query, key, value), strict=True))


def after_state(query: Tensor, key: Tensor, value: Tensor, state: State, sizes: Sizes) -> ModuleType | None:
    """The compiled form of tokens [B, Hkv, R, T, D] after a state; None where there is none."""
    return _chosen("salient", query, key, value, state, sizes)


def both_ways(query: Tensor, key: Tensor, value: Tensor) -> ModuleType | None:
    """The compiled form of a whole sequence whose queries look both ways, None where there is none."""
    return _chosen("bidirectional", query, key, value)


def _chosen(name: str, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> ModuleType | None:
    """The C++ form of that name, where there is one and it takes the call; what runs is logged."""
    if not query.is_cpu:
        say(Choice("torch", f"on {query.device.type}, where `augmented` has no compiled form"))
        return None
    compiled = _library(name)
    reason = compiled if isinstance(compiled, str) else compiled.refusal(query, key, value, *rest)
    if reason is None:
        say(_COMPILED)
        assert isinstance(compiled, ModuleType)
        return compiled
    slow = isinstance(compiled, str) or mixes(query, key, value)
    say(Choice("torch", f"`augmented`: {reason}", slow))
    return None


_COMPILED = Choice("cpu", "`augmented`")


@cache
def _library(name: str) -> ModuleType | str:
    """A module of the C++ form, or one sentence saying why there is none."""
    library = load("cpu")
    reason = library if isinstance(library, str) else library.unavailable_reason()
    return import_module(f".cpu.{name}", __package__) if reason is None else reason


def _after(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    sizes: Sizes,
    rule: Scores,
    conv_weight: Tensor | None = None,
    real: Tensor | None = None,
    tail_weight: Tensor | None = None,
) -> Tensor:
    """`salient_recurrent.extend`, and `salient_tail.after_state`, in C++ where that takes the call."""
    compiled = after_state(query, key, value, state, sizes)
    if compiled is None:
        before = state.length.clone()
        out = salient_recurrent.extend(query, key, value, state, sizes, rule, conv_weight, real)
        if tail_weight is None:
            return out
        return salient_tail.after_state(query, out, tail_weight, before, real, sizes, rule.scale)
    tables = sizes, rule, conv_weight, tail_weight
    if real is None:
        return compiled.extend(query, key, value, state, *tables, None)
    ranks = Ranks(real)
    query, key, value = (ranks.to_front(x) for x in (query, key, value))
    return ranks.to_columns(compiled.extend(query, key, value, state, *tables, ranks.count))


def missing_queries(queries: int, keys: int, sizes: Sizes) -> str:
    """Why the last `queries` of `keys` tokens do not tell what they see; empty where they do.

    They do while all tokens are seen, and where no token is kept for the attention that it got.
    """
    if queries > keys or (sizes.salient and keys > sizes.window + 1 + sizes.kept):
        return (
            f"got {queries} queries and {keys} keys: tokens are chosen by the queries of all of them; after "
            f"more than {sizes.window + 1 + sizes.kept} tokens this needs the state that a model converted "
            "by linearize() keeps in an empty cache, or options={'salient': 0}"
        )
    return ""


def _fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((*query.shape[:4], value.shape[3]), dtype=dtype)


salient_attention = recomputed(
    "salient_attention", f"{_TOKENS}, Tensor? key_mask, bool causal, {_SIZES}", _attention, _fake, _gradients
)
"""`salient_chunk.forward`, or `bidirectional`, as an operator with gradients."""

torch.library.define(
    "linearize::salient_both_ways",
    f"({_TOKENS}, Tensor? key_mask, {_SIZES}, Tensor? conv_weight, Tensor? tail_weight) -> Tensor",
)
torch.library.define(
    "linearize::salient_extend",
    f"({_TOKENS}, {_STATE}, {_SIZES}, Tensor? conv_weight, Tensor? tail_weight, Tensor? real) -> Tensor",
)
torch.library.define(
    "linearize::salient_tree",
    f"({_TOKENS}, {_READ_STATE}, {_SIZES}, Tensor? conv_weight, Tensor depth, Tensor ancestors) -> Tensor",
)
torch.library.define("linearize::salient_append", f"({_TOKENS}, {_STATE}, {_SIZES}, Tensor? path) -> ()")
torch.library.register_fake("linearize::salient_extend", _fake)
torch.library.register_fake("linearize::salient_tree", _fake)


def _split(rest: tuple[Any, ...]) -> tuple[State, Sizes, Scores, tuple[Any, ...]]:
    """State, sizes, rule of the scores and what follows, of an operator's arguments after the tokens."""
    return State(*rest[:6]), Sizes(*rest[6:9]), Scores(*rest[9:11]), rest[11:]


@torch.library.register_fake("linearize::salient_both_ways")
def _both_ways_fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    batch, heads, length, _ = query.shape
    out = query.new_empty((batch, length, heads, value.shape[3]), dtype=torch.float32)
    return out.transpose(1, 2)


@torch.library.impl("linearize::salient_both_ways", "CompositeExplicitAutograd")
def _both_ways(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    window: int,
    sinks: int,
    salient: int,
    scale: float,
    softcap: float | None,
    conv_weight: Tensor | None,
    tail_weight: Tensor | None,
) -> Tensor:
    """`bidirectional` with convolution and tail, for calls that have a compiled form."""
    compiled = both_ways(query, key, value)
    if compiled is None:
        raise RuntimeError("this graph was made where the C++ form of `augmented` ran, and here it cannot")
    tables = Sizes(window, sinks, salient), Scores(scale, softcap), conv_weight, tail_weight
    return bidirectional(compiled, query, key, value, key_mask, *tables)


@torch.library.impl("linearize::salient_extend", "CompositeExplicitAutograd")
def _extend(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    state, sizes, rule, (conv_weight, tail_weight, real) = _split(rest)
    return _after(query, key, value, state, sizes, rule, conv_weight, real, tail_weight)


@torch.library.impl("linearize::salient_tree", "CompositeExplicitAutograd")
def _tree(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    state, sizes, rule, tree = _split(rest)
    return salient_recurrent.tree(query, key, value, state, sizes, rule, *tree)


@torch.library.impl("linearize::salient_append", "CompositeExplicitAutograd")
def _append(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    state, sizes, rule, (path,) = _split(rest)
    key, value, real = along(path, key, value)
    if path is not None:
        query = take_rows(query, path.clamp_min(0))
    _after(query, key, value, state, sizes, rule, real=real)


@torch.library.register_fake("linearize::salient_append")
def _append_fake(*arguments: Any) -> None:
    return None
