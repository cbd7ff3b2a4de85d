"""The plan: which sites of which owners are rewritten, how, and with what shapes. Data, not code.

A plan is what `inspect` can print, what a checkpoint stores, and what `apply_plan` replays without searching
a graph again. It is made from the matcher's report plus one recorded run of the model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from .. import mechanisms
from ..common.checks import excerpt
from ..errors import ConfigError, InvalidModelError, NoAttentionError, RefusedError
from ..mechanisms.spec import SiteSpec
from ..passes.alibi import is_alibi
from ..passes.site import KVKind, MatchReport, Pattern, Reason, Refusal, Site
from .config import LinearizeConfig, names_layer
from .left_alone import (
    KEPT,
    KEPT_MESSAGE,
    WINDOWED,
    Blocked,
    Skipped,
    kept_window,
    nothing_asked,
    nothing_left,
    raise_blocked,
)

VERSION = 2
"""Version 1 had other names for the routes, and no terms."""
ROUTES = ("interface", "graph")
"""How an owner is rewritten: through transformers' attention interface, or on a graph of itself."""
_ROUTE_OF_VERSION_1 = {"seam": "interface", "graft": "graph"}
CHILD = "linear_attention"

# Candidates that turned out not to be attention at all (a router's softmax, a classifier head) do not stand
# in the way of rewriting everything that is.
_HARMLESS = frozenset({Reason.NOT_ATTENTION})


def child_name(slot: int) -> str:
    """Name of the child module of an owner's `slot`-th site: `linear_attention`, `linear_attention_1`, ..."""
    return CHILD if slot == 0 else f"{CHILD}_{slot}"


@dataclass(frozen=True)
class SitePlan:
    """One child module to be.

    path: dotted path of the owner ("" is the model itself). slot: which of the owner's sites within one call.
    route: "interface" or "graph", "" while undecided. spec: shapes and meaning. layer_index: index of the
    layer, for `layers=` and for caches; None when the path holds no number. mask: its label at discovery.
    calls: how often one forward pass of the model calls this child. source: where the attention was written.
    terms: what its scores hold beyond the spec, in the words of `Mechanism.refusal`.
    """

    path: str
    slot: int
    route: str
    spec: SiteSpec
    layer_index: int | None
    mask: str
    calls: int = 1
    source: str = ""
    terms: tuple[str, ...] = ()

    @property
    def child(self) -> str:
        return child_name(self.slot)

    @property
    def name(self) -> str:
        """Dotted path of the child module."""
        return f"{self.path}.{self.child}" if self.path else self.child

    @property
    def plain(self) -> bool:
        """Scores are scaled products under a causal or key mask: what a linear form sees is all there is."""
        pattern, *rest = self.mask.split("+")
        known = pattern in ("full", "causal") and "bias" not in rest
        return known and not self.terms and self.spec.window is None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SitePlan:
        """Inverse of `to_dict`, of any version, as `Plan.from_dict`. Raises ConfigError."""
        fields = dict(data)
        if "rung" in fields:
            fields["route"] = _ROUTE_OF_VERSION_1[fields.pop("rung")]
        fields["terms"] = tuple(fields.get("terms", ()))
        return cls(**{**fields, "spec": SiteSpec.from_dict(fields["spec"])})


