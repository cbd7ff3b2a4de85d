"""Any model or graph, from any of three front doors, as one dialect: a runnable pre-dispatch ATen GraphModule.

- an `nn.Module`, or a `torch.fx.symbolic_trace` GraphModule, through non-strict `torch.export`;
- a graph handed to a dynamo backend, by re-tracing it in that compilation's own fake mode.

The dialect: `call_function` nodes over ATen overloads (and Python symbol arithmetic, and higher-order ops with
their sub-graphs); every user input a placeholder; parameters, buffers and constants `get_attr` nodes under their
real dotted path, holding the very tensors of the model, so that gradients reach them; `val`, `stack_trace` and
`nn_module_stack` in `node.meta`. Inside a dynamo backend parameters stay placeholders, because dynamo passes them
at each call; `meta["leaf"]` says what each one is.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._guards import TracingContext, detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.traceback import preserve_node_meta
from torch.nn.utils import stateless


class CaptureError(RuntimeError):
    """An object could not be brought to the dialect; the message says which step failed and what to do."""


@dataclass(frozen=True)
class Leaf:
    """What a placeholder or `get_attr` of a captured graph stands for.

    kind: "parameter", "buffer" or "input". path: dotted path from the root ("" when it has none).
    value: the real tensor where it is known at capture time (always for parameters and buffers).
    """

    kind: str
    path: str
    value: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class CaptureInfo:
    """How a graph was captured; in `gm.meta["capture"]`.

    door: "export", "strict-export", "dynamo" or "given". dynamic: input name -> axes that stayed symbolic.
    specialised: input name -> axes that were offered as dynamic but the model fixed. notes: attempts that failed.
    """

    door: str
    dynamic: Mapping[str, tuple[int, ...]]
    specialised: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()


def capture(
    obj: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: bool | Any = True,
) -> GraphModule:
    """Bring a model, a GraphModule or an ExportedProgram to the dialect.

    args, kwargs: example inputs; their values do not matter, their shapes decide what is symbolic.
    dynamic: True offers batch and length axes as dynamic (an axis the model fixes becomes static and is listed
        in `gm.meta["capture"].specialised`); False keeps all sizes static; anything else is passed to
        `torch.export` as `dynamic_shapes`.
    Raises CaptureError when no attempt succeeds. The model is not changed.
    """
    kwargs = dict(kwargs or {})
    if isinstance(obj, ExportedProgram):
        return _unlift(obj, CaptureInfo("given", {}, {}))
    if isinstance(obj, GraphModule) and in_dialect(obj):
        return obj
    if not isinstance(obj, nn.Module):
        raise CaptureError(
            f"cannot capture a {type(obj).__name__}: give an nn.Module, a GraphModule or an ExportedProgram"
        )
    module = getattr(obj, "_orig_mod", obj)  # torch.compile's wrapper: capture what it wraps
    offered = _offered_axes(module, args, kwargs) if dynamic is True else {}
    shapes = None if isinstance(dynamic, bool) else dynamic
    attempts: list[tuple[str, bool, Any]] = [("export", False, shapes)]
    if offered:
        collection = ShapesCollection()
        for tensor, axes in offered.values():
            collection[tensor] = {axis: Dim.AUTO for axis in axes}
        spec = collection.dynamic_shapes(module, tuple(args), kwargs)
        attempts = [("export", False, spec), ("export", False, None), ("strict-export", True, spec)]
    attempts.append(("strict-export", True, shapes))

    notes: list[str] = []
    for door, strict, spec in attempts:
        try:
            with torch.no_grad(), plain_attention():
                program = export(module, tuple(args), kwargs, dynamic_shapes=spec, strict=strict)
        except (
            Exception
        ) as error:  # torch.export raises nearly every exception class; each attempt is reported
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            sizes = "static" if spec is None else "dynamic"
            notes.append(f"{door}, {sizes} sizes: {type(error).__name__}: {first}")
            cause = error
            continue
        gm = _unlift(program, CaptureInfo(door, {}, {}, tuple(notes)))
        symbolic = _symbolic_axes(gm)
        fixed = {
            k: tuple(a for a in axes if a not in symbolic.get(k, ())) for k, (_, axes) in offered.items()
        }
        gm.meta["capture"] = CaptureInfo(door, symbolic, {k: v for k, v in fixed.items() if v}, tuple(notes))
        return gm
    raise CaptureError(
        f"could not capture {type(module).__name__}: "
        + "; ".join(notes)
        + ". Check that the model runs on the example "
        "inputs, and that its forward has no branch on tensor values; a torch.compile backend may still work."
    ) from cause


def to_dialect(gm: GraphModule, example_inputs: Sequence[Any] | None = None) -> GraphModule:
    """Bring a GraphModule of any front door to the dialect; `gm` itself when it is already there.

    example_inputs: the positional inputs of the graph; optional where dynamo left a record of them in the graph.
    """
    if in_dialect(gm):
        return gm
    if any("grapharg" in node.meta for node in gm.graph.find_nodes(op="placeholder")):
        if example_inputs is None:
            raise CaptureError(
                "this graph comes from dynamo: pass the example_inputs that the backend was called with"
            )
        return from_dynamo(gm, example_inputs)
    if example_inputs is None:
        raise CaptureError(
            "this graph is not ATen (for example from torch.fx.symbolic_trace): pass example_inputs, a tuple of "
            "positional arguments, so that it can be traced"
        )
    return capture(gm, tuple(example_inputs))


def from_dynamo(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Bring the graph of a dynamo backend call to the dialect.

    Placeholders stay one to one, in dynamo's order, each with `meta["leaf"]`. Symbolic sizes stay symbolic in the
    compilation's own ShapeEnv, so guards keep meaning what they meant.
    """
    mode = _fake_mode(example_inputs)
    attributes = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    fakes = [_fake(mode, value) for value in (*example_inputs, *attributes.values())]

    def run(*flat: Any) -> Any:
        inputs, values = flat[: len(example_inputs)], flat[len(example_inputs) :]
        with stateless._reparametrize_module(gm, dict(zip(attributes, values, strict=True))):
            return _Rerun(gm).run(*inputs)

    try:
        with mode, preserve_node_meta(), plain_attention():
            traced = make_fx(run, pre_dispatch=True)(*fakes)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CaptureError(
            f"could not re-trace the dynamo graph to ATen: {type(error).__name__}: {first}"
        ) from error

    old = gm.graph.find_nodes(op="placeholder")
    new = traced.graph.find_nodes(op="placeholder")
    for node, (name, value) in zip(new[len(old) :], attributes.items(), strict=True):
        _set_attribute(traced, name, value)
        with traced.graph.inserting_before(node):
            attribute = traced.graph.get_attr(name)
        attribute.meta = {**node.meta, "leaf": _leaf_of_attribute(name, value)}
        node.replace_all_uses_with(attribute)
        traced.graph.erase_node(node)
    keep_root = (
        len(_module_roots(gm)) > 1
    )  # two models in one compiled function: `a.layers.0` and `b.layers.0`
    for before, after in zip(old, new[: len(old)], strict=True):
        after.meta["leaf"] = _leaf_of_input(before, keep_root)
        after.target = before.target
        after._rename(before.name)
    for node in traced.graph.nodes:
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = _plain_stack(node.meta["nn_module_stack"], keep_root)
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.item.default):
        if not node.users:  # the floats that `_Rerun` made constants
            traced.graph.erase_node(node)
    traced.graph.lint()
    traced.recompile()
    traced.meta["capture"] = CaptureInfo("dynamo", _symbolic_axes(traced), {})
    return traced


