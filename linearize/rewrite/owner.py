"""Turning an owner into a subclass of its own class, in place; isinstance, copy and pickle still work."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import InvalidModelError


class Rewritten:
    """Base of the mixins. `run` is one call of the owner, given the original class's `forward`."""

    _linearize_path: str
    _linearize_layer: int | None
    _linearize_start: Any
    _linearize_seen: Any
    _linearize_state: Any = None
    _linearize_cross: Any = None
    _linearize_slot: int
    _linearize_proof: bool
    _linearize_log: Any
    _linearize_padding: bool
    _linearize_plain: bool
    _linearize_slots: int
    _linearize_variants: Any
    _linearize_keeps_keys: bool

    @staticmethod
    def run(
        owner: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The owner's output. Every mixin gives it."""
        raise NotImplementedError


@functools.cache
def subclass_of(base: Any, mixin: Any) -> type:
    """A subclass of `base`, with its name and module (PEFT and FSDP record both), that runs by `mixin`."""
    original = base.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return mixin.run(self, original, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (base, mixin), self.__dict__.copy()

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "_linearize_base": base,
        "forward": functools.wraps(original)(forward),
    }
    return type(base.__name__, (mixin, base), members)


def original_class(cls: type) -> type:
    """The class an owner had before it was rewritten."""
    return cls._linearize_base  # type: ignore[attr-defined]


def _rebuild(base: Any, mixin: Any) -> nn.Module:
    cls: Any = subclass_of(base, mixin)
    return cls.__new__(cls)


def become(owner: nn.Module, mixin: Any) -> None:
    """Swap the class of `owner`, and rebind a forward that accelerate's hooks keep on the instance.

    Raises InvalidModelError when something else replaced `forward` on the instance: it would bypass ours.
    """
    base: Any = type(owner)
    cls = subclass_of(base, mixin)
    if "forward" in owner.__dict__:
        if "_old_forward" not in owner.__dict__:
            raise InvalidModelError(
                f"`forward` of a {type(owner).__name__} was replaced on the instance, which would bypass the "
                "rewrite; convert before patching it"
            )
        owner.__dict__["_old_forward"] = types.MethodType(cls.forward, owner)  # type: ignore[attr-defined]
    owner.__class__ = cls
