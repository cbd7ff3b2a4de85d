"""Whether a graph traced for a later call means what the plan of its owner says.

The plan was made from one graph of the whole model. An owner is traced again for every other form of call,
and a flag, a branch or an optional mask may give it another meaning there.
"""

from __future__ import annotations

import math

from ...errors import ConfigError
from ...passes.site import Pattern, Site
from ...planning.plan import SitePlan, site_spec, terms

_WORDS = {
    "num_heads": "heads",
    "num_key_value_heads": "key/value heads",
    "head_dim": "features of a head",
    "value_dim": "features of a value",
    "scale": "scale",
    "softcap": "softcap",
    "kv_layout": "order of key/value heads",
}


def reads_mask(site: Site) -> bool:
    """Whether inputs of the graph decide what the site's mask hides, so that each call must say it."""
    placeholders = {
        str(node.target)
        for node in site.anchor.graph.find_nodes(op="placeholder")
        if (leaf := node.meta.get("leaf")) is None or leaf.kind == "input"
    }
    return bool(placeholders & set(site.mask.leaves))


def difference(site: Site, planned: SitePlan) -> str | None:
    """What a site is now and was not in the plan, in words; None where both mean the same.

    A mask that comes in whole from outside the owner is no pattern here. Its values are compared with the
    plan in every call, see `masks.documents_in`.
    """
    try:
        now = site_spec(site)
    except (ValueError, ConfigError) as error:
        return str(error)
    then = planned.spec
    for name, word in _WORDS.items():
        a, b = getattr(then, name), getattr(now, name)
        if a != b and not (
            isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-5)
        ):
            return f"its {word} was {a} and is {b}"
    given = site.mask.pattern is Pattern.OTHER and reads_mask(site)
    more = set(terms(site)) - set(planned.terms) - ({"mask", "bias"} if given else set())
    if more:
        return f"its scores have {' and '.join(sorted(more))} that they had not ({site.mask.label})"
    if given or (site.shapes["T"] == 1 and then.causal and site.mask.pattern is Pattern.FULL):
        return None
    if now.causal != then.causal or now.window != then.window:
        return f"its mask was {_mask_of(then)} and is {_mask_of(now)}"
    if now.cross and not then.cross:
        return "its queries and keys were one sequence and are two"
    return None


def _mask_of(spec: object) -> str:
    kind = "causal" if getattr(spec, "causal", False) else "bidirectional"
    window = getattr(spec, "window", None)
    return kind if window is None else f"{kind} with a window of {window}"
