"""The public face of the kernels: checked, documented functions on tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import registered, registered_recurrent  # noqa: F401 (registers the operators)
from ..kernels.dispatch import Choice
from ..kernels.tensors import as_autocast
from .arguments import (
    attention_arguments,
    check_names,
    check_state,
    choice,
    from_interleaved,
    interleaved_tables,
)
from .state import AttentionState


def conv_width(taps: int, causal: bool) -> int:
    """The number of columns of `conv_weight`: `taps` past tokens, or `2 * taps - 1` centred ones.

    Args:
        taps: Tokens on one side, the present one included.
        causal: Whether the convolution sees the present and the past only.

    Returns:
        The length of one head's filter.
    """
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
    """Augmented linear attention, differentiable in every tensor argument. The formula: `kernels/naive.py`.

    Attention dropout has no place here: it zeroes entries of a weight matrix that is never formed.

    Args:
        query: `[B, H, T, D]`, floating point, any strides. Under `torch.autocast` query, key and value are
            taken in its dtype, as scaled_dot_product_attention takes them.
        key: `[B, Hkv, S, D]`; H is a multiple of Hkv, and the heads are not repeated.
        value: `[B, Hkv, S, Dv]`. Sums are kept in float32 (float64 for float64 input).
        alpha: Weight of the linear part over other groups, one number or one per head, `[1]` or `[H]`; None
            leaves the part out.
        conv_weight: `[H, K]`. Causal: tap l weighs `value[t - l]`. Bidirectional: K is odd and tap l weighs
            `value[t + K // 2 - l]`. None, or `cross`, leaves the convolution out.
        local_scale: Weight of the part inside a group, as `alpha`.
        local_bias: Added to the weights inside a group by lag t - j, as T5 does: `[H, group_size]` for lags
            from 0 when causal, else `[H, 2 * group_size - 1]` for lags from -(group_size - 1).
        activation: What a score becomes inside a group: "relu2" (the paper's), "linear", "laplace" or "yoso".
        group_size: Tokens in a group, at least 1.
        causal: A query sees itself and earlier tokens; otherwise it sees everything.
        cross: Queries and keys are different sequences (not with `causal`). Query group i meets key group i.
        kv_layout: Query head h reads key/value head `h // (H // Hkv)` ("interleaved") or `h % Hkv` ("tiled").
        key_mask: Bool `[B, S]`, True for real tokens. Padded tokens, wherever they are, take part in nothing;
            groups and taps count real tokens only; the output of a padded query is zero.
        query_start: An int or a 0-d integer tensor (whose value is not checked). Causal: queries are the
            columns `[query_start, query_start + T)` of the key axis, by default the last T, and later columns
            are ignored. Cross: the position of the first query in its own sequence, by default 0.
        normalize: Divide query and key rows by their norms first. False: they have norm 1 already, or must
            stay as they are.
        form: "torch", "cpu" or "triton" insists on one form; None takes the one that `which` names.

    Returns:
        `[B, H, T, Dv]` in the dtype of `value`.

    Raises:
        InputError: The arguments do not fit together, or `form` cannot take the call.
    """
    arguments = attention_arguments(
        query,
        key,
        value,
        alpha,
        conv_weight,
        local_scale,
        local_bias,
        activation,
        group_size,
        causal,
        cross,
        kv_layout,
        key_mask,
        query_start,
        normalize,
        form,
    )
    if form is not None:
        choice(arguments)
    out = registered.augmented_attention(*arguments)
    return from_interleaved(out, key.shape[1]) if kv_layout == "tiled" else out


def which(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    alpha: Tensor | float | None = None,
    conv_weight: Tensor | None = None,
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
) -> Choice:
    """The form in which `augmented_attention` would run with the same arguments, and why.

    Args:
        query, key, value, ...: As for `augmented_attention`; nothing is computed with them.

    Returns:
        A `Choice` with `form` ("torch", "cpu", "triton"), `reason` (one sentence) and `slow` (True when a
        faster form exists for this device but cannot run here).

    Raises:
        InputError: The call would raise it.
    """
    return choice(
        attention_arguments(
            query,
            key,
            value,
            alpha,
            conv_weight,
            local_scale,
            local_bias,
            activation,
            group_size,
            causal,
            cross,
            kv_layout,
            key_mask,
            query_start,
            normalize,
            form,
        )
    )


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

    A whole prompt on an empty state, the prompt in pieces, and single tokens all give what one call over the
    whole sequence would give. There are no gradients: train with `augmented_attention`.

    Args:
        query: `[B, H, T, D]`.
        key: `[B, Hkv, T, D]`.
        value: `[B, Hkv, T, Dv]`.
        state: Made by `AttentionState.new` for the same sizes, group size and number of taps.
        alpha, conv_weight, local_scale, activation, kv_layout, normalize, form: As for `augmented_attention`.
        key_mask: Bool `[B, T]`. A False token changes nothing and its output is zero, so the rows of a batch
            may advance unevenly.

    Returns:
        `[B, H, T, Dv]` in the dtype of `value`.

    Raises:
        InputError: The arguments do not fit together or to the state, which is then unchanged.
    """
    check_state(query, key, value, conv_weight, state, key_mask)
    query, key, value = as_autocast(query, key, value)
    query, tables = interleaved_tables(query, key, alpha, local_scale, conv_weight, kv_layout)
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
    """Outputs of N draft tokens that form a tree after `state`, exact for every branch.

    The state is only read. A node's output is what `augmented_extend` would give after its ancestors: groups
    follow positions, and the convolution is unfolded along the branch (You et al., section 4.3), exactly at
    group borders too.

    Args:
        query: `[B, H, N, D]`.
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, Dv]`.
        state: As for `augmented_extend`.
        parents: Int `[N]` or `[B, N]`, the index of each node's parent, -1 for a child of the last committed
            token, parents before children; or their `lineage`, which several layers can share.
        alpha, conv_weight, local_scale, activation, kv_layout, normalize, form: As for `augmented_attention`.

    Returns:
        `[B, H, N, Dv]` in the dtype of `value`.

    Raises:
        InputError: A node comes before its parent, or the arguments do not fit.
    """
    depth, ancestors = lineage(parents, query.shape[0], query.shape[2], query.device)
    query, key, value = as_autocast(query, key, value)
    check_state(query, key, value, conv_weight, state, None)
    query, tables = interleaved_tables(query, key, alpha, local_scale, conv_weight, kv_layout)
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

    Args:
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, Dv]`.
        state: As for `augmented_extend`.
        path: Int `[B, P]`, the nodes to append in order, -1 for none, as rows accept different numbers;
            None appends all N.
        normalize: As for `augmented_attention`.

    Raises:
        InputError: The shapes do not fit, or the path names a node that does not exist.
    """
    check_state(key, key, value, None, state, None)
    if path is not None:
        path = checked_path(path, key)
    key, value = as_autocast(key, value)
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
    """A draft tree as the operators take it; `lineage` makes one."""

    depth: Tensor
    """int64 `[B, N]`: edges from a node to its root."""
    ancestors: Tensor
    """bool `[B, N, N]`: `[u, a]` is True when a is u or an ancestor of u."""


def lineage(parents: Tensor | Lineage, batch: int, nodes: int, device: torch.device) -> Lineage:
    """A draft tree as the operators take it, from the parent of each node.

    Args:
        parents: Int `[N]` or `[B, N]`, N at least 1, with -1 for a root; or a `Lineage`, which is given back.
        batch: B.
        nodes: N.
        device: Of the result.

    Returns:
        The tree's `Lineage`.

    Raises:
        InputError: The shape is another, or a node does not come after its parent (so a cycle cannot be
            written down).
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
