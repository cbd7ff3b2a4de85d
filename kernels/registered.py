"""`torch.ops.linearize.augmented_attention`: one node in any graph, whatever form computes it.

Being opaque is what makes a trace hold for every length: seen through, the number of groups would be compared
with 1 and with the length all over (views, contiguity), and a graph traced on a short input would be valid
for short inputs only. The backward recomputes the forward and differentiates it, so that training keeps the
arguments and nothing of size [T, G].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? alpha, Tensor? conv_weight, float local_scale, "
    "SymInt group_size, bool causal, bool cross, str kv_layout, Tensor? key_mask, SymInt? query_start, "
    "Tensor? query_start_tensor, bool normalize"
)
_DIFFERENTIABLE = 5
"""The first arguments: query, key, value, alpha, conv_weight."""


@torch.library.custom_op(
    "linearize::augmented_attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
def augmented_attention(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    """Arguments as in `linearize.ops.augmented_attention`, by position; query_start as int or as tensor."""
    return _forward(query, key, value, *options).contiguous()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Tensor | None,
    conv_weight: Tensor | None,
    local_scale: float,
    group_size: int,
    causal: bool,
    cross: bool,
    kv_layout: str,
    key_mask: Tensor | None,
    query_start: int | None,
    query_start_tensor: Tensor | None,
    normalize: bool,
) -> Tensor:
    return reference.augmented_attention(
        query,
        key,
        value,
        alpha=alpha,
        conv_weight=conv_weight,
        local_scale=local_scale,
        group_size=group_size,
        causal=causal,
        cross=cross,
        kv_layout=kv_layout,
        key_mask=key_mask,
        query_start=query_start if query_start_tensor is None else query_start_tensor,
        normalize=normalize,
    )


@augmented_attention.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    return value.new_empty((query.shape[0], query.shape[1], query.shape[2], value.shape[3]))


# Not a `custom_op`: those run with autograd switched off for good, and this one differentiates inside.
torch.library.define(
    "linearize::augmented_attention_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("linearize::augmented_attention_backward", "CompositeExplicitAutograd")
def _backward_impl(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Gradients of the differentiable arguments; an empty tensor for one that is None."""
    leaves: list[Any] = [None if x is None else x.detach().requires_grad_() for x in inputs[:_DIFFERENTIABLE]]
    with torch.enable_grad():
        out = _forward(*leaves, *inputs[_DIFFERENTIABLE:])
    found = iter(torch.autograd.grad(out, [x for x in leaves if x is not None], grad, materialize_grads=True))
    return tuple(grad.new_empty(0) if x is None else next(found).contiguous() for x in leaves)


@torch.library.register_fake("linearize::augmented_attention_backward")
def _backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(grad.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:_DIFFERENTIABLE])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.is_tensor = [isinstance(item, Tensor) for item in inputs]
    ctx.others = [None if isinstance(item, Tensor) else item for item in inputs]
    ctx.save_for_backward(*(item for item in inputs if isinstance(item, Tensor)))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if there else other for there, other in zip(ctx.is_tensor, ctx.others, strict=True)]
    rest = [None] * (len(inputs) - _DIFFERENTIABLE)
    if torch.is_grad_enabled():  # the caller will differentiate the gradients again
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
        out = _forward(*inputs)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
        return (*(next(found) if needed else None for needed in ctx.needs_input_grad),)
    grads = torch.ops.linearize.augmented_attention_backward(grad, *inputs)
    return (*(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), *rest)


augmented_attention.register_autograd(_backward, setup_context=_save)
