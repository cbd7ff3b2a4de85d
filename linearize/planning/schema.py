"""The schema of a conversion's record: what every entry may be. It is checked before anything is built.

A checkpoint comes from anywhere. An entry of the wrong kind would raise somewhere deep, and one of the right
kind and a value that nothing has could load and compute something else.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ..common.checks import excerpt
from ..common.schema import FLAG, OBJECT, OBJECTS, TEXT, Rule, check_entries, number, optional, whole, word
from ..errors import CheckpointError
from ..mechanisms.base import BIGGEST, NEEDS
from ..mechanisms.spec import SiteSpec
from ..passes.site import Pattern, Reason
from .left_alone import KEPT, WINDOWED
from .plan import ROUTES, VERSION

_MASK = re.compile(
    rf"({'|'.join(pattern.value for pattern in Pattern)})(\(\d{{1,9}}\))?(\+padding)?(\+bias)?"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LARGEST = 1e6
"""Of factors of scores: beyond every one that a model has, and still finite in any dtype's sums."""


_POSITIVE: Rule = (lambda x: number(0, _LARGEST)[0](x) and x > 0, f"a number above 0, up to {_LARGEST:g}")
_PATH: Rule = (
    lambda x: isinstance(x, str) and len(x) < 1000 and not _CONTROL.search(x),
    "the path of a module",
)
_MASKS: Rule = (lambda x: isinstance(x, str) and bool(_MASK.fullmatch(x)), "a mask, such as causal+padding")
_TERMS: Rule = (
    lambda x: isinstance(x, list | tuple) and all(isinstance(term, str) and term in NEEDS for term in x),
    f"a list of names among {', '.join(NEEDS)}",
)
RECORD: Mapping[str, Rule] = {
    "version": (lambda x: type(x) is int and x > 0, "a whole number above 0"),
    "plan": OBJECT,
    "config": OBJECT,
    # A model is not lost for what another release measured of it: what is no evaluation is left out.
    "measured": (lambda x: True, "a list"),
    # Of a plain module only.
    "model": TEXT,
    "weights": TEXT,
}
PLAN: Mapping[str, Rule] = {
    "version": whole(1, BIGGEST),
    "compact_masks": FLAG,
    "sites": (lambda x: OBJECTS[0](x) and len(x) > 0, "a list of objects, one or more"),
    "skipped": OBJECTS,
}
SITE: Mapping[str, Rule] = {
    "path": _PATH,
    "slot": whole(0, 1000),
    "route": word(*ROUTES),
    "rung": word("seam", "graft"),  # the routes of version 1
    "spec": OBJECT,
    "layer_index": optional(whole(0, BIGGEST)),
    "mask": _MASKS,
    "calls": whole(1, BIGGEST),
    "source": TEXT,
    "terms": _TERMS,
}
SPEC: Mapping[str, Rule] = {
    "num_heads": whole(1, BIGGEST),
    "num_key_value_heads": whole(1, BIGGEST),
    "head_dim": whole(1, BIGGEST),
    "value_dim": whole(1, BIGGEST),
    "causal": FLAG,
    "cross": FLAG,
    "scale": optional(number(-_LARGEST, _LARGEST)),
    "softcap": optional(_POSITIVE),
    "kv_layout": word("interleaved", "tiled"),
    "dropout": number(0, 1),
    "window": optional(whole(0, 10**9)),
}
SKIPPED: Mapping[str, Rule] = {
    "path": _PATH,
    "ordinal": whole(0, BIGGEST),
    "reason": word(KEPT, WINDOWED, *(reason.value for reason in Reason)),
    "message": TEXT,
}


def check_record(record: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the entry, unless a record is one in form.

    Whether its paths are those of a model is asked when there is one, and its `config` checks itself.
    """
    check_entries(record, "the record", RECORD, ("version", "plan", "config"))
    for name in ("version", "group_size", "conv_taps"):  # what every release has written
        if name not in record["config"]:
            raise CheckpointError(f"config: {name!r} is missing")
    for name in ("layers", "keep_softmax", "approximate"):  # where a user may give one alone
        if not isinstance(record["config"].get(name), list | None):
            raise CheckpointError(f"config: {name!r} must be a list")
    plan = record["plan"]
    version = plan.get("version")
    if not whole(1, VERSION)[0](version):
        raise CheckpointError(
            f"the plan has version {excerpt(version)}, this package reads versions 1 to {VERSION}; "
            "convert the original model again"
        )
    check_entries(plan, "plan", PLAN, ("version", "sites"))
    seen: set[tuple[str, int]] = set()
    routes: dict[str, str] = {}
    for i, site in enumerate(plan["sites"]):
        where = f"plan.sites[{i}]"
        check_entries(site, where, SITE, ("path", "slot", "spec", "layer_index", "mask"))
        check_entries(site["spec"], f"{where}.spec", SPEC, required_of(SiteSpec))
        route = site.get("route", site.get("rung"))
        if route is None or ("route" in site) == ("rung" in site):
            raise CheckpointError(f"{where}.route is missing, or there twice")
        key = site["path"], site["slot"]
        if key in seen or routes.setdefault(site["path"], route) != route:
            raise CheckpointError(f"{where}: the path {site['path']!r} is planned twice")
        seen.add(key)
    for path, slot in seen:
        if slot and (path, slot - 1) not in seen:
            raise CheckpointError(f"plan.sites: {path!r} has slot {slot} and none before it")
    for i, skipped in enumerate(plan.get("skipped", ())):
        check_entries(skipped, f"plan.skipped[{i}]", SKIPPED, tuple(SKIPPED))


def required_of(kind: Any) -> tuple[str, ...]:
    """The fields of a dataclass that have no default."""
    return tuple(field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING)
