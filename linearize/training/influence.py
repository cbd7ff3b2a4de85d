"""What each form of each attention layer costs the model, estimated for all of them from one backward pass.

To measure it takes a pass of the model for each layer and form. To second order it is known at once: where
one layer's output moves by d, the divergence KL(original || moved) is the mean of (g . d)^2 / 2, with g the
gradient, by that output, of the log-probability of tokens drawn from the original (the Fisher information).
So the model runs forward once and backward a few times, and each layer alone runs once in each form, on what
it gets in the original. Products of one token's d with another's are left out: a sum of squares needs far
fewer draws than the square of a sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InputError

DRAWS = 2
"""How often tokens are drawn: each draw is a backward pass, and halves the variance of what is estimated."""


@dataclass
class _Call:
    """A call of a layer in the original: its arguments, its output, and the gradients by it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    gradients: Sequence[Tensor] = ()

    def cost(self, layer: nn.Module) -> float:
        """The mean over draws of the sum over tokens of (g . d)^2 for what `layer` gives in this call."""
        moved = _main(layer(*self.args, **self.kwargs))[0] - self.output
        along = [(gradient.float() * moved.float()).sum(-1).square().sum() for gradient in self.gradients]
        return float(sum(along)) / len(along) if along else 0.0


def influence(
    model: nn.Module,
    paths: Sequence[str],
    forms: Sequence[Callable[[], None]],
    run: Callable[[], Tensor],
    draw: Callable[[Tensor, torch.Generator], Tensor],
) -> tuple[Tensor, dict[str, list[float]]]:
    """Estimate what each form of each layer costs on one batch.

    Args:
        model: The original.
        paths: Of its layers.
        forms: Each puts all layers into one form. They are in the original's at first, and at the end in the
            last of these.
        run: Runs the batch, and gives its outputs.
        draw: Gives, of the outputs, a number drawn at random; a change of the outputs costs the mean of the
            square of what it adds to that number.

    Returns:
        The outputs, and for each layer and form the estimate of what it costs when only that layer has that
        form.

    Raises:
        InputError: The outputs have no gradient by any layer's.
    """
    with _watched(model, paths) as calls, torch.enable_grad():
        output = run()
        every = [call for found in calls.values() for call in found]
        if not output.requires_grad:
            raise InputError(
                f"the output of {type(model).__name__} has no gradient by its layers, from which "
                "state_bytes= estimates what each costs; plan with budget= instead"
            )
        generator = torch.Generator(output.device).manual_seed(0)
        by = [call.output for call in every]
        drawn = [
            torch.autograd.grad(draw(output, generator), by, retain_graph=True, allow_unused=True)
            for _ in range(DRAWS)
        ]
    output = output.detach()
    for call, gradients in zip(every, zip(*drawn, strict=True), strict=True):
        call.output = call.output.detach()
        call.gradients = [gradient for gradient in gradients if gradient is not None]
    found: dict[str, list[float]] = {path: [] for path in paths}
    for put in forms:
        put()
        for path in paths:
            layer = model.get_submodule(path)
            found[path].append(sum(call.cost(layer) for call in calls[path]))
    return output, found


@contextlib.contextmanager
def _watched(model: nn.Module, paths: Sequence[str]) -> Iterator[Mapping[str, list[_Call]]]:
    """Every call of the layers while the block runs, with outputs that gradients can be taken by."""
    calls: dict[str, list[_Call]] = {path: [] for path in paths}
    copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def kept(value: Any) -> Any:
        """A copy, for the model may write into what it gave; one for all calls that get the same."""
        if not isinstance(value, Tensor):
            return value
        key = id(value), value._version
        if key not in copies:
            copies[key] = value, value.detach().clone()
        return copies[key][1]

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            args, kwargs = pytree.tree_map(kept, (args, kwargs))
            calls[path].append(_Call(args, kwargs, torch.empty(0)))

        return hook

    def after(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            result, with_result = _main(output)
            result = result if result.requires_grad else result.detach().requires_grad_()
            calls[path][-1].output = result
            return with_result(result.clone())  # the model may write into it

        return hook

    with contextlib.ExitStack() as stack:
        for path in paths:
            layer = model.get_submodule(path)
            stack.callback(layer.register_forward_pre_hook(before(path), with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after(path)).remove)
        yield calls


def _main(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The first floating tensor of a layer's output, and what makes the output with another in its place."""
    leaves, spec = pytree.tree_flatten(output)
    floating = (i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    place = next(floating, None)
    if place is None:
        raise InputError(f"an attention layer returns {type(output).__name__}, with no floating tensor in it")
    return leaves[place], lambda new: pytree.tree_unflatten(
        [*leaves[:place], new, *leaves[place + 1 :]], spec
    )
