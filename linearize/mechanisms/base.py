"""What every mechanism states about itself: its options, how to build its module, what it can carry."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from ..common.checks import excerpt, not_among
from ..errors import ConfigError
from ..passes.site import Reason
from .onnx_form import StateOperator

if TYPE_CHECKING:
    from .module import AttentionModule
    from .spec import SiteSpec

_REASONS = {
    "causal": Reason.MASK_UNSUPPORTED,
    "bidirectional": Reason.MASK_UNSUPPORTED,
    "cross": Reason.MASK_UNSUPPORTED,
    "window": Reason.MASK_UNSUPPORTED,
    "mask": Reason.MASK_UNSUPPORTED,
    "documents": Reason.MASK_DATA_DEPENDENT,
    "bias": Reason.BIAS_UNSUPPORTED,
    "alibi": Reason.BIAS_UNSUPPORTED,
    "softcap": Reason.SOFTCAP_UNSUPPORTED,
    "sinks": Reason.SINKS_UNSUPPORTED,
}
"""Everything a site may need of a mechanism, and the code to refuse it with.

"window": a causal or centred window; "mask": any other mask (chunks, prefixes, arbitrary ones); "documents":
tokens see only their own document, which inputs tell apart; "bias": finite values added to the scores;
"alibi": a bias known to be ALiBi.
"""

NEEDS = tuple(_REASONS)

DROPPABLE = ("softcap", "sinks", "alibi", "bias", "window")
"""What `approximate` may name: parts of a softmax attention that a linear one can be asked to leave out."""

BIGGEST = 2**20
"""Of every size that a user or a checkpoint sets: above it nothing could be allocated."""


def is_too_large(size: Any) -> bool:
    return isinstance(size, int) and size > BIGGEST


EVERYWHERE = frozenset({"causal", "bidirectional", "cross"})


class Settings(Protocol):
    """What a mechanism reads of a `LinearizeConfig`; see there for the meaning of each."""

    @property
    def group_size(self) -> int: ...

    @property
    def conv_taps(self) -> int: ...

    @property
    def local_scale(self) -> float: ...

    @property
    def augments(self) -> bool: ...

    @property
    def options(self) -> Mapping[str, Any]: ...

    def option(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Option:
    """One setting of a mechanism.

    Attributes:
        default: Its value where the user gives none.
        meaning: What it does, for people.
        expected: What `valid` accepts, in words.
        valid: Whether a value is allowed.
    """

    default: int | float | str | None
    meaning: str
    expected: str
    valid: Callable[[Any], bool]


def whole(default: int | None, meaning: str, least: int = 1, most: int = BIGGEST) -> Option:
    """An option that is a whole number.

    Args:
        default: Its value where the user gives none; if that is None, users may give None too.
        meaning: What it does, for people.
        least: The smallest value allowed.
        most: The largest value allowed.

    Returns:
        The option.
    """

    def valid(value: Any) -> bool:
        number = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        return number or (value is None and default is None)

    return Option(default, meaning, f"an int >= {least}", valid)


def switch(default: bool, meaning: str) -> Option:
    """An option that is on or off.

    Args:
        default: Its value where the user gives none.
        meaning: What it does, for people.

    Returns:
        The option.
    """

    def valid(value: Any) -> bool:
        return isinstance(value, int) and value in (0, 1)

    return Option(default, meaning, "True or False", valid)


def choice(default: str, meaning: str, values: tuple[str, ...]) -> Option:
    """An option that is one of a few words.

    Args:
        default: The word where the user gives none.
        meaning: What it does, for people.
        values: The words allowed.

    Returns:
        The option.
    """
    return Option(default, meaning, " or ".join(map(repr, values)), lambda value: value in values)


@dataclass(frozen=True)
class Mechanism:
    """A named replacement for softmax attention: one file of this package says all of it.

    Attributes:
        name: What users write in `LinearizeConfig.mechanism`.
        formula: One line for people.
        supports: What it carries exactly as the site means it, among the keys of `_REASONS`.
        build: Makes the module of one site from its spec, which has passed `refusal`, and the settings.
        options: What `LinearizeConfig.options` may set, by name.
        augmentation: Whether the convolution of the paper is added unless the user says otherwise; None where
            it cannot be.
        parts: What it adds to a window and the first tokens, by name and in the order in which to add it:
            the options that leave the part out. The convolution is known without being named.
        sizes: Names of the options that the size of the state grows with.
        reach: Of a site and the option `window`: the widest window of the site itself (as `SiteSpec.window`
            counts) that the mechanism then shows exactly. Such a window is carried: `build` makes a module
            that sees it and nothing else. None where a site's window is not carried.
        carries: Of a site without a window of its own, what it carries beyond `supports`.
        onnx: Its own operator in ONNX files. None where it needs none, because it is a sum of core calls, or
            where it has no ONNX form with a state.
    """

    name: str
    formula: str
    supports: frozenset[str]
    build: Callable[[SiteSpec, Settings], AttentionModule]
    options: Mapping[str, Option] = field(default_factory=lambda: MappingProxyType({}))
    augmentation: bool | None = False
    reach: Callable[[SiteSpec, int], int] | None = None
    carries: Callable[[SiteSpec], frozenset[str]] = lambda spec: frozenset()
    onnx: StateOperator | None = None
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    sizes: tuple[str, ...] = ()

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Check what a user set for this mechanism.

        Args:
            options: Values by name.

        Raises:
            ConfigError: The mechanism has no such option (the message names those it has), or a value is
                wrong.
        """
        for name, value in options.items():
            option = self.options.get(name)
            if option is None:
                problem = f"options: mechanism {self.name!r} has no option {excerpt(name)}"
                raise ConfigError(not_among(problem, name, self.options), "options")
            if not option.valid(value):
                raise ConfigError(
                    f"options: {name!r} of mechanism {self.name!r} must be {option.expected}"
                    f"{', and not as large' if is_too_large(value) else ''}, got {excerpt(value)}",
                    "options",
                )

    def covers(self, spec: SiteSpec, options: Mapping[str, Any]) -> bool:
        """Whether the site has a window of its own that the mechanism's window covers.

        Args:
            spec: The site.
            options: Of the mechanism, as in `LinearizeConfig.options`.

        Returns:
            False too where the site has no window.
        """
        if spec.window is None or spec.softcap is not None or spec.cross or self.reach is None:
            return False
        return spec.window <= self.reach(spec, options.get("window", self.options["window"].default))

    def missing(
        self,
        spec: SiteSpec,
        terms: Collection[str] = (),
        approximate: Collection[str] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[str, ...]:
        """What a site needs that this mechanism neither carries nor is allowed to drop.

        Args:
            spec: The site.
            terms: What its scores hold beyond the spec: any of "bias", "alibi", "sinks", "mask", "documents".
            approximate: What the user allows to be dropped (`LinearizeConfig.approximate`).
            options: Of the mechanism (`LinearizeConfig.options`).

        Returns:
            Keys of `_REASONS`; none if the mechanism can take the site's place.
        """
        needs = ["cross" if spec.cross else "causal" if spec.causal else "bidirectional"]
        needs += ["softcap"] if spec.softcap is not None else []
        needs += ["window"] if spec.window is not None and not self.covers(spec, options) else []
        dropped = {need for need in DROPPABLE if need in approximate}
        dropped |= {"alibi"} if "bias" in dropped else set()  # ALiBi is a bias
        carried = self.supports if spec.window is not None else self.supports | self.carries(spec)
        return tuple(need for need in (*needs, *terms) if need not in carried | dropped)

    def refusal(
        self,
        spec: SiteSpec,
        terms: Collection[str] = (),
        approximate: Collection[str] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[Reason, str] | None:
        """Why this mechanism cannot take the place of a site; arguments as for `missing`.

        Returns:
            The code of the first reason and a sentence with all of them; None if the mechanism can take the
            site's place.
        """
        missing = self.missing(spec, terms, approximate, options)
        if not missing:
            return None
        words = " and ".join([*([", ".join(missing[:-1])] if missing[:-1] else []), missing[-1]])
        if "window" in missing and "softcap" not in missing and self.reach is not None and not spec.cross:
            words += f' (of {spec.window} tokens: options={{"window": ...}} can cover it)'
        return _REASONS[missing[0]], f"mechanism {self.name!r} cannot carry {words}"
