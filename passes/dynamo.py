"""The second front door: a graph inside a dynamo backend, re-traced to the dialect.

Dynamo's own graphs mix methods, operators and Python functions. Running one under pre-dispatch `make_fx`, in
that compilation's fake mode, gives ATen and keeps gradients, autocast regions, module stacks and symbols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.traceback import preserve_node_meta
from torch.nn.utils import stateless

from .dialect import (
    CaptureError,
    CaptureInfo,
    Leaf,
    dynamo_path,
    first_line,
    leaf_of_attribute,
    symbolic_axes,
)


def from_dynamo(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Bring the graph of a dynamo backend call to the dialect.

    Placeholders stay one to one, in dynamo's order and under its names, each with `meta["leaf"]`. Symbolic
    sizes stay symbols of the compilation's own ShapeEnv, so guards mean what they meant. `gm` is not changed.
    """
    mode = _fake_mode(example_inputs)
    attributes = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    fakes = [fake(mode, value) for value in (*example_inputs, *attributes.values())]

    def run(*flat: Any) -> Any:
        inputs, values = flat[: len(example_inputs)], flat[len(example_inputs) :]
        with stateless._reparametrize_module(gm, dict(zip(attributes, values, strict=True))):
            return _Rerun(gm).run(*inputs)

    traced = retrace(run, fakes, mode)
    old = gm.graph.find_nodes(op="placeholder")
    new = traced.graph.find_nodes(op="placeholder")
    for node, (name, value) in zip(new[len(old) :], attributes.items(), strict=True):
        _set_attribute(traced, name, value)
        with traced.graph.inserting_before(node):
            attribute = traced.graph.get_attr(name)
        attribute.meta = {**node.meta, "leaf": leaf_of_attribute(name, value)}
        node.replace_all_uses_with(attribute)
        traced.graph.erase_node(node)
    keep_root = len(_module_roots(gm)) > 1  # two models in one function: `a.layers.0` and `b.layers.0`
    for before, after in zip(old, new[: len(old)], strict=True):
        after.meta["leaf"] = _leaf_of_input(before, keep_root)
        after.target = before.target
        after._rename(before.name)
    for node in traced.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {
            k: (dynamo_path(text, keep_root)[1], kind) for k, (text, kind) in stack.items()
        }
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.item.default):
        if not node.users:  # the floats that `_Rerun` made constants
            traced.graph.erase_node(node)
    traced.graph.lint()
    traced.recompile()
    traced.meta["capture"] = CaptureInfo("dynamo", symbolic_axes(traced), {})
    return traced


def retrace(run: Any, fakes: Sequence[Any], mode: FakeTensorMode) -> GraphModule:
    """`run(*fakes)` as a pre-dispatch ATen graph with one placeholder for each value of `fakes`, in order."""
    try:
        with mode, preserve_node_meta():
            return make_fx(run, pre_dispatch=True)(*fakes)
    except Exception as error:  # anything an operator or a user's Python may raise
        raise CaptureError(f"could not re-trace the dynamo graph to ATen: {first_line(error)}") from error


def fake(mode: FakeTensorMode, value: Any) -> Any:
    """`value` as a fake tensor of `mode`, with the symbols dynamo gave it (as AOTAutograd does it)."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    context = TracingContext.try_get()
    symbolic = context.tensor_to_context.get(value) if context is not None else None
    if symbolic is None:
        return mode.from_tensor(value, static_shapes=True)
    return mode.from_tensor(
        value, static_shapes=False, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False
    )


def _fake_mode(example_inputs: Sequence[Any]) -> FakeTensorMode:
    """The compilation's own fake mode, or a new one when a stored dynamo graph is brought over later."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else detect_fake_mode(example_inputs)
    return mode if mode is not None else FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)


class _Rerun(Interpreter):
    """Runs a dynamo graph, with float attributes of the model as constants.

    With `dynamic=True` dynamo makes every Python float an input (`self.scaling` -> 0-d tensor -> `.item()`).
    Turning it back into a number adds a guard: the scale is a constant, and a changed one recompiles.
    """

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_method(target, args, kwargs)
        return float(result) if target == "item" and isinstance(result, torch.SymFloat) else result


def _set_attribute(gm: GraphModule, name: str, value: Tensor) -> None:
    *parents, leaf = name.split(".")
    owner: nn.Module = gm
    for parent in parents:
        if not hasattr(owner, parent):
            owner.add_module(parent, nn.Module())
        owner = owner.get_submodule(parent)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def _source_name(node: Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else str(name)


def _module_roots(gm: GraphModule) -> set[str]:
    """The variables through which a dynamo graph reaches its modules."""
    stacks: list[Mapping[str, Any]] = [node.meta.get("nn_module_stack") or {} for node in gm.graph.nodes]
    names = [text for stack in stacks for text, _ in stack.values()]
    names += [
        name for n in gm.graph.find_nodes(op="placeholder") if "._parameters[" in (name := _source_name(n))
    ]
    return {root for name in names if (root := dynamo_path(name)[0])}


def _leaf_of_input(node: Node, keep_root: bool) -> Leaf:
    """What a dynamo placeholder is: a parameter or buffer of the model, or a value of this call."""
    name = _source_name(node)
    value = getattr(node.meta.get("grapharg"), "example", None)
    tensor = value if isinstance(value, Tensor) else None
    kind = "buffer" if "._buffers[" in name else "input"
    if isinstance(tensor, nn.Parameter) or "._parameters[" in name:
        kind = "parameter"
    path = dynamo_path(name, keep_root or kind == "input")[1]
    return Leaf(kind, path or str(node.target), tensor)