@dataclass(frozen=True)
class Plan:
    """Every site to rewrite, in execution order of the owners, and every candidate left alone.

    compact_masks: every dispatching site that shares a config is rewritten, so the masks can be one row per
    sequence instead of a square (see `masks`).
    """

    sites: tuple[SitePlan, ...]
    skipped: tuple[Skipped, ...] = ()
    compact_masks: bool = False
    version: int = VERSION

    @property
    def owners(self) -> dict[str, tuple[SitePlan, ...]]:
        groups: dict[str, list[SitePlan]] = defaultdict(list)
        for site in self.sites:
            groups[site.path].append(site)
        return {path: tuple(sites) for path, sites in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "version": self.version,
            "compact_masks": self.compact_masks,
            "sites": [site.to_dict() for site in self.sites],
            "skipped": [dataclasses.asdict(skip) for skip in self.skipped],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`, of any version, for what `schema.check_record` found nothing wrong with."""
        return cls(
            sites=tuple(SitePlan.from_dict(site) for site in data["sites"]),
            skipped=tuple(Skipped(**skip) for skip in data.get("skipped", ())),
            compact_masks=data.get("compact_masks", False),
        )


def layer_index(model: nn.Module, path: str) -> int | None:
    """The owner's `layer_idx`, else the first number in its path, else None. (Shared owners may say -1.)"""
    index = getattr(model.get_submodule(path), "layer_idx", None)
    if isinstance(index, int) and index >= 0:
        return index
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def site_spec(site: Site) -> SiteSpec:
    """The module spec of a proved site. Raises ValueError when a head size is not a number."""
    shapes = site.shapes
    sizes = [shapes[key] for key in ("H", "Hkv", "D", "Dv")]
    numbers = [size for size in sizes if isinstance(size, int)]
    if len(numbers) != len(sizes):
        named = dict(zip(("H", "Hkv", "D", "Dv"), sizes, strict=True))
        raise ValueError(f"heads and head sizes must be fixed numbers, got {named}")
    heads, kv_heads, head_dim, value_dim = numbers
    windowed = site.mask.pattern in (Pattern.WINDOW, Pattern.BAND)
    return SiteSpec(
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        causal=site.causal,
        cross=site.cross and not site.causal,
        scale=site.scale,
        softcap=site.softcap,
        kv_layout="tiled" if site.kv_map.kind is KVKind.TILED else "interleaved",
        dropout=float(site.dropout or 0.0),
        window=site.mask.width if windowed else None,
    )


def check_layers_of(model: nn.Module, report: MatchReport, config: LinearizeConfig) -> None:
    """As `check_named_layers`, of what was found in a model."""
    names = {id(module): name for name, module in model.named_modules()}
    sites = {names[id(model.get_submodule(site.path))] for site in report.sites}
    sites |= {site.path for site in report.sites}  # users may know a shared module by another of its names
    refused = ((refusal.path, _index(model, refusal)) for refusal in report.refusals)
    found = [*((path, layer_index(model, path)) for path in sorted(sites)), *refused]
    check_named_layers(config, found, report)


def check_named_layers(
    config: LinearizeConfig, candidates: Iterable[tuple[str, int | None]], report: MatchReport | None = None
) -> None:
    """Raise RefusedError where a setting names a layer without attention, or none at all.

    candidates: path and index of everything that is attention, or may be.
    """
    known = list(dict.fromkeys(candidates))
    for name in ("layers", "keep_softmax", "layer_options"):
        for item in getattr(config, name) or ():
            if not any(names_layer(item, path, index) for path, index in known):
                numbers = sorted({index for _, index in known if index is not None})
                raise RefusedError(
                    f"{name} names {excerpt(item)}, and no attention is there;{_nearest(item, known)} the "
                    f"layers with attention are {_ranges(numbers) or 'not numbered'}, and a path is one such "
                    f"as {known[0][0]!r}",
                    report,
                )


def _nearest(item: int | str, known: Iterable[tuple[str, int | None]]) -> str:
    """A question whether another layer was meant, "" where none is near."""
    if isinstance(item, str) and item.isdecimal():
        return f" did you mean the index, {int(item)} without quotes?"
    close = get_close_matches(str(item), [path for path, _ in known], n=1) if isinstance(item, str) else []
    return f" did you mean {close[0]!r}?" if close else ""


def _ranges(numbers: list[int]) -> str:
    """`0 to 5, 7` for these numbers."""
    texts: list[str] = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        texts.append(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}")
    return ", ".join(texts[:8])


def stays_softmax(config: LinearizeConfig, path: str, index: int | None) -> bool:
    """The user asked to leave the layer at `path` as softmax."""
    if config.layers is not None and index not in config.layers:
        return True
    return any(names_layer(keep, path, index) for keep in config.keep_softmax)


def plan_sites(model: nn.Module, report: MatchReport, config: LinearizeConfig) -> Plan:
    """Decide what becomes of every candidate of `report`.

    The sites within one call of an owner get one child each; an owner called twelve times with one site
    (shared layers) has one child, called twelve times.
    Raises NoAttentionError when there is no candidate, RefusedError when a wanted candidate cannot be
    rewritten and `config.on_refusal` is "error", or when nothing is left to rewrite.
    """
    if not report.sites and all(refusal.reason in _HARMLESS for refusal in report.refusals):
        raise NoAttentionError(
            f"{type(model).__name__} holds no softmax attention that this package recognises"
        )
    # A module held under several names is one owner: the name it is found under first.
    names = {id(module): name for name, module in model.named_modules()}
    slots: Counter[tuple[str, int]] = Counter()
    planned: dict[tuple[str, int], SitePlan] = {}
    skipped: list[Skipped] = []
    blocked, windowed = list[Blocked](), list[Blocked]()
    for refusal in report.refusals:
        skip = Skipped(refusal.path, refusal.ordinal, refusal.reason.value, refusal.message)
        skipped.append(skip)
        if refusal.reason not in _HARMLESS and not stays_softmax(
            config, refusal.path, _index(model, refusal)
        ):
            blocked.append((skip, ()))
    for site in report.sites:
        path = names[id(model.get_submodule(site.path))]
        index = layer_index(model, path)
        slot = slots[site.path, site.call]
        slots[site.path, site.call] += 1
        if stays_softmax(config, path, index):
            skipped.append(Skipped(path, site.ordinal, KEPT, KEPT_MESSAGE))
            continue
        own = config.at(path, index)
        problem = problem_of(site, own) or _too_short(site) or _name_taken(model, path, slot)
        if problem is not None:
            need = missing(site, own)
            skip = Skipped(path, site.ordinal, *(kept_window(site.mask.width, need) or problem))
            skipped.append(skip)
            (windowed if skip.reason == WINDOWED else blocked).append((skip, need))
            continue
        seen = planned.get((path, slot))
        if seen is None:
            spec = site_spec(site)
            planned[path, slot] = SitePlan(
                path, slot, "", spec, index, site.mask.label, 1, site.source, terms(site)
            )
        else:
            planned[path, slot] = dataclasses.replace(seen, calls=seen.calls + 1)
    windows = any(getattr(module, "_supports_attention_backend", False) for module in model.modules())
    raise_blocked(blocked, config, report, windows)
    as_it_is = {skip.path for skip, _ in (*blocked, *windowed)}
    sites = tuple(site for site in planned.values() if site.path not in as_it_is)
    if not sites:
        check_layers_of(model, report, config)
        if skipped and not blocked:
            raise nothing_asked(windowed, config, windows, report)
        raise nothing_left(blocked, config, windows, report)
    check_layers_of(model, report, config)
    return Plan(sites=sites, skipped=tuple(skipped))


def replan(model: nn.Module, plan: Plan, config: LinearizeConfig) -> Plan:
    """The plan of a converted model under other settings, from what its own plan knows of the sites.

    Sites leave the plan as they do in `plan_sites`; none joins it, for nothing is known of those it lacks.
    Raises InvalidModelError where the settings rewrite a layer that is softmax in this model, otherwise as
    `plan_sites`.
    """
    wanted = [
        skip.path
        for skip in plan.skipped
        if skip.reason not in (Reason.NOT_ATTENTION.value, WINDOWED)
        and (skip.reason == KEPT or config.on_refusal == "error")
        and not stays_softmax(config, skip.path, _index(model, skip))
    ]
    if wanted:
        raise InvalidModelError(
            f"these settings rewrite {wanted[0]}, which is softmax in this model, as "
            f"{len(set(wanted))} module(s) are, so that nothing is known of it; load the original to rewrite "
            "it, or keep the settings `layers`, `keep_softmax` and `on_refusal` of the model"
        )
    indexed = ((skip.path, _index(model, skip)) for skip in plan.skipped)
    check_named_layers(config, [*((site.path, site.layer_index) for site in plan.sites), *indexed])
    skipped, sites = list(plan.skipped), list[SitePlan]()
    blocked, windowed = list[Blocked](), list[Blocked]()
    mechanism = mechanisms.get(config.mechanism)
    for site in plan.sites:
        options = config.at(site.path, site.layer_index).options
        known = site.spec, site.terms, config.approximate, options
        refused = mechanism.refusal(*known)
        if stays_softmax(config, site.path, site.layer_index):
            skipped.append(Skipped(site.path, site.slot, KEPT, KEPT_MESSAGE))
        elif refused is not None:
            need = mechanism.missing(*known)
            why = kept_window(site.spec.window, need) or (refused[0].value, refused[1])
            skip = Skipped(site.path, site.slot, *why)
            (windowed if skip.reason == WINDOWED else blocked).append((skip, need))
        else:
            sites.append(site)
    skipped += [skip for skip, _ in windowed]
    windows = all(site.route == "interface" for site in plan.sites)
    raise_blocked(blocked, config, None, windows)
    as_it_is = {skip.path for skip, _ in (*blocked, *windowed)}
    left = tuple(site for site in sites if site.path not in as_it_is)
    if not left and not blocked:
        raise nothing_asked(windowed, config, windows)
    if not left:
        raise nothing_left(blocked, config, windows)
    return dataclasses.replace(plan, sites=left, skipped=(*skipped, *(skip for skip, _ in blocked)))


def _index(model: nn.Module, candidate: Refusal | Skipped) -> int | None:
    try:
        return layer_index(model, candidate.path)
    except AttributeError:
        return None


def terms(site: Site, in_graph: bool = False) -> tuple[str, ...]:
    """What the site's scores hold beyond its spec, in the words of `Mechanism.refusal`.

    Documents of one sequence need no mechanism: a live owner takes the rows apart (`rewrite.documents`).
    in_graph: the site stays in a graph, which cannot.
    """
    found = []
    if site.sinks:
        found.append("sinks")
    if site.mask.bias:
        found.append("alibi" if is_alibi(site) else "bias")
    if site.mask.pattern in (Pattern.CHUNK, Pattern.PREFIX, Pattern.OTHER) or site.mask.top_left:
        found.append("mask")
    if site.mask.documents and (in_graph or site.cross):
        found.append("documents")
    return tuple(found)


def problem_of(site: Site, config: LinearizeConfig, in_graph: bool = False) -> tuple[str, str] | None:
    """Why `site` cannot be rewritten under the settings of its layer: reason code and sentence, or None.

    in_graph: as for `terms`.
    """
    try:
        spec = site_spec(site)
    except (ValueError, ConfigError) as error:
        return Reason.SHAPE_UNKNOWN.value, str(error)
    mechanism = mechanisms.get(config.mechanism)
    asked = spec, terms(site, in_graph), config.approximate, config.options
    refused = mechanism.refusal(*asked)
    if refused is None:
        return None
    reason, sentence = refused
    need = mechanism.missing(*asked)[0]
    if need == "documents":
        names = " and ".join(map(repr, site.mask.inputs))
        return reason.value, f"its mask keeps documents apart, decided by the input {names}; {sentence}"
    if need == "mask" and site.mask.why:
        reason = Reason.MASK_DATA_DEPENDENT if site.mask.inputs else reason
        return reason.value, f"{site.mask.why}; {sentence}"
    return reason.value, sentence


def missing(site: Site, config: LinearizeConfig) -> tuple[str, ...]:
    """What `site` needs that the mechanism neither carries nor may drop; none if that is not why."""
    try:
        spec = site_spec(site)
    except (ValueError, ConfigError):
        return ()
    return mechanisms.get(config.mechanism).missing(spec, terms(site), config.approximate, config.options)


def _name_taken(model: nn.Module, path: str, slot: int) -> tuple[str, str] | None:
    """Why a site can have no child module, as `problem_of`: its owner has something of that name."""
    name = child_name(slot)
    if not hasattr(model.get_submodule(path), name):
        return None
    return (
        Reason.OWNER.value,
        f"its module has an attribute {name!r} of its own, where the new module would be",
    )


def _too_short(site: Site) -> tuple[str, str] | None:
    """Why the example shows too little of `site`, as `problem_of`."""
    if site.shapes["T"] == site.shapes["S"] == 1 and not site.causal:
        problem = "one token alone does not show whether the attention is causal; give an example of several"
        return Reason.SHAPE_UNKNOWN.value, problem
    return None
