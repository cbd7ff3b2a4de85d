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
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.traceback import preserve_node_meta
from torch.nn.utils import stateless
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import CheckpointPolicy

from .dialect import (
    CaptureError,
    CaptureInfo,
    Leaf,
    dynamo_path,
    first_line,
    leaf_of_attribute,
    plain_stack,
    symbolic_axes,
)
from .fastpath import FASTPATH


def from_dynamo(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Bring the graph of a dynamo backend call to the dialect.

    Placeholders stay one to one, in dynamo's order and under its names, each with `meta["leaf"]`. Symbolic
    sizes stay symbols of the compilation's own ShapeEnv, so guards mean what they meant. `gm` is not changed.
    """
    traced = retrace(gm, example_inputs)
    keep_root = len(_module_roots(gm)) > 1  # two models in one function: `a.layers.0` and `b.layers.0`
    old, new = gm.graph.find_nodes(op="placeholder"), traced.graph.find_nodes(op="placeholder")
    for before, after in zip(old, new, strict=True):
        after.meta["leaf"] = _leaf_of_input(before, keep_root)
    for node in traced.graph.nodes:
        node.meta["nn_module_stack"] = plain_stack(node.meta.get("nn_module_stack") or {}, keep_root)
    traced.meta["capture"] = CaptureInfo("dynamo", symbolic_axes(traced), {})
    return traced


def retrace(gm: GraphModule, example_inputs: Sequence[Any], lift: Sequence[str] = ()) -> GraphModule:
    """Run `gm` under pre-dispatch `make_fx`: the same computation, in ATen, modules in line.

    Placeholders stay one to one under their names. Tensors that `gm` owns stay attributes under their names,
    except those named in `lift`, which become further inputs at the end, in that order.
    Raises CaptureError if an operator or the user's Python code cannot be traced.
    """
    mode = fake_mode(example_inputs)
    owned = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    owned = {**{n: value for n, value in owned.items() if n not in lift}, **{n: owned[n] for n in lift}}
    fakes = [fake(mode, value) for value in (*example_inputs, *owned.values())]

    def run(*flat: Any) -> Any:
        inputs, values = flat[: len(example_inputs)], flat[len(example_inputs) :]
        with stateless._reparametrize_module(gm, dict(zip(owned, values, strict=True))):
            outputs = _Rerun(gm).run(*inputs)
        _check_gradients(gm, outputs)
        return outputs

    try:
        with mode, preserve_node_meta():
            traced = make_fx(run, pre_dispatch=True)(*fakes)
    except Exception as error:  # anything an operator or a user's Python may raise
        raise CaptureError(f"could not re-trace the graph to ATen: {first_line(error)}") from error
    old, new = gm.graph.find_nodes(op="placeholder"), traced.graph.find_nodes(op="placeholder")
    for before, after in zip(old, new, strict=False):
        after.target = before.target
        after._rename(before.name)
        if "leaf" in before.meta:
            after.meta["leaf"] = before.meta["leaf"]
    for node, (name, value) in zip(new[len(old) :], owned.items(), strict=True):
        node.meta["leaf"] = leaf_of_attribute(name, value)
        if name not in lift:
            _as_attribute(traced, node, name, value)
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.item.default):
        if not node.users:  # the floats that `_Rerun` made constants
            traced.graph.erase_node(node)
    traced.graph.lint()
    traced.recompile()
    return traced


def _as_attribute(gm: GraphModule, node: Node, name: str, value: Tensor) -> None:
    """Turn the placeholder `node` into an attribute `name` of `gm`."""
    _set_attribute(gm, name, value)
    with gm.graph.inserting_before(node):
        attribute = gm.graph.get_attr(name)
    attribute.meta = dict(node.meta)
    node.replace_all_uses_with(attribute)
    gm.graph.erase_node(node)


def _check_gradients(gm: GraphModule, outputs: Any) -> None:
    """Refuse a trace that lost a gradient: a higher-order op that runs its body outside autograd, say."""
    expected = [node.meta.get("example_value") for node in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
    for before, after in zip(expected, outputs, strict=True):
        if isinstance(before, Tensor) and before.requires_grad and not after.requires_grad:
            raise CaptureError("a gradient that the original graph has would be lost")


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


def fake_mode(example_inputs: Sequence[Any]) -> FakeTensorMode:
    """The compilation's own fake mode, or a new one when a stored dynamo graph is brought over later."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else detect_fake_mode(example_inputs)
    return mode if mode is not None else FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)


class _Rerun(Interpreter):
    """Runs a graph, and does right what a plain run would get wrong.

    With `dynamic=True` dynamo makes every Python float an input (`self.scaling` -> 0-d tensor -> `.item()`).
    Turning it back into a number adds a guard: the scale is a constant, and a changed one recompiles.

    The body of a checkpointed region comes in line, its nodes tagged for the partitioner as AOTAutograd tags
    them: attention inside is attention, and its activations are still recomputed in the backward pass.

    torch's fused inference calls are spelled out (`fastpath.py`).

    A user's `autograd.Function` stays one opaque call: traced through, it would lose its own backward.
    """

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_method(target, args, kwargs)
        return float(result) if target == "item" and isinstance(result, torch.SymFloat) else result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            body, *inputs = args
            return _Rerun(_tagged(body)).run(*inputs)
        if target is torch.ops.higher_order.autograd_function_apply:
            return _opaque(target, args, kwargs)
        if target is torch.nn.functional.scaled_dot_product_attention:
            # Keys and values of a cache come in with a length symbol each: the guard makes them one.
            key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[1:3]
            torch._check(key.shape[-2] == value.shape[-2], lambda: "key and value differ in length")
        return super().call_function(FASTPATH.get(target, target), args, kwargs)


def _tagged(body: GraphModule) -> GraphModule:
    """A copy of a checkpointed region's graph whose nodes say that they are to be recomputed."""
    copy = GraphModule(body, Graph())
    values: dict[Node, Node] = {}
    copy.graph.output(copy.graph.graph_copy(body.graph, values))
    for node in copy.graph.nodes:
        node.meta = {**node.meta, "recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": id(body)}
    copy.recompile()
    return copy


def _opaque(target: Any, args: Any, kwargs: Any) -> Any:
    """Record `target(*args, **kwargs)` as one node, sub-graphs and all, without tracing into it."""
    mode = get_proxy_mode()
    if mode is None:
        return target(*args, **kwargs)
    tracer: Any = mode.tracer

    def as_proxy(value: Any) -> Any:
        if not isinstance(value, GraphModule):
            return tracer.unwrap_proxy(value)
        name = tracer.get_fresh_qualname("body")
        tracer.root.add_module(name, value)
        return tracer.create_proxy("get_attr", name, (), {})

    recorded = tree_map(as_proxy, (tuple(args), dict(kwargs)))
    with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        result = target(*args, **kwargs)
    proxy = tracer.create_proxy("call_function", target, *recorded)
    return track_tensor_tree(result, proxy, constant=None, tracer=tracer)


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
