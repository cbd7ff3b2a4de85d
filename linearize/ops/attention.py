"""The public face of the kernels: checked, documented functions on tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import registered, registered_recurrent  # noqa: F401 (registers the operators)
from ..kernels.dispatch import Choice
from .arguments import (
    attention_arguments,
    check_names,
    check_state,
    choice,
    from_interleaved,
    stateful_tables,
)
from .state import AttentionState


def conv_width(taps: int, causal: bool) -> int:
    """Length of one head's convolution: `taps` past tokens, or `2 * taps - 1` centred ones."""
    return taps if causal else 2 * taps - 1


def augmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: Tensor | float | None,
    conv_weight: Tensor | None,
    local_scale: Tensor | float | None = 1.0,
    local_bias: Tensor | None = None,
    activation: str = "relu2",
    group_size: int = 64,
    causal: bool = True,
    cross: bool = False,
    kv_layout: str = "interleaved",
    key_mask: Tensor | None = None,
    query_start: int | Tensor | None = None,
    normalize: bool = True,
    form: str | None = None,
) -> Tensor:
    """Augmented linear attention (formula: `kernels/naive.py`), differentiable in every tensor argument.

    Args:
        query: `[B, H, T, D]`, any strides; H is a multiple of Hkv. Floating point; sums are kept in float32
            (float64 for float64 input).
        key: `[B, Hkv, S, D]`, not repeated.
        value: `[B, Hkv, S, Dv]`, not repeated.
        alpha: weight of the grouped linear part, one number or one per head, `[1]` or `[H]`; None leaves it
            out.
        conv_weight: `[H, K]`; causal: tap l weights `value[t - l]`; bidirectional: K odd, tap l weights
            `value[t + K // 2 - l]`. None, or `cross`, leaves the convolution out.
        local_scale: weight of the part inside a group of `group_size` tokens, as alpha.
        local_bias: added to the weights inside a group by lag t - j (T5): `[H, group_size]` for lags 0.. when
            causal, else `[H, 2 * group_size - 1]` for lags -(group_size - 1)...
        activation: what a score becomes inside a group: "relu2" (the paper's), "linear", "laplace" or "yoso".
        causal: a query sees earlier tokens and itself; otherwise everything.
        cross: queries and keys are different sequences (not with `causal`). Query group i meets key group i.
        kv_layout: query head h reads key/value head `h // (H // Hkv)` ("interleaved") or `h % Hkv` ("tiled").
        key_mask: bool `[B, S]`, True for real tokens. Padded tokens, wherever they are, take part in nothing,
            and groups and taps count real tokens only; the output of a padded query is zero.
        query_start: causal: queries are the columns `[query_start, query_start + T)` of the key axis, by
            default the last T; later columns are ignored. cross: position of the first query in its own
            sequence, by default 0. An int or a 0-d integer tensor (whose value is not checked).
        normalize: divide query and key rows by their norm first (False: they already are, or must not be).
        form: "torch", "cpu" or "triton" insists on one form; None takes what `which` names.

    Returns `[B, H, T, Dv]` in the dtype of `value`. Attention dropout has no place here: it zeroes entries of
    a weight matrix that is never formed. Raises InputError when arguments do not fit together.
    """
    arguments = attention_arguments(**locals())
    if form is not None:
        choice(arguments)
    out = registered.augmented_attention(*arguments)
    return from_interleaved(out, key.shape[1]) if kv_layout == "tiled" else out


def which(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Choice:
    """The form that `augmented_attention` would run with the same arguments, and why.

    Returns a `Choice` with `form` ("torch", "cpu", "triton"), `reason` (one sentence) and `slow` (True when a
    faster form exists for this device but cannot run here). Raises InputError as the call would.
    """
    defaults = augmented_attention.__kwdefaults__ or {}
    unknown = options.keys() - defaults.keys() - {"alpha", "conv_weight"}
    if unknown:
        raise InputError(f"augmented_attention has no argument {', '.join(sorted(unknown))}")
    given = {"alpha": None, "conv_weight": None, **defaults, **options}
    return choice(attention_arguments(query=query, key=key, value=value, **given))


def augmented_extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState,
    *,
    alpha: Tensor | float | None,
    conv_weight: Tensor | None,
    local_scale: Tensor | float | None = 1.0,
    activation: str = "relu2",
    kv_layout: str = "interleaved",
    key_mask: Tensor | None = None,
    normalize: bool = True,
    form: str | None = None,
) -> Tensor:
    """Causal `augmented_attention` of the next T tokens after `state`, which is brought up to date in place.

    Prefill (any T on an empty state), chunked prefill and single steps give what one call over the whole
    sequence would. query: `[B, H, T, D]`, key: `[B, Hkv, T, D]`, value: `[B, Hkv, T, Dv]`; the rest as in
    `augmented_attention`, with the options the state was made for (`AttentionState.new`).
    key_mask: bool `[B, T]`; a False token changes nothing and its output is zero, so rows may advance
    unevenly.

    Returns `[B, H, T, Dv]`. No gradients: train with `augmented_attention`. Raises InputError when arguments
    do not fit together or to the state, which is then unchanged.
    """
    check_state(query, key, value, conv_weight, state, key_mask)
    query, tables = stateful_tables(query, key, alpha, local_scale, conv_weight, kv_layout)
    options = (activation, state.group_size, normalize)
    check_names(activation, form)
    out = torch.ops.linearize.augmented_extend(
        query, key, value, *state.tensors, *tables, *options, key_mask, form
    )
    return from_interleaved(out, key.shape[1]) if kv_layout == "tiled" else out


