"""Operators that are one node in any graph and whose backward recomputes the forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .saved import save, saved


def recomputed(
    name: str,
    arguments: str,
    run: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    differentiate: Callable[..., tuple[Tensor, ...] | None] = lambda *_: None,
) -> Any:
    """Register `linearize::{name}` and its derivative, which keeps the arguments and nothing else.

    Args:
        name: Of the operator.
        arguments: Its schema. The first three arguments are tensors and have gradients, the others none.
        run: What it computes, of differentiable PyTorch.
        fake: The same arguments to an empty tensor of the output's shape and dtype.
        differentiate: The gradient of the output and the arguments to the gradients of the first three, or
            None for a call that it does not take.

    Returns:
        The operator.
    """

    @torch.library.custom_op(f"linearize::{name}", mutates_args=(), schema=f"({arguments}) -> Tensor")
    def operator(*inputs: Any) -> Tensor:
        return run(*inputs).contiguous()

    operator.register_fake(fake)

    # Not a `custom_op`: those run with autograd switched off for good, and this one differentiates inside.
    derivative = f"linearize::{name}_backward"
    torch.library.define(derivative, f"(Tensor grad, {arguments}) -> (Tensor, Tensor, Tensor)")

    @torch.library.impl(derivative, "CompositeExplicitAutograd")
    def _backward_impl(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        found = differentiate(grad, *inputs)
        if found is not None:
            return found
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        with torch.enable_grad():
            out = run(*leaves, *inputs[3:])
        return tuple(x.contiguous() for x in torch.autograd.grad(out, leaves, grad))

    @torch.library.register_fake(derivative)
    def _backward_fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape) for x in inputs[:3])

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = saved(ctx)
        needed, rest = ctx.needs_input_grad[:3], (None,) * (len(inputs) - 3)
        if torch.is_grad_enabled():  # the caller will differentiate the gradients again
            wanted = [x for x, need in zip(inputs[:3], needed, strict=True) if need]
            found = iter(torch.autograd.grad(run(*inputs), wanted, grad, create_graph=True))
            return (*(next(found) if need else None for need in needed), *rest)
        grads = getattr(torch.ops.linearize, f"{name}_backward")(grad, *inputs)
        return (*(x if need else None for x, need in zip(grads, needed, strict=True)), *rest)

    operator.register_autograd(backward, setup_context=save)
    return operator
