"""Any model or graph, from any of three front doors, as one dialect (`dialect.py`): a runnable GraphModule.

- an `nn.Module`, or a `torch.fx.symbolic_trace` GraphModule, through non-strict `torch.export`;
- a graph handed to a dynamo backend, through `dynamo.py`.

The parameters of the graph are the very tensors of the model, so gradients reach them. Capture runs under
`no_grad`: a `torch.no_grad()` region inside the model leaves no trace in the graph of the first door.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.fx import GraphModule, Node

from .dialect import (
    CaptureError,
    CaptureInfo,
    Leaf,
    first_line,
    in_dialect,
    leaf_of_attribute,
    module_path,
    plain_attention,
    plain_stack,
    source_line,
    symbolic_axes,
)
from .dynamo import from_dynamo
from .exporting import (
    Place,
    agreeing_sizes,
    divided_sizes,
    input_tensors,
    no_dumps,
    undetected_causality,
    without_cached_shapes,
)
from .tracing import TRACING

__all__ = [
    "CaptureError",
    "CaptureInfo",
    "Leaf",
    "capture",
    "from_dynamo",
    "in_dialect",
    "module_path",
    "plain_attention",
    "source_line",
    "to_dialect",
]


def capture(
    obj: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Any = True,
) -> GraphModule:
    """Bring a model, a GraphModule or an ExportedProgram to the dialect.

    Args:
        obj: An `nn.Module`, a GraphModule or an ExportedProgram. It is not changed.
        args: Positional example inputs; their shapes decide which sizes become symbolic.
        kwargs: Example inputs by name.
        dynamic: True offers batch and length axes as dynamic. One that the model fixes becomes static and
            is listed in `gm.meta["capture"].specialised`; an axis of size 1 is never offered. False keeps
            all sizes static. Anything else goes to `torch.export` as `dynamic_shapes`.

    Returns:
        A graph over the parameters of the model, which runs like the model. A graph that is in the dialect
        already is returned as it is.

    Raises:
        CaptureError: `obj` is none of the three, the example inputs do not fit, or no attempt succeeds.
    """
    kwargs = dict(kwargs or {})
    if isinstance(obj, ExportedProgram):
        return _unlift(obj, CaptureInfo("given", {}, {}))
    if isinstance(obj, GraphModule) and in_dialect(obj):
        return obj
    if not isinstance(obj, nn.Module):
        kinds = "an nn.Module, a GraphModule or an ExportedProgram"
        raise CaptureError(f"cannot capture a {type(obj).__name__}: give {kinds}")
    module = getattr(obj, "_orig_mod", obj)  # torch.compile's wrapper: capture what it wraps
    offered = _offered_axes(module, args, kwargs) if dynamic is True else {}
    shapes = None if isinstance(dynamic, bool) else dynamic
    attempts = [("export", False, shapes), ("strict-export", True, shapes)]
    if offered:
        spec = _dynamic(offered, module, args, kwargs)
        attempts = [("export", False, spec), ("strict-export", True, spec), *attempts]

    notes: list[str] = []
    cause: Exception | None = None
    for door, strict, spec in attempts:
        try:
            gm = _exported(module, args, kwargs, spec, strict)
        except Exception as error:  # torch.export raises nearly every class of exception
            sizes = "static" if spec is None else "dynamic"
            notes.append(f"{door}, {sizes} sizes: {first_line(error)}")
            cause = error
            continue
        symbolic = symbolic_axes(gm)
        fixed = {
            k: tuple(a for a in axes if a not in symbolic.get(k, ())) for k, (_, axes) in offered.items()
        }
        gm.meta["capture"] = CaptureInfo(door, symbolic, {k: v for k, v in fixed.items() if v}, tuple(notes))
        return gm
    raise CaptureError(
        f"could not capture {type(module).__name__}: {'; '.join(notes)}. Check that the model runs on the "
        "example inputs and that its forward does not branch on tensor values."
    ) from cause


def captured_once(
    module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> GraphModule:
    """The first attempt of `capture` alone. Raises whatever torch.export raises."""
    kwargs = dict(kwargs or {})
    offered = _offered_axes(module, args, kwargs)
    shapes = _dynamic(offered, module, args, kwargs) if offered else None
    return _exported(module, args, kwargs, shapes, strict=False)


def _dynamic(
    offered: Mapping[str, tuple[Tensor, list[int]]],
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> Any:
    """The axes that are offered as torch.export takes them."""
    collection = ShapesCollection()
    for tensor, axes in offered.values():
        collection[tensor] = dict.fromkeys(axes, Dim.AUTO)
    return collection.dynamic_shapes(module, tuple(args), kwargs)


def _exported(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: Any, strict: bool
) -> GraphModule:
    """The graph that torch.export makes of `module`; sizes that it divides by each other are one size."""

    def once(equal: Sequence[tuple[Place, Place]]) -> GraphModule:
        with TRACING, torch.no_grad(), plain_attention(), undetected_causality(module), no_dumps():
            with agreeing_sizes(module, equal), without_cached_shapes():
                program = export(module, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=strict)
        return _unlift(program, CaptureInfo("export", {}, {}))

    gm = once(())
    equal = divided_sizes(gm)
    if equal:
        # torch infers an axis of size 8 * batch // other_batch where `nn.MultiheadAttention` has memory.
        with contextlib.suppress(Exception):
            return once(equal)
    return gm


def to_dialect(gm: GraphModule, example_inputs: Sequence[Any] | None = None) -> GraphModule:
    """Bring a GraphModule of any front door to the dialect.

    Args:
        gm: The graph. It is not changed.
        example_inputs: Its positional inputs; needed unless it is in the dialect already.

    Returns:
        The graph in the dialect; `gm` itself where it is there already.

    Raises:
        CaptureError: The graph cannot be traced, or needs example inputs.
    """
    if in_dialect(gm):
        return gm
    dynamo = any("grapharg" in node.meta for node in gm.graph.find_nodes(op="placeholder"))
    if dynamo or TracingContext.try_get() is not None:  # DDP hands its backend pieces that carry no record
        if example_inputs is None:
            raise CaptureError("this graph comes from dynamo: pass the example_inputs of the backend call")
        return from_dynamo(gm, example_inputs)
    if example_inputs is None:
        raise CaptureError(
            "this graph is not ATen (torch.fx.symbolic_trace?): pass example_inputs, a tuple of positional "
            "arguments, so that it can be traced"
        )
    return capture(gm, tuple(example_inputs))


def _unlift(program: ExportedProgram, info: CaptureInfo) -> GraphModule:
    """An ExportedProgram as a callable graph on the model's own parameters, with every leaf noted."""
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_autocast):
        _inline_autocast(gm, node)
    for node in gm.graph.nodes:
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = plain_stack(node.meta["nn_module_stack"])
    for node in gm.graph.find_nodes(op="get_attr"):
        value = torch.fx.graph_module._get_attr(gm, node.target)
        if isinstance(value, Tensor):
            node.meta["leaf"] = leaf_of_attribute(node.target, value)
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta.setdefault("leaf", Leaf("input", str(node.target)))
    gm.meta["capture"] = info
    return gm


