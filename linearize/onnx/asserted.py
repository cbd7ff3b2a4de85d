"""What a graph asserts of its inputs, in a format without assertions: results are NaN where it does not hold.

A converted model asserts in a graph what it would look at outside of one: that a mask says no more than its
attention follows, that a row holds one document.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from ..passes.graphs import ancestors

aten = torch.ops.aten


def show_as_nan(exported: ExportedProgram) -> None:
    """Make floating results NaN where an assertion about the inputs fails.

    What is asserted of constants alone was true when they became constants.
    """
    signature = exported.graph_signature
    given = {spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT}
    asserted = exported.graph.find_nodes(op="call_function", target=aten._assert_async.msg)
    conditions = [
        node.args[0] for node in asserted if any(n.name in given for n in ancestors(node.all_input_nodes))
    ]
    if not conditions:
        return
    output = exported.graph.output_node()
    with exported.graph.inserting_before(output):
        fine = conditions[0]
        for condition in conditions[1:]:
            fine = _like(condition, aten.logical_and.default, fine, condition)
        (results,) = output.args
        shown = [
            _like(value, aten.where.ScalarOther, fine, value, math.nan)
            if spec.kind is OutputKind.USER_OUTPUT and value.meta["val"].is_floating_point()
            else value
            for spec, value in zip(signature.output_specs, results, strict=True)
        ]
    output.args = (tuple(shown),)
    for spec, value in zip(signature.output_specs, shown, strict=True):
        spec.arg.name = value.name
    exported.graph_module.recompile()


def _like(value: Any, target: Any, *args: Any) -> Node:
    """A node whose result has the shape and dtype of that of `value`."""
    made = value.graph.call_function(target, args)
    made.meta["val"] = value.meta["val"]
    return made
