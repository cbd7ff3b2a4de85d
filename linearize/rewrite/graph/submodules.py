"""Undo inlining: the graph nodes of one call of a child module become a call of that child by name.

A child with one tensor in and one tensor out is called as a whole (`q_proj`, a norm, a dropout); of any
other, its own children are tried, and what is left stays inlined with its parameters looked up on the live
owner.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .runtime import call_child, resolve

Entry = tuple[str, str]
"""A module call a node was recorded in: key in `nn_module_stack` (calls differ), path from the owner."""


def call_children(gm: GraphModule, owner: nn.Module, call: Node) -> None:
    """Rewrite `gm`, captured from a module whose child is `owner`; `call` is the node of the call."""
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    _call_in_regions(gm, owner, call, nodes, 0)
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _call_in_regions(
    gm: GraphModule, owner: nn.Module, call: Node, nodes: Sequence[Node], depth: int
) -> None:
    for entry, region in _regions(nodes, depth):
        if not _replace(gm, owner, call, entry[1], region):
            _call_in_regions(gm, owner, call, region, depth + 1)


def _entries(node: Node) -> list[Entry]:
    found = []
    for key, value in (node.meta.get("nn_module_stack") or {}).items():
        path = re.sub(r"@\d+", "", value[0] if isinstance(value, tuple) else str(value))
        path = path.removeprefix("L__self__").lstrip(".")
        if path.startswith("owner."):
            found.append((str(key), path.removeprefix("owner.")))
    return found


def _regions(nodes: Sequence[Node], depth: int) -> list[tuple[Entry, list[Node]]]:
    regions: list[tuple[Entry, list[Node]]] = []
    last: Entry | None = None
    for node in nodes:
        entries = _entries(node)
        entry = entries[depth] if len(entries) > depth else None
        if entry is not None and entry == last:
            regions[-1][1].append(node)
        elif entry is not None:
            regions.append((entry, [node]))
        last = entry
    return regions


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _replace(gm: GraphModule, owner: nn.Module, call: Node, path: str, region: Sequence[Node]) -> bool:
    """Replace a region by a call of the child at `path` if it is a function of one tensor; else False."""
    inside = set(region)
    inputs = {
        argument
        for node in region
        for argument in node.all_input_nodes
        if argument not in inside and argument.op != "get_attr" and _is_tensor(argument)
    }
    outputs = [node for node in region if any(user not in inside for user in node.users) and _is_tensor(node)]
    unknown = any(
        "val" not in node.meta for node in region
    )  # a rewritten site: not a function of this child alone
    if len(inputs) != 1 or len(outputs) != 1 or unknown:
        return False
    child = resolve(owner, path)
    try:
        inspect.signature(child.forward).bind(torch.empty(0))
    except (TypeError, ValueError):
        return False
    (source,), (result,) = inputs, outputs
    with gm.graph.inserting_after(result):
        replaced = gm.graph.call_function(call_child, (call, path, source))
    replaced.meta = {"val": result.meta["val"]}
    result.replace_all_uses_with(replaced)
    return True
