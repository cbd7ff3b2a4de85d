"""What torch.export is told and spared while it traces a module: context managers around one export.

All of them work by hooks on the modules, which are taken off again, and hold for the thread with the lock.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._sympy.functions import FloorDiv

Place = tuple[str, int]
"""An axis of an input: the name that export gives the input, and the axis."""

_DETECTS = {nn.TransformerEncoder: "is_causal", nn.TransformerDecoder: "tgt_is_causal"}
"""Modules that look at the values of a mask where this argument is None."""


def input_tensors(bound: inspect.BoundArguments) -> dict[str, Tensor]:
    """The tensors among the arguments of a call, by the names that export gives their placeholders."""
    leaves = pytree.tree_flatten_with_path(dict(bound.arguments))[0]
    return {
        "_".join(re.sub(r"\W", "", str(key)).lower() for key in path): value
        for path, value in leaves
        if isinstance(value, Tensor)
    }


@contextlib.contextmanager
def undetected_causality(module: nn.Module) -> Iterator[None]:
    """Inside, torch's encoders and decoders do not ask the values of a mask whether it is causal.

    No trace can answer. The answer is a hint beside the mask itself, which the graph then has.
    """

    def unhinted(name: str) -> Any:
        def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = inspect.signature(part.forward).bind_partial(*args, **kwargs).arguments
            return None if given.get(name) is not None else (args, {**kwargs, name: False})

        return hook

    with contextlib.ExitStack() as hooks:
        for part in module.modules():
            for kind, name in _DETECTS.items():
                if isinstance(part, kind) and name in inspect.signature(part.forward).parameters:
                    hooks.enter_context(part.register_forward_pre_hook(unhinted(name), with_kwargs=True))
        yield


@contextlib.contextmanager
def agreeing_sizes(module: nn.Module, equal: Sequence[tuple[Place, Place]]) -> Iterator[None]:
    """Inside, a call of `module` says that the sizes of these axes of its inputs are equal, pair by pair."""

    def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = input_tensors(inspect.signature(part.forward).bind(*args, **kwargs))
        for (first, axis), (second, other) in equal:
            torch._check(given[first].shape[axis] == given[second].shape[other])

    with contextlib.ExitStack() as hooks:
        if equal:
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def divided_sizes(gm: GraphModule) -> tuple[tuple[Place, Place], ...]:
    """Pairs of input axes of the same example size, one of which divides the other in some tensor's shape."""
    places: dict[Any, tuple[Place, int]] = {}
    quotients: set[Any] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if not isinstance(size, torch.SymInt):
                continue
            if node.op == "placeholder" and size.node.expr.is_Symbol:
                places.setdefault(size.node.expr, ((str(node.target), axis), size.node.hint))
            quotients |= size.node.expr.atoms(FloorDiv)
    pairs: dict[tuple[Place, Place], None] = {}
    for quotient in quotients:
        base, divisor = quotient.args
        for first in base.free_symbols & places.keys():
            for second in divisor.free_symbols & places.keys():
                (here, size), (there, other) = places[first], places[second]
                if first != second and size == other:
                    pairs[min(here, there), max(here, there)] = None
    return tuple(pairs)


def without_cached_shapes() -> contextlib.AbstractContextManager[None]:
    """Inside, torch works out the shapes of each traced operator, and keeps none to look up by arguments.

    With symbolic sizes the keys cost more than the shapes: small models export in three fifths of the time,
    and a decoder of 30 layers in the same.
    """
    from torch._dynamo import config  # takes seconds to import; an export needs it anyway

    return config.patch(fake_tensor_cache_enabled=False)


@contextlib.contextmanager
def no_dumps() -> Iterator[None]:
    """Keep back what is written to stderr inside, and let it go unless an exception says it better.

    torch.export prints the whole graph so far when it fails.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        yield
    sys.stderr.write(said.getvalue())
