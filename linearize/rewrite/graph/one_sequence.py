"""Owners that merge batch and heads into one axis (Bloom), called with one sequence.

The axis then has the size of the heads alone, and the matcher takes it for a batch of one head each. The plan
knows the number of heads, and the call that it has one sequence.
"""

from __future__ import annotations

import dataclasses

import sympy

from ...mechanisms.spec import SiteSpec
from ...passes.site import KVKind, Operand, Relayout, Site


def with_heads(site: Site, spec: SiteSpec) -> Site:
    """`site` of a call with one sequence, with its leading axis read as the heads where it can be no other.

    The data does not move, for one of the two axes has size one.
    """
    shapes = site.shapes
    merged = (shapes["B"], shapes["H"]) == (spec.num_heads, 1) and site.kv_map.kind is KVKind.EQUAL
    if not merged or spec.num_heads != spec.num_key_value_heads:
        return site
    return dataclasses.replace(
        site,
        query=_swapped(site.query),
        key=_swapped(site.key),
        value=_swapped(site.value),
        program=tuple(
            step if step.term is None else dataclasses.replace(step, term=_swapped(step.term))
            for step in site.program
        ),
    )


def _swapped(operand: Operand) -> Operand:
    relayout = operand.relayout
    batch, heads, *rest = relayout.merged
    assert batch == 1 or heads == sympy.Integer(1)
    swapped: Relayout = dataclasses.replace(relayout, merged=(heads, batch, *rest))
    return dataclasses.replace(operand, relayout=swapped)