def in_dialect(gm: GraphModule) -> bool:
    """Whether `gm` already consists of nodes of the dialect."""
    return all(_in_dialect(node) for node in gm.graph.nodes)


def _in_dialect(node: Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    if node.target is torch._C._set_grad_enabled or isinstance(node.target, OpOverload | HigherOrderOperator):
        return True
    if getattr(node.target, "__module__", None) == "torch.amp.autocast_mode":
        return True
    # Arithmetic on sizes is Python's own; the same function on tensors is not yet ATen.
    value = node.meta.get("val")
    sizes = node.target is operator.getitem or isinstance(
        value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool
    )
    return sizes and "val" in node.meta


# ---------------------------------------------------------------------------------------------- where a node is


def module_path(node: Node) -> tuple[tuple[str, str], ...]:
    """The modules whose forward `node` was recorded in, outermost first, as `(dotted path, class name)`.

    The first entry is always the root, path "" (class "" where the tracer did not record it), so
    `module_path(node)[-1][0]` is the path of the innermost module. Reads the three formats in use: fx
    (`layers.0` -> class), export (`L__self__layers.0` -> class as text) and dynamo (id -> `L['self'].layers.0`).
    """
    entries: list[tuple[str, str]] = [("", "")]
    for value in (node.meta.get("nn_module_stack") or {}).values():
        text, kind = value if isinstance(value, tuple) else (str(value), "")
        path = _dynamo_path(text)[1] if re.match(r"[LG]\[", text) else text
        path = re.sub(r"@\d+", "", path)  # export numbers repeated calls of one module: `block@1`
        name = kind.rsplit(".", 1)[-1] if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        if path == "":
            entries[0] = ("", name)
        elif path != entries[-1][0]:
            entries.append((path, name))
    return tuple(entries)


def source_line(node: Node) -> str:
    """The innermost line of model code that made `node`, as `file.py:123`; "" when no trace was kept.

    Frames inside torch itself are passed over: for `nn.MultiheadAttention` it is the line that calls it.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    torch_root = PurePath(torch.__file__).parent
    for file, line in reversed(frames):
        if not PurePath(file).is_relative_to(torch_root):
            return f"{PurePath(file).name}:{line}"
    return ""


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Switch off the fused inference path of `nn.MultiheadAttention` and `nn.TransformerEncoder`, and restore it.

    The fused op hides the attention inside one opaque call; the ordinary path is the same mathematics.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# ------------------------------------------------------------------------------------------------------ helpers


def _unlift(program: ExportedProgram, info: CaptureInfo) -> GraphModule:
    """An ExportedProgram as a callable graph whose parameters are the model's own, with leaves and values noted."""
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    for node in gm.graph.find_nodes(op="get_attr"):
        value = torch.fx.graph_module._get_attr(gm, node.target)
        if isinstance(value, Tensor):
            node.meta["leaf"] = _leaf_of_attribute(node.target, value)
    for node in gm.graph.find_nodes(op="placeholder"):
        node.meta.setdefault("leaf", Leaf("input", str(node.target)))
    gm.meta["capture"] = info
    return gm


def _offered_axes(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[Tensor, list[int]]]:
    """Which axes of which example tensor may be a batch or a length: `{name: (tensor, axes)}`.

    By rank and dtype, for there is nothing else to go by. Offering too many is harmless where the model fixes the
    size (Dim.AUTO then makes it static), but a head count or a feature size that nothing fixes would be symbolic.
    """
    images = any(isinstance(child, nn.Conv2d | nn.Conv3d) for child in module.modules())
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit {type(module).__name__}.forward: {error}"
        ) from error
    leaves = pytree.tree_flatten_with_path(dict(bound.arguments))[0]
    offered: dict[str, tuple[Tensor, list[int]]] = {}
    for path, value in leaves:
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        sizes = value.shape
        if value.dim() == 1:
            axes = [0]
        elif not value.is_floating_point():
            axes = list(range(value.dim()))
        elif value.dim() == 4 and images:
            axes = [0]
        elif value.dim() == 4 and sizes[1] == 1 and sizes[2] == sizes[3]:
            axes = [0, 2, 3]  # an additive mask
        elif value.dim() == 4:
            axes = [
                0,
                1 if sizes[1] > sizes[2] else 2,
            ]  # [B, T, H, D] or [B, H, T, D]: the longer one is the length
        else:
            axes = [0, 1] if value.dim() < 4 else [0]
        name = "_".join(re.sub(r"\W", "", str(key)).lower() for key in path)  # as export names placeholders
        offered[name] = (value, [axis for axis in axes if sizes[axis] > 1])
    return {name: entry for name, entry in offered.items() if entry[1]}


