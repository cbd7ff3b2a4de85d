"""The registered operators of the constant-size state; what they compute is said in `recurrent.py`.

They change the state's tensors in place (declared as mutations, so `torch.compile` and `torch.export` know)
and have no gradient: training runs `torch.ops.linearize.augmented_attention` over whole sequences. Defined
without `custom_op`, whose wrapper costs more than the C++ step itself (measured: 64 of 82 microseconds).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import chunk, dispatch
from . import recurrent as plain
from .recurrent import State
from .registered import Options, Tables, compute_causal, floats
from .tensors import full_precision

_STATE = (
    "Tensor(a!) recurrent, Tensor(b!) key_window, Tensor(c!) value_window, "
    "Tensor(d!) length, Tensor(e!) folded"
)
_READ_STATE = "Tensor recurrent, Tensor key_window, Tensor value_window, Tensor length, Tensor folded"
_TABLES = (
    "Tensor? alpha, Tensor? local_scale, Tensor? conv_weight, "
    "str activation, SymInt group_size, bool normalize"
)
_TOKENS = "Tensor query, Tensor key, Tensor value"


torch.library.define(
    "linearize::augmented_extend", f"({_TOKENS}, {_STATE}, {_TABLES}, Tensor? key_mask, str? form) -> Tensor"
)
torch.library.define(
    "linearize::augmented_tree",
    f"({_TOKENS}, {_READ_STATE}, Tensor depth, Tensor ancestors, {_TABLES}, str? form) -> Tensor",
)
torch.library.define(
    "linearize::augmented_append",
    f"(Tensor key, Tensor value, {_STATE}, SymInt group_size, bool normalize, Tensor? path) -> ()",
)


@torch.library.impl("linearize::augmented_extend", "CompositeExplicitAutograd")
def _extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recurrent: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    length: Tensor,
    folded: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    key_mask: Tensor | None,
    form: str | None,
) -> Tensor:
    """Tokens after the state, one or many; see `linearize.ops.augmented_extend`."""
    state = State(recurrent, key_window, value_window, length, folded)
    tables, options = (alpha, local_scale, conv_weight), (activation, group_size, normalize)
    choice = dispatch.choose(
        query, key, value, conv_weight, None, activation, group_size, order="causal", form=form
    )
    dispatch.say(choice)
    with full_precision(query.device):
        if query.shape[2] == 1:
            active = None if key_mask is None else key_mask[:, 0]
            if choice.form == "torch":
                return plain.step(query, key, value, *state, *tables, *options, active)
            return dispatch.module(choice).step(query, key, value, *state, *floats(tables), *options, active)
        if bool((length == 0).all()):
            out = compute_causal(choice, query, key, value, tables, options, key_mask)
            path = None
            if key_mask is not None:
                path = torch.arange(key.shape[2], device=key.device).where(key_mask, -1)
            _commit(key, value, state, group_size, normalize, path)
            return out
        if choice.form == "cpu" and recurrent.dtype == torch.float32:
            tokens = [query, key, value]
            if key_mask is not None:  # whatever padding holds, NaN included
                tokens = [x.masked_fill(~key_mask[:, None, :, None], 0) for x in tokens]
            if _masks_may_multiply(tokens, state, normalize):
                compiled, found = dispatch.module(choice), []
                for start in range(0, query.shape[2], _PIECE):
                    piece = [x[:, :, start : start + _PIECE] for x in tokens]
                    real = None if key_mask is None else key_mask[:, start : start + _PIECE]
                    found.append(_chain(compiled, piece, state, floats(tables), options, real))
                return torch.cat(found, 2)
        return plain.extend(query, key, value, state, *tables, *options, key_mask)


def _masks_may_multiply(tokens: Sequence[Tensor], state: State, normalize: bool) -> bool:
    """Whether a compiled tree gives each token what it sees and nothing else; see `chunk.is_plain`."""
    query, key, value = tokens
    window = state.key_window, state.value_window
    return chunk.is_plain(query, key, value, normalize) and chunk.is_plain(query, *window, normalize)


_PIECE = 64
"""Tokens after a state at a time in C++: each costs as many products as there are."""


def _chain(
    compiled: Any, tokens: list[Tensor], state: State, tables: Tables, options: Options, real: Tensor | None
) -> Tensor:
    """Tokens after the state as a tree without branches, which is then committed; real: Bool [B, T]."""
    batch, count = tokens[1].shape[0], tokens[1].shape[2]
    each = torch.arange(count)
    depth, seen, path = each.expand(batch, -1), (each <= each[:, None]).expand(batch, -1, -1), None
    if real is not None:
        depth, path = (real.cumsum(1) - 1).clamp_min(0), each.where(real, -1)
        seen = seen & real[:, None]
    query, key, value = tokens
    out = compiled.tree(query, key, value, *state, depth, seen, *tables, *options)
    compiled.append(key, value, *state, *options[1:], path)
    return out if real is None else out.masked_fill(~real[:, None, :, None], 0)


@torch.library.register_fake("linearize::augmented_extend")
@torch.library.register_fake("linearize::augmented_tree")
def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return value.new_empty((query.shape[0], query.shape[1], query.shape[2], value.shape[3]))


@torch.library.impl("linearize::augmented_tree", "CompositeExplicitAutograd")
def _tree(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    recurrent: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    length: Tensor,
    folded: Tensor,
    depth: Tensor,
    ancestors: Tensor,
    alpha: Tensor | None,
    local_scale: Tensor | None,
    conv_weight: Tensor | None,
    activation: str,
    group_size: int,
    normalize: bool,
    form: str | None,
) -> Tensor:
    """Draft nodes after the state, which is only read; see `linearize.ops.augmented_tree`."""
    state = State(recurrent, key_window, value_window, length, folded)
    tables, options = (alpha, local_scale, conv_weight), (activation, group_size, normalize)
    choice = dispatch.choose(
        query, key, value, conv_weight, None, activation, group_size, order="causal", form=form
    )
    dispatch.say(choice)
    with full_precision(query.device):
        multiply = _masks_may_multiply((query, key, value), state, normalize)
        if choice.form == "torch" or (choice.form == "cpu" and not multiply):
            return plain.tree(query, key, value, *state, depth, ancestors, *tables, *options)
        return dispatch.module(choice).tree(
            query, key, value, *state, depth, ancestors, *floats(tables), *options
        )


@torch.library.impl("linearize::augmented_append", "CompositeExplicitAutograd")
def _append(
    key: Tensor,
    value: Tensor,
    recurrent: Tensor,
    key_window: Tensor,
    value_window: Tensor,
    length: Tensor,
    folded: Tensor,
    group_size: int,
    normalize: bool,
    path: Tensor | None,
) -> None:
    """Commit tokens whose outputs are known already; see `linearize.ops.augmented_commit`."""
    state = State(recurrent, key_window, value_window, length, folded)
    with full_precision(key.device):
        _commit(key, value, state, group_size, normalize, path)


def _commit(
    key: Tensor, value: Tensor, state: State, group_size: int, normalize: bool, path: Tensor | None
) -> None:
    """Tokens key [B, Hkv, T, D], value [B, Hkv, T, Dv] into the state: those of path [B, P], -1 for none."""
    choice = dispatch.choose(key, key, value, None, None, "linear", group_size, order="causal")
    if choice.form == "cpu" and state.recurrent.dtype == torch.float32 and key.shape[2]:
        dispatch.module(choice).append(key, value, *state, group_size, normalize, path)
    else:
        key, value, real = plain.along(path, key, value)
        plain.append(key, value, state, group_size, normalize, real)


@torch.library.register_fake("linearize::augmented_append")
def _append_fake(*arguments: Any) -> None:
    return None
