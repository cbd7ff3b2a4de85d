"""An owner: the module that holds attention. It becomes a subclass of its own class, in place.

`isinstance`, copies and pickles still work, and all that is known of it is one frozen record.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import InvalidModelError
from ..planning.plan import SitePlan
from .attributes import Values, check_unchanged

Witness = Callable[[int, int | None], None]
"""Who is told that a site runs: its slot, and the sliding window that the owner asked for."""


LAYER_ARGUMENT = "layer_idx"
"""The argument by which transformers tells a module that several layers share which of them it is."""


@dataclass(frozen=True)
class OwnerRecord:
    """What is known of an owner from its plan on, the same for every call.

    Attributes:
        path: dotted path in the model, "" for the model itself.
        sites: the plans of its sites, by slot.
        layers: cache layers of the converted owners of the same decoder, in order.
        takes_keywords: its forward takes any keyword argument, so that a call can travel as one.
        graphs: the graph route's memo of traced graphs; None on the interface route.
        witness: is told of every site that runs, while a conversion is being proved.
        implementation: on the interface route, the attention that its config named before.
        values: likewise, the plain values on it when it was converted.
        configs: likewise, the configs by which its masks are made, and what they said then.
        layer_argument: where its forward takes the index of its layer, in an owner that several layers share.
    """

    path: str
    sites: tuple[SitePlan, ...]
    layers: tuple[int, ...] = ()
    takes_keywords: bool = False
    graphs: Any = None
    witness: Witness | None = None
    implementation: str | None = None
    values: Values = ()
    configs: tuple[tuple[Any, Values], ...] = ()
    layer_argument: int | None = None

    @property
    def name(self) -> str:
        """The path, in words for an error message."""
        return self.path or "the model"

    def check_unchanged(self, owner: nn.Module) -> None:
        """Raise InvalidModelError where a value that was proved with is another now."""
        check_unchanged(self.values, owner, self.name)
        for config, values in self.configs:
            check_unchanged(values, config, f"the config of {self.name}")

    @property
    def layer_index(self) -> int | None:
        """Index of the layer, for caches; None where the path holds no number."""
        return self.sites[0].layer_index

    def layer_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
        """Index of the cache layer that one call fills: what the caller says, else `layer_index`."""
        place = self.layer_argument
        if place is None:
            return self.layer_index
        said = args[place] if len(args) > place else kwargs.get(LAYER_ARGUMENT)
        return said if isinstance(said, int) else self.layer_index

    @property
    def follows_masks(self) -> bool:
        """What masks may say is known: a position pattern of the spec, real keys, documents."""
        return not any("mask" in site.terms for site in self.sites)

    @property
    def biased(self) -> bool:
        """Some site's masks hold finite values of its own."""
        return any({"bias", "alibi"} & set(site.terms) for site in self.sites)


class Rewritten:
    """Base of the mixins, one per route. `run` is one call of the owner."""

    _linearize_owner: OwnerRecord

    @staticmethod
    def run(
        owner: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The owner's output; forward: the original class's. Every mixin gives it."""
        raise NotImplementedError


def become(owner: nn.Module, mixin: Any, record: OwnerRecord) -> None:
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
    owner._linearize_owner = record  # type: ignore[assignment]


def takes_keywords(owner: nn.Module) -> bool:
    """Whether the forward of an owner's class takes any keyword argument."""
    parameters = inspect.signature(type(owner).forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def layer_argument(owner: nn.Module) -> int | None:
    """Position of the layer's index among the arguments of the forward of an owner's class, or None."""
    names = list(inspect.signature(type(owner).forward).parameters)[1:]
    return names.index(LAYER_ARGUMENT) if LAYER_ARGUMENT in names else None


def layers_beside(owners: Mapping[str, Sequence[SitePlan]]) -> dict[str, tuple[int, ...]]:
    """Owner path -> cache layers of the causal owners at paths that differ in their numbers only."""
    groups: dict[str, set[int]] = {}
    for path, sites in owners.items():
        index = sites[0].layer_index
        if index is not None and any(site.spec.causal for site in sites):
            groups.setdefault(_without_numbers(path), set()).add(index)
    return {path: tuple(sorted(groups.get(_without_numbers(path), ()))) for path in owners}


def _without_numbers(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


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