def _symbolic_axes(gm: GraphModule) -> dict[str, tuple[int, ...]]:
    """Input name -> axes whose size is a symbol."""
    found: dict[str, tuple[int, ...]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            axes = tuple(i for i, size in enumerate(value.shape) if isinstance(size, torch.SymInt))
            if axes:
                found[str(node.target)] = axes
    return found


def _fake_mode(example_inputs: Sequence[Any]) -> FakeTensorMode:
    """The compilation's own fake mode, or a new one when a stored dynamo graph is brought over later."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else detect_fake_mode(example_inputs)
    return mode if mode is not None else FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    """`value` as a fake tensor of `mode` with the symbols dynamo gave it (as AOTAutograd does it)."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    context = TracingContext.try_get()
    symbolic = context.tensor_to_context.get(value) if context is not None else None
    if symbolic is None:
        return mode.from_tensor(value, static_shapes=True)
    return mode.from_tensor(
        value, static_shapes=False, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False
    )


class _Rerun(Interpreter):
    """Runs a dynamo graph, with float attributes of the model as constants.

    With `dynamic=True` dynamo makes every Python float an input (`self.scaling` -> 0-d tensor -> `.item()`). Turning
    it back into a number adds a guard on its value, so a scale is a constant again and a changed one recompiles.
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


def _dynamo_path(text: str, keep_root: bool = False) -> tuple[str, str]:
    """Dynamo's expression for an object, as (root variable, dotted path): `L['self']._modules['a'].b` -> self, a.b."""
    match = re.match(r"[LG]\['([^']+)'\](.*)", text, re.DOTALL)
    if not match:
        return "", text
    root, rest = match.groups()
    tokens = re.findall(r"\['?([^'\]]+)'?\]|\.(\w+)", rest)
    parts = [a or b for a, b in tokens]
    parts = [
        p
        for p in parts
        if p not in ("_modules", "_parameters", "_buffers", "__dict__", "__closure__", "cell_contents")
    ]
    return root, ".".join([root, *parts] if keep_root else parts)


def _module_roots(gm: GraphModule) -> set[str]:
    """The variables through which a dynamo graph reaches its modules."""
    names = [text for node in gm.graph.nodes for text, _ in (node.meta.get("nn_module_stack") or {}).values()]
    names += [
        name
        for node in gm.graph.find_nodes(op="placeholder")
        if "._parameters[" in (name := _source_name(node))
    ]
    return {root for name in names if (root := _dynamo_path(name)[0])}


def _plain_stack(stack: Mapping[str, Any], keep_root: bool) -> dict[str, tuple[str, Any]]:
    """A dynamo module stack in export's format, so that every later reader sees one."""
    plain = {}
    for key, (text, kind) in stack.items():
        path = _dynamo_path(text, keep_root)[1] if re.match(r"[LG]\[", text) else text
        plain[key] = (path, f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind))
    return plain


def _leaf_of_input(node: Node, keep_root: bool) -> Leaf:
    """What a dynamo placeholder is: a parameter or buffer of the model, or a value of this call."""
    name = _source_name(node)
    value = getattr(node.meta.get("grapharg"), "example", None)
    tensor = value if isinstance(value, Tensor) else None
    kind = "buffer" if "._buffers[" in name else "input"
    if isinstance(tensor, nn.Parameter) or "._parameters[" in name:
        kind = "parameter"
    path = _dynamo_path(name, keep_root or kind == "input")[1]
    return Leaf(kind, path or str(node.target), tensor)


def _leaf_of_attribute(name: str, value: Tensor) -> Leaf:
    return Leaf("parameter" if isinstance(value, nn.Parameter) else "buffer", name, value)
