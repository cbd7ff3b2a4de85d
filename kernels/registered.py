"""`torch.ops.linearize.augmented_attention`: one node in any graph, whatever form computes it.

Being opaque is what makes a trace hold for every length: seen through, the number of groups would be compared
with 1 and with the length all over (views, contiguity), and a graph traced on a short input would be valid
for short inputs only. Training keeps the arguments alone, nothing of size [T, G].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import chunk, dispatch, parallel
from .padding import Ranks
from .saved import save, saved
from .tensors import full_precision

_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? alpha, Tensor? local_scale, Tensor? conv_weight, "
    "Tensor? local_bias, str activation, SymInt group_size, bool causal, bool cross, Tensor? key_mask, "
    "SymInt? query_start, Tensor? query_start_tensor, bool normalize, str? form"
)
Tables = tuple[Tensor | None, Tensor | None, Tensor | None]
Options = tuple[str, int, bool]
_DIFFERENTIABLE = 7
"""The first arguments: query to local_bias."""


class Arguments(NamedTuple):
    """One call, in the order of the schema; tables are [H, ...], heads interleaved (see `chunk.forward`)."""

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
    def tables(self) -> Tables:
        return self.alpha, self.local_scale, self.conv_weight

    @property
    def options(self) -> Options:
        return self.activation, self.group_size, self.normalize

    @property
    def aligned(self) -> bool:
        """Causal, and the queries are the keys' own tokens."""
        return self.causal and self.query.shape[2] == self.key.shape[2]

    @property
    def order(self) -> dispatch.Order:
        """As `dispatch.choose` takes it."""
        if self.aligned:
            return "causal"
        return "other" if self.causal or self.cross else "both"

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
            self.order,
            self.form,
        )


@torch.library.custom_op("linearize::augmented_attention", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor")
def augmented_attention(*arguments: Any) -> Tensor:
    """Arguments as in `linearize.ops.augmented_attention`, by position."""
    call = Arguments(*arguments)
    choice = call.choose()
    dispatch.say(choice)
    with full_precision(call.query.device):
        tensors = (call.query, call.key, call.value)
        if call.aligned:
            return compute_causal(choice, *tensors, call.tables, call.options, call.key_mask, call.local_bias)
        if choice.form == "torch" or not (call.query.numel() and call.value.numel()):
            return _composed(call).contiguous()
        ranks = _ranks(call.key_mask)
        tokens = _to_front(ranks, *tensors)  # what stands behind the real tokens is zero and adds nothing
        out = dispatch.module(choice).forward_both(*tokens, *floats(call.tables), *call.options)
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
    with full_precision(grad.device):
        if call.aligned:
            found = _causal_backward(grad, call)
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


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = saved(ctx)
    rest = [None] * (len(inputs) - _DIFFERENTIABLE)
    if torch.is_grad_enabled():  # the caller will differentiate the gradients again
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed]
        with full_precision(grad.device):
            out = _composed(Arguments(*inputs), twice=True)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
        return (*(next(found) if needed else None for needed in ctx.needs_input_grad),)
    grads = torch.ops.linearize.augmented_attention_backward(grad, *inputs)
    return (*(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), *rest)


augmented_attention.register_autograd(_backward, setup_context=save)


@augmented_attention.register_vmap
def _vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    call, samples = _over_heads(info, in_dims, arguments), info.batch_size
    return augmented_attention(*call).unflatten(1, (samples, -1)), 1


@torch.library.register_vmap("linearize::augmented_attention_backward")
def _vmap_backward(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    samples = info.batch_size
    call = _over_heads(info, in_dims, arguments)
    grads = torch.ops.linearize.augmented_attention_backward(*call)
    split: list[Tensor] = []
    dims: list[int | None] = []
    for x in grads:
        none = x.dim() == 1 and x.shape[0] == 0  # the gradient of a table that is None
        dims.append(None if none else 1 if x.dim() == 4 else 0)
        split.append(x if none else x.unflatten(1 if x.dim() == 4 else 0, (samples, -1)))
    return tuple(split), tuple(dims)


def _over_heads(info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> list[Any]:
    """The mapped dimension joins the heads, so that every sample has its own tables and its own gradients.

    Only tensors with heads can be mapped over: a mask of its own per sample has no heads to join. Raises
    NotImplementedError for one, as torch's own rules do for what they cannot map.
    """
    call: list[Any] = []
    for x, dim in zip(arguments, in_dims, strict=True):
        if isinstance(x, Tensor) and (x.dim() - (dim is not None) == 4 or x.dtype.is_floating_point):
            x = x.movedim(dim, 0) if dim is not None else x.expand(info.batch_size, *x.shape)
            x = x.transpose(0, 1).flatten(1, 2) if x.dim() == 5 else x.flatten(0, 1)
        elif dim is not None:
            raise NotImplementedError(
                "vmap over key_mask or query_start: join the mapped dimension to the batch instead"
            )
        call.append(x)
    return call


def compute_causal(
    choice: dispatch.Choice,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tables,
    options: Options,
    key_mask: Tensor | None,
    local_bias: Tensor | None = None,
) -> Tensor:
    """The causal operator in the chosen form, padding removed and put back; arguments as in `Arguments`."""
    ranks = _ranks(key_mask)
    q, k, v = _to_front(ranks, query, key, value)
    plain = chunk.is_plain(q, k, v, options[2])
    if choice.form == "torch" or not plain:  # the compiled forms multiply what is masked by zero
        out = chunk.forward(q, k, v, *tables, *options, local_bias=local_bias, plain=plain)
    else:
        out = dispatch.module(choice).forward(q, k, v, *floats(tables), *options)
    return out if ranks is None else ranks.to_columns(out)


def _causal_backward(grad: Tensor, call: Arguments) -> list[Tensor | None]:
    choice, ranks = call.choose(), _ranks(call.key_mask)
    do, q, k, v = _to_front(ranks, grad, call.query, call.key, call.value)
    if choice.form == "torch":
        found = [*chunk.backward(do, q, k, v, *call.tables, *call.options, local_bias=call.local_bias)]
        found = found[:_DIFFERENTIABLE]
    else:
        compiled = dispatch.module(choice)
        found = [*compiled.backward(do, q, k, v, *floats(call.tables), *call.options), None]
    if ranks is not None:
        found[:3] = [ranks.to_columns(x) for x in found[:3] if x is not None]
    return found


def _composed(call: Arguments, twice: bool = False) -> Tensor:
    return parallel.augmented_attention(
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


def floats(tables: Tables) -> Tables:
    """Tables as the compiled forms read them."""
    alpha, local_scale, conv_weight = (None if x is None else x.float().contiguous() for x in tables)
    return alpha, local_scale, conv_weight


def _ranks(mask: Tensor | None) -> Ranks | None:
    # Most masks hide nothing; on a GPU asking costs a synchronisation, more than the reordering.
    if mask is None or (mask.device.type == "cpu" and bool(mask.all())):
        return None
    return Ranks(mask)


def _to_front(ranks: Ranks | None, *tensors: Tensor) -> Any:
    if ranks is not None:
        return tuple(ranks.to_front(x) for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
