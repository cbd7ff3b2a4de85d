"""What a user chooses about a conversion. Stored in the checkpoint; never read from the environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from .. import mechanisms
from ..common.checks import excerpt, require, several, unknown
from ..errors import ConfigError
from ..mechanisms.base import BIGGEST, DROPPABLE, Mechanism, is_too_large

VERSION = 3
"""Version 1 had no `augmentation` and no `options`: their defaults are what it meant. Up to version 2
"augmented" was the name of what is "augmented_paper" now, and the windows kept no first tokens.
"""
_WINDOWS = ("softmax_window", "power_window")


class Options(Mapping[Any, Any]):
    """An immutable mapping, in a fixed order: hashable where its values are, so a config is."""

    def __init__(self, options: Mapping[Any, Any] | None = None) -> None:
        self._items = dict(sorted((options or {}).items(), key=lambda item: (str(type(item[0])), item[0])))

    def __getitem__(self, name: Any) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class LinearizeConfig:
    """The settings of one conversion. Immutable, hashable, and stored with every checkpoint.

    Lists, arrays, and one value alone are accepted where a tuple is stored.

    Attributes:
        mechanism: Name of what takes the softmax's place; `linearize mechanisms` lists them. "softmax" keeps
            the softmax, through the same machinery.
        group_size: Tokens per group of the local part.
        conv_taps: Past tokens, the present one included, that the convolution over values sees.
            Bidirectional sites use `2 * conv_taps - 1` centred taps.
        local_scale: Weight of the local part of `augmented_paper` and `local` before any fitting or tuning.
        augmentation: Whether to add the convolution over values. None: as the mechanism has it by default.
        options: Settings of the mechanism itself, by name; `mechanisms.get(name).options` lists them.
        layer_options: Options of some layers, which go before `options` there: by the index of the layer, or
            by a path of modules, which goes before an index. For example `{0: {"window": 256}}`.
        layers: Indices of the layers to rewrite; None for all.
        keep_softmax: Indices of layers, or paths of modules, to leave as they are.
        on_refusal: "error" rewrites everything or nothing; "keep" leaves out the sites that cannot be
            rewritten.
        approximate: Names of what may be dropped from a site although its output depends on it, such as
            "softcap"; `linearize.planning.config.DROPPABLE` lists them.

    Raises:
        ConfigError: A value is of the wrong kind or out of range; the message names the field.
    """

    mechanism: str = "augmented"
    group_size: int = 64
    conv_taps: int = 32
    local_scale: float = 1.0
    augmentation: bool | None = None
    options: Mapping[str, Any] = Options()
    layer_options: Mapping[int | str, Mapping[str, Any]] = Options()
    layers: tuple[int, ...] | None = None
    keep_softmax: tuple[int | str, ...] = ()
    on_refusal: str = "error"
    approximate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Lists are what JSON and most callers have, and one layer is often all; the stored form is hashable.
        for name in ("layers", "keep_softmax", "approximate"):
            object.__setattr__(self, name, several(getattr(self, name)))
        mechanism = mechanisms.get(self.mechanism)
        for name in ("group_size", "conv_taps"):
            size = getattr(self, name)
            bound = f", up to {BIGGEST}" if is_too_large(size) else ""
            require(_is_int(size) and 1 <= size <= BIGGEST, name, size, f"an int >= 1{bound}")
        scale = self.local_scale
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        require(number and abs(scale) <= 1e30, "local_scale", scale, "a finite number")
        choice = self.augmentation
        require(choice is None or isinstance(choice, bool), "augmentation", choice, "True, False or None")
        if self.augmentation and mechanism.augmentation is None:
            raise ConfigError(
                f"augmentation: mechanism {self.mechanism!r} takes no convolution", "augmentation"
            )
        named = isinstance(self.options, Mapping) and all(isinstance(name, str) for name in self.options)
        require(named, "options", self.options, "a mapping of option names to values")
        mechanism.check_options(self.options)
        object.__setattr__(self, "options", Options(self.options))
        object.__setattr__(self, "layer_options", _layer_options(self.layer_options, mechanism))
        require(
            self.layers is None or (isinstance(self.layers, tuple) and all(map(_is_index, self.layers))),
            "layers",
            self.layers,
            "layer indices (ints >= 0), or None for all layers",
        )
        require(
            isinstance(self.keep_softmax, tuple)
            and all(_is_index(item) or isinstance(item, str) for item in self.keep_softmax),
            "keep_softmax",
            self.keep_softmax,
            "layer indices (ints >= 0) or module paths",
        )
        require(self.on_refusal in ("error", "keep"), "on_refusal", self.on_refusal, "'error' or 'keep'")
        named = isinstance(self.approximate, tuple) and all(isinstance(x, str) for x in self.approximate)
        require(named, "approximate", self.approximate, f"names among {', '.join(DROPPABLE)}")
        for item in self.approximate:
            if item not in DROPPABLE:
                raise ConfigError(f"approximate: {unknown('part', item, DROPPABLE)}", "approximate")

    @property
    def augments(self) -> bool:
        """Whether the convolution over values is added, the mechanism's own default included."""
        default = mechanisms.get(self.mechanism).augmentation
        return bool(default if self.augmentation is None else self.augmentation)

    def option(self, name: str) -> Any:
        """A setting of the mechanism: as given in `options`, or its default. KeyError when it has no such."""
        return self.options.get(name, mechanisms.get(self.mechanism).options[name].default)

    def at(self, path: str, index: int | None) -> LinearizeConfig:
        """The settings of one layer: `layer_options` are among its `options`.

        path, index: The layer, as `SitePlan` has it.
        """
        if not self.layer_options:
            return self
        options = dict(self.options)
        for layer, own in self.layer_options.items():  # indices come first
            if names_layer(layer, path, index):
                options |= own
        return dataclasses.replace(self, options=options, layer_options=Options())

    def exact(self) -> LinearizeConfig:
        """The same choice of sites with the mechanism "softmax", which changes no output."""
        none = Options()
        return dataclasses.replace(
            self, mechanism="softmax", augmentation=None, options=none, layer_options=none
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with a format version."""
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = list(value)
            fields[field.name] = dict(value) if isinstance(value, Options) else value
        # Pairs: the keys of an object in JSON are strings, and an index is none.
        fields["layer_options"] = [[layer, dict(own)] for layer, own in self.layer_options.items()]
        return {"version": VERSION, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LinearizeConfig:
        """Inverse of `to_dict`; absent fields take their defaults. Raises ConfigError."""
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"a config must be a mapping of field names to values, got {type(data).__name__}"
            )
        fields = dict(data)
        version = fields.pop("version", VERSION)
        if not _is_int(version) or not 1 <= version <= VERSION:
            raise ConfigError(
                f"this config has version {excerpt(version)}; this release reads versions 1 to {VERSION}: "
                f"load it with the release that wrote it"
            )
        if isinstance(fields.get("layer_options"), list):
            fields["layer_options"] = _of_pairs(fields["layer_options"])
        if version < 3 and fields.setdefault("mechanism", "augmented") == "augmented":
            fields["mechanism"] = "augmented_paper"
        if version < 3 and fields["mechanism"] in _WINDOWS:
            fields["options"] = {"sinks": 0, **(fields.get("options") or {})}
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ConfigError(unknown("config field", name, known))
        return cls(**fields)


def names_layer(item: int | str, path: str, index: int | None) -> bool:
    """Whether an item of `keep_softmax`, `layers` or `layer_options` names the layer at a path."""
    return item == index if isinstance(item, int) else path == item or path.startswith(f"{item}.")


def _layer_options(given: Any, mechanism: Mechanism) -> Options:
    """`layer_options`, checked. Raises ConfigError."""
    expected = "a mapping of layer indices (ints >= 0) or module paths to options of the mechanism"
    good = isinstance(given, Mapping) and all(
        (_is_index(layer) or isinstance(layer, str))
        and isinstance(own, Mapping)
        and all(isinstance(name, str) for name in own)
        for layer, own in given.items()
    )
    require(good, "layer_options", given, expected)
    for layer, own in given.items():
        try:
            mechanism.check_options(own)
        except ConfigError as error:
            raise ConfigError(f"layer_options of {excerpt(layer)}: {error}", "layer_options") from error
    return Options({layer: Options(own) for layer, own in given.items() if own})


def _of_pairs(pairs: list[Any]) -> dict[Any, Any]:
    """`layer_options` as they are stored. Raises ConfigError."""
    found: dict[Any, Any] = {}
    for pair in pairs:
        good = isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], int | str)
        if not good or pair[0] in found:
            raise ConfigError(f"layer_options: a list of different [layer, options], got {excerpt(pair)}")
        found[pair[0]] = pair[1]
    return found


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_index(value: object) -> bool:
    return _is_int(value) and value >= 0
