"""Masks that the caller gives whole, as `nn.TransformerEncoder(x, mask=...)` takes them.

No graph says what such a mask hides. What it says in the example is what the site is converted for, and every
later call compares its own mask with that, value by value (`rewrite.masks.documents_in`): nothing is
concluded of one call from another.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ConfigError, InputError
from ..passes.alike import unknown
from ..passes.evaluate import on_inputs, value_ancestors
from ..passes.exporting import input_tensors
from ..passes.raise_ import canonical_terms, emitter_for
from ..passes.site import MatchReport, Pattern, Site, term_operands
from ..planning.plan import site_spec
from ..rewrite.masks import documents_in, key_mask_of, position_mask
from ..rewrite.score_terms import hides_what_is_later, kinds_of, parts_seen


def with_given_masks(
    report: MatchReport, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> MatchReport:
    """A report whose sites with a given mask have the pattern that it says in the example.

    Args:
        report: Of the model's graph.
        model: What was captured.
        args, kwargs: The example that it was captured on.

    Returns:
        The report. Sites are as they were where the mask says no pattern of those that are carried.
    """
    if not any(site.mask.given for site in report.sites):
        return report
    inputs = input_tensors(inspect.signature(model.forward).bind(*args, **kwargs))
    learned = {name for name, _ in model.named_parameters()}
    known: dict[Any, dict[str, Any]] = {}
    sites = []
    for site in report.sites:
        if site.mask.given and not learned & set(site.mask.leaves):
            steps = tuple((repr(step.value), step.term) for step in site.program)
            if steps not in known:
                known[steps] = _said(site, report, inputs)
            site = dataclasses.replace(site, mask=dataclasses.replace(site.mask, **known[steps]))
        sites.append(site)
    return dataclasses.replace(report, sites=tuple(sites))


def _said(site: Site, report: MatchReport, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the inputs of a call say for the record of the mask; nothing where that is no pattern."""
    seen = _seen(site, report, inputs)
    if seen is None or 1 in seen.shape[-2:]:
        return {}
    real = key_mask_of(seen, seen.shape[0], seen.shape[-1])
    assert real is not None
    for pattern in (Pattern.FULL,) if site.cross else (Pattern.CAUSAL, Pattern.FULL):
        said: dict[str, Any] = {"pattern": pattern, "bias": False, "per_head": False, "why": ""}
        try:
            spec = site_spec(dataclasses.replace(site, mask=dataclasses.replace(site.mask, **said)))
            documents = documents_in(seen, real, spec, None, site.path)
        except (InputError, ConfigError, ValueError):
            continue
        return {**said, "padding": not bool(real.all()), "documents": documents is not None}
    return {}


def _seen(site: Site, report: MatchReport, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """What the terms of a site show in a call, bool `[B, H, T, S]`; None where that is not all they do."""
    operands = term_operands(site.program)
    if any(node.target is unknown for term in operands for node in value_ancestors(term.node)):
        return None
    emitter = emitter_for(report.graph_module, site)
    try:
        terms = on_inputs(canonical_terms(emitter, site), inputs)
    except Exception:  # an operator may raise anything, and the mask is then as unknown as it was
        return None
    finally:
        for node in reversed(emitter.created):
            emitter.graph.erase_node(node)
    parts = list(parts_seen(terms, kinds_of(site.program)))
    if not parts or any(sharp is not None and not bool(sharp) for _, sharp in parts):
        return None
    seen = parts[0][0]
    for part, _ in parts[1:]:
        seen = seen & part
    if hides_what_is_later(site.program):
        seen = seen & position_mask(seen.shape[2], seen.shape[3], 0, seen.device)
    return seen
