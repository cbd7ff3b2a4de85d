"""The dialect every pass reads: what may stand in a captured graph, and what its nodes say about themselves.

`call_function` nodes over pre-dispatch ATen overloads (and Python arithmetic on sizes, and higher-order ops
with their sub-graphs); every user input a placeholder; parameters, buffers and constants `get_attr` nodes
under their real dotted path; `val`, `stack_trace` and `nn_module_stack` in `node.meta`. Inside a dynamo
backend parameters stay placeholders, because dynamo passes them. `meta["leaf"]` says what each one is.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node


class CaptureError(RuntimeError):
    """An object could not be brought to the dialect; the message says which step failed and what to do."""


@dataclass(frozen=True)
class Leaf:
    """What a placeholder or `get_attr` of a captured graph stands for.

    kind: "parameter", "buffer" or "input". path: dotted path from the root, or the input's name.
    value: the real tensor where it is known at capture time (always for parameters and buffers).
    """

    kind: str
    path: str
    value: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class CaptureInfo:
    """How a graph was captured; in `gm.meta["capture"]`.

    door: "export", "strict-export", "dynamo" or "given". dynamic: input name -> axes that stayed symbolic.
    specialised: input name -> axes that were offered as dynamic but the model fixed.
    notes: the attempts that failed before this one.
    """

    door: str
    dynamic: Mapping[str, tuple[int, ...]]
    specialised: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()


def in_dialect(gm: GraphModule) -> bool:
    """Whether `gm` already consists of nodes of the dialect."""
    return all(_node_in_dialect(node) for node in gm.graph.nodes)


def _node_in_dialect(node: Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    if isinstance(node.target, OpOverload | HigherOrderOperator) or is_region(node):
        return True
    # Arithmetic on sizes is Python's own; the same function on tensors is not yet ATen.
    size = int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool
    return "val" in node.meta and (node.target is operator.getitem or isinstance(node.meta["val"], size))


def is_region(node: Node) -> bool:
    """Whether `node` opens or closes a region: grad mode, autocast, vmap. It must stay, though unused."""
    regions = ("torch.amp.autocast_mode", "torch._functorch.predispatch")
    return node.target is torch._C._set_grad_enabled or getattr(node.target, "__module__", None) in regions


def module_path(node: Node) -> tuple[tuple[str, str], ...]:
    """The modules whose forward `node` was recorded in, outermost first, as `(dotted path, class name)`.

    The first entry is always the root, path "" (class "" where the tracer did not record it), so that
    `module_path(node)[-1][0]` is the path of the innermost module. Reads the three formats in use: fx
    (`layers.0`, a class), export (`layers.0`, a class as text) and dynamo (`L['self'].layers.0`, a class).
    """
    entries: list[tuple[str, str]] = [("", "")]
    for path, kind in _stack(node):
        if path == "":
            entries[0] = ("", kind.rsplit(".", 1)[-1])
        elif path != entries[-1][0]:
            entries.append((path, kind.rsplit(".", 1)[-1]))
    return tuple(entries)


def source_line(node: Node) -> str:
    """The line of model code that made `node`, as `file.py:123`; "" when the tracer kept no trace.

    That is the innermost line in the file which defines the innermost module, so that a shared helper such as
    transformers' `sdpa_attention_forward` does not hide the model. Lines inside torch itself never count.
    """
    torch_root = PurePath(torch.__file__).parent
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    frames = [(PurePath(f), n) for f, n in reversed(found) if not PurePath(f).is_relative_to(torch_root)]
    if not frames:
        return ""
    for _, kind in reversed(_stack(node)):
        module = kind.split(".")[:-1]
        home = (*module[:-1], f"{module[-1]}.py") if module else ()
        for file, number in frames:
            if home and file.parts[-len(home) :] == home:
                return f"{file.name}:{number}"
    return f"{frames[0][0].name}:{frames[0][1]}"


def _stack(node: Node) -> list[tuple[str, str]]:
    """`nn_module_stack` as (dotted path, full class name), whichever tracer wrote it."""
    entries = []
    for value in (node.meta.get("nn_module_stack") or {}).values():
        text, kind = value if isinstance(value, tuple) else (str(value), "")
        path = dynamo_path(text)[1].split("@")[0]
        entries.append(
            (path, f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind))
        )
    return entries


def dynamo_path(text: str, keep_root: bool = False) -> tuple[str, str]:
    """Dynamo's expression for an object as (root variable, dotted path).

    `L['self']._modules['a'].b` -> ("self", "a.b"). Any other text is returned as it is, with root "".
    """
    match = re.match(r"[LG]\['([^']+)'\](.*)", text, re.DOTALL)
    if not match:
        return "", text
    root, rest = match.groups()
    plumbing = ("_modules", "_parameters", "_buffers", "__dict__", "__closure__", "cell_contents")
    parts = [a or b for a, b in re.findall(r"\['?([^'\]]+)'?\]|\.(\w+)", rest)]
    parts = [part for part in parts if part not in plumbing]
    return root, ".".join([root, *parts] if keep_root else parts)


def plain_stack(stack: Mapping[str, Any], keep_root: bool = False) -> dict[str, tuple[str, Any]]:
    """`nn_module_stack` in one format: plain dotted paths, with `@n` behind the path of a module's n-th call.

    Export and dynamo count repeated calls in the key only.
    """
    plain = {}
    for key, (text, kind) in stack.items():
        call = re.search(r"@\d+$", key)
        path = dynamo_path(text, keep_root)[1].split("@")[0]
        plain[key] = (path + (call.group() if call and path else ""), kind)
    return plain


def leaf_of_attribute(name: str, value: Tensor) -> Leaf:
    return Leaf("parameter" if isinstance(value, nn.Parameter) else "buffer", name, value)


def symbolic_axes(gm: GraphModule) -> dict[str, tuple[int, ...]]:
    """Input name -> axes whose size is a symbol."""
    found: dict[str, tuple[int, ...]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            sizes = list(enumerate(value.shape))
            axes = tuple(i for i, s in sizes if isinstance(s, torch.SymInt) and s.node.maybe_as_int() is None)
            if axes:
                found[str(node.target)] = axes
    return found


def first_line(error: BaseException) -> str:
    """An exception as one line, for messages that list several."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Switch off the fused inference path of torch's own attention and encoder modules, and restore it.

    The fused op hides the attention inside one opaque call; the ordinary path is the same mathematics.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