def _inline_autocast(gm: GraphModule, node: Node) -> None:
    """Put an autocast region's sub-graph in line, between the calls that dynamo writes for the same region.

    Attention inside such a region is attention like any other; in a sub-graph no walk would reach it.
    """
    device, dtype, enabled, cached, body, *inputs = node.args
    assert isinstance(body, Node) and isinstance(body.target, str)
    inner = gm.get_submodule(body.target)
    assert isinstance(inner, GraphModule)
    mapping: dict[Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with gm.graph.inserting_before(node):
        entered = gm.graph.call_function(_enter_autocast, (device, dtype, enabled, cached))
        outputs: Any = gm.graph.graph_copy(inner.graph, mapping)
        gm.graph.call_function(_exit_autocast, (entered,))
    for user in list(node.users):  # the sub-graph returns a tuple, read by getitem
        user.replace_all_uses_with(outputs[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    gm.graph.erase_node(body)
    gm.delete_submodule(body.target)
    gm.graph.lint()
    gm.recompile()


def _offered_axes(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[Tensor, list[int]]]:
    """Which axes of which example tensor may be a batch or a length: `{name: (tensor, axes)}`.

    By rank and dtype, for there is nothing else to go by. Offering an axis that the model fixes is harmless
    (Dim.AUTO makes it static); a head count or feature size that nothing fixes would come out symbolic.
    """
    images = any(isinstance(child, nn.Conv2d | nn.Conv3d) for child in module.modules())
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        name = type(module).__name__
        raise CaptureError(f"the example inputs do not fit {name}.forward: {error}") from error
    offered: dict[str, tuple[Tensor, list[int]]] = {}
    for name, value in input_tensors(bound).items():
        if value.dim() == 0:
            continue
        rank, sizes = value.dim(), value.shape
        if not value.is_floating_point():
            axes = list(range(rank))  # token ids [B, L], masks [B, S] or [B, 1, T, S]
        elif rank == 4 and sizes[1] == 1 and sizes[2] == sizes[3] and not images:
            axes = [0, 2, 3]  # an additive mask
        elif rank == 4 and not images:
            axes = [0, 1 if sizes[1] > sizes[2] else 2]  # BTHD or BHTD: the longer one is the length
        else:
            axes = [0, 1] if rank in (2, 3) else [0]  # [B, L], [B, L, D]; images and video: the batch
        offered[name] = (value, [axis for axis in axes if sizes[axis] > 1])
    return {name: entry for name, entry in offered.items() if entry[1]}