def augmented_tree(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: AttentionState,
    parents: Tensor | Lineage,
    *,
    alpha: Tensor | float | None,
    conv_weight: Tensor | None,
    local_scale: Tensor | float | None = 1.0,
    activation: str = "relu2",
    kv_layout: str = "interleaved",
    normalize: bool = True,
    form: str | None = None,
) -> Tensor:
    """Outputs of N draft tokens that form a tree after `state`, exact for every branch; the state is only
    read.

    query: `[B, H, N, D]`, key: `[B, Hkv, N, D]`, value: `[B, Hkv, N, Dv]`. parents: int `[N]` or `[B, N]`,
    the index of each node's parent, -1 for a child of the last committed token, parents before children; or
    their `lineage`, which several layers can share. A node's output is what `augmented_extend` would give
    after its ancestors: groups follow positions, and the convolution is unfolded along the branch (You et
    al., section 4.3), exact at group borders too.

    Returns `[B, H, N, Dv]`. Raises InputError for a node before its parent, or arguments that do not fit.
    """
    check_state(query, key, value, conv_weight, state, None)
    depth, ancestors = lineage(parents, query.shape[0], query.shape[2], query.device)
    query, tables = stateful_tables(query, key, alpha, local_scale, conv_weight, kv_layout)
    options = (activation, state.group_size, normalize)
    check_names(activation, form)
    out = torch.ops.linearize.augmented_tree(
        query, key, value, *state.tensors, depth, ancestors, *tables, *options, form
    )
    return from_interleaved(out, key.shape[1]) if kv_layout == "tiled" else out


def augmented_commit(
    key: Tensor, value: Tensor, state: AttentionState, path: Tensor | None = None, *, normalize: bool = True
) -> None:
    """Append tokens whose outputs are known already, such as the accepted branch of a tree, in place.

    key: `[B, Hkv, N, D]`, value: `[B, Hkv, N, Dv]`. path: int `[B, P]`, the nodes to append in order, -1 for
    nothing (rows accept different numbers); None appends all N. Raises InputError when shapes do not fit.
    """
    check_state(key, key, value, None, state, None)
    if path is not None:
        path = checked_path(path, key)
    torch.ops.linearize.augmented_append(key, value, *state.tensors, state.group_size, normalize, path)


def checked_path(path: Tensor, key: Tensor) -> Tensor:
    """The path as int64 `[B, P]`. Raises InputError for another shape or dtype, or nodes there are not."""
    if path.dim() != 2 or path.shape[0] != key.shape[0] or path.is_floating_point():
        raise InputError(f"path must be integers [{key.shape[0]}, P], got {path.dtype} {tuple(path.shape)}")
    # On a GPU looking would cost a synchronisation, and indexing checks it there.
    if path.is_cpu and path.numel() and int(path.max()) >= key.shape[2]:
        raise InputError(f"path names node {int(path.max())}, and there are {key.shape[2]}")
    return path.long()


class Lineage(NamedTuple):
    """A draft tree as the operators take it: see `lineage`."""

    depth: Tensor
    ancestors: Tensor


def lineage(parents: Tensor | Lineage, batch: int, nodes: int, device: torch.device) -> Lineage:
    """Depth int64 `[B, N]` and ancestors-or-self bool `[B, N, N]` of a tree given by its parents.

    parents: int `[N]` or `[B, N]`, N at least 1; or a `Lineage`, which is given back. Raises InputError for
    another shape, or a node that is not after its parent (so a cycle cannot be written down).
    """
    if isinstance(parents, Lineage):
        if parents.depth.shape != (batch, nodes):
            raise InputError(f"the tree is of shape {tuple(parents.depth.shape)}, not {(batch, nodes)}")
        return parents
    shape = tuple(parents.shape)
    if parents.is_floating_point() or shape not in ((nodes,), (batch, nodes)) or not nodes:
        raise InputError(
            f"parents must be integers [{nodes}] or [{batch}, {nodes}], one at least, got {parents.dtype} "
            f"{shape}"
        )
    depths: list[int] = []
    seen = bytearray()
    for tree in [parents.tolist()] if len(shape) == 1 else parents.tolist():
        rows: list[bytes] = []
        for node, parent in enumerate(tree):
            if not -1 <= parent < node:
                raise InputError(
                    "every node of the tree must come after its parent, and a root has parent -1"
                )
            row = bytearray(nodes) if parent < 0 else bytearray(rows[parent])
            row[node] = 1
            rows.append(bytes(row))
            depths.append(0 if parent < 0 else depths[len(depths) - node + parent] + 1)
        seen += b"".join(rows)
    depth = torch.tensor(depths, dtype=torch.int64).view(-1, nodes)
    ancestors = torch.frombuffer(seen, dtype=torch.bool).view(-1, nodes, nodes)
    return Lineage(
        depth.to(device).expand(batch, -1).contiguous(),
        ancestors.to(device).expand(batch, -1, -1).contiguous(),
    )
