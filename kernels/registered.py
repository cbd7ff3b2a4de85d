"""`torch.ops.linearize.augmented_attention`: one node in any graph, whatever form computes it.

Being opaque is what makes a trace hold for every length: seen through, the number of groups would be compared
with 1 and with the length all over (views, contiguity), and a graph traced on a short input would be valid
for short inputs only. Training keeps the arguments alone, nothing of size [T, G].
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference, walk
from .padding import Ranks

_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? alpha, Tensor? local_scale, Tensor? conv_weight, "
    "Tensor? local_bias, str activation, SymInt group_size, bool causal, bool cross, Tensor? key_mask, "
    "SymInt? query_start, Tensor? query_start_tensor, bool normalize, str? form"
)
_DIFFERENTIABLE = 7
"""The first arguments: query to local_bias."""


@dataclass(frozen=True)
class Arguments:
    """One call, in the order of the schema; tables are [H, ...], heads interleaved (see `walk.forward`)."""

    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor | None
    local_scale: Tensor | None
    conv_weight: Tensor | None
    local_bias: Tensor | None
    activation: str
    group_size: int
    causal: bool
    cross: bool
    key_mask: Tensor | None
    query_start: int | None
    query_start_tensor: Tensor | None
    normalize: bool
    form: str | None

    @property
    def aligned(self) -> bool:
        """Causal, and the queries are the keys' own tokens."""
        return self.causal and self.query.shape[2] == self.key.shape[2]

    def choose(self) -> dispatch.Choice:
        """The form that runs this call. Raises ValueError when `form` asks for one that cannot."""
        return dispatch.choose(
            self.query,
            self.key,
            self.value,
            self.conv_weight,
            self.local_bias,
            self.activation,
            self.group_size,
            self.aligned,
            self.form,
        )


@torch.library.custom_op("linearize::augmented_attention", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor")
def augmented_attention(*arguments: Any) -> Tensor:
    """Arguments as in `linearize.ops.augmented_attention`, by position."""
    call = Arguments(*arguments)
    choice = call.choose()
    dispatch.say(choice)
    with _full_precision(call.query.device):
        if not call.aligned:
            return _composed(call).contiguous()
        ranks = _ranks(call)
        query, key, value = _to_front(ranks, call.query, call.key, call.value)
        out = _causal(choice, "forward", (query, key, value), call)
        return out if ranks is None else ranks.to_columns(out)


@augmented_attention.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
    return value.new_empty((query.shape[0], query.shape[1], query.shape[2], value.shape[3]))


# Not a `custom_op`: those run with autograd switched off for good, and this one differentiates inside.
torch.library.define(
    "linearize::augmented_attention_backward",
    f"(Tensor grad, {_SCHEMA}) -> ({', '.join(['Tensor'] * _DIFFERENTIABLE)})",
)


@torch.library.impl("linearize::augmented_attention_backward", "CompositeExplicitAutograd")
def _backward_impl(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of the differentiable arguments; an empty tensor for one that is None."""
    call = Arguments(*arguments)
    given = arguments[:_DIFFERENTIABLE]
    found: list[Tensor | None]
    with _full_precision(grad.device):
        if call.aligned:
            ranks = _ranks(call)
            tensors = _to_front(ranks, grad, call.query, call.key, call.value)
            found = [*_causal(call.choose(), "backward", tensors, call)]
            if ranks is not None:
                found[:3] = [ranks.to_columns(x) for x in found[:3] if x is not None]
        else:
            leaves: list[Any] = [None if x is None else x.detach().requires_grad_() for x in given]
            with torch.enable_grad():
                out = _composed(Arguments(*leaves, *arguments[_DIFFERENTIABLE:]))
            wanted = [x for x in leaves if x is not None]
            grads = iter(torch.autograd.grad(out, wanted, grad, materialize_grads=True))
            found = [None if x is None else next(grads) for x in leaves]
    return tuple(
        grad.new_empty(0) if x is None or like is None else x.to(like.dtype).contiguous()
        for x, like in zip(found, given, strict=True)
    )


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
        with _full_precision(grad.device):
            out = _composed(Arguments(*inputs), twice=True)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
        return (*(next(found) if needed else None for needed in ctx.needs_input_grad),)
    grads = torch.ops.linearize.augmented_attention_backward(grad, *inputs)
    return (*(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), *rest)


augmented_attention.register_autograd(_backward, setup_context=_save)


def _causal(choice: dispatch.Choice, direction: str, tensors: tuple[Tensor, ...], call: Arguments) -> Any:
    """`forward` or `backward` of the chosen form, on tokens without padding."""
    tables = (call.alpha, call.local_scale, call.conv_weight)
    options = (call.activation, call.group_size, call.normalize)
    if choice.form == "torch":
        result = getattr(walk, direction)(*tensors, *tables, *options, local_bias=call.local_bias)
        return result if direction == "forward" else result[:_DIFFERENTIABLE]
    floats = (None if x is None else x.float().contiguous() for x in tables)
    result = getattr(dispatch.load(choice.form), direction)(*tensors, *floats, *options)
    return result if direction == "forward" else (*result, None)


def _composed(call: Arguments, twice: bool = False) -> Tensor:
    return reference.augmented_attention(
        call.query,
        call.key,
        call.value,
        alpha=call.alpha,
        local_scale=call.local_scale,
        conv_weight=call.conv_weight,
        local_bias=call.local_bias,
        activation=call.activation,
        group_size=call.group_size,
        causal=call.causal,
        cross=call.cross,
        key_mask=call.key_mask,
        query_start=call.query_start if call.query_start_tensor is None else call.query_start_tensor,
        normalize=call.normalize,
        composed=twice,
    )


def _ranks(call: Arguments) -> Ranks | None:
    mask = call.key_mask
    # Most masks hide nothing; on a GPU asking costs a synchronisation, more than the reordering.
    if mask is None or (mask.device.type == "cpu" and bool(mask.all())):
        return None
    return Ranks(mask)


def _to_front(ranks: Ranks | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    if ranks is not None:
        return tuple(ranks.to_front(x) for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keep autocast from rounding the state; entered only when needed, so that plain graphs stay plain."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
