"""A traced program as an ONNX file: bodies of its nodes, names of its axes, written whole or not at all."""

from __future__ import annotations

import logging
import re
import secrets
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.rewriter import pattern

from ..common import files
from ..common.checks import excerpt
from ..common.replacing import is_inside, is_plain
from ..common.version import __version__
from ..errors import ExportError, LinearizeError
from ..passes.tracing import TRACING
from . import body, folder
from .programs import LENGTH, PAST, TOTAL, Program
from .schema import DOMAIN, OPERATORS, VERSION

OPSETS = range(18, 27)
"""ONNX opsets that hold the bodies and that onnxruntime 1.31 accepts."""
_IR_VERSION = 10
"""The newest that every onnxruntime since 1.20 reads."""
_LIMIT = 2**31 - 2**20
"""Bytes of a protobuf file, with a margin for the graph itself."""
_QUOTIENTS = pattern.RewriteRuleSet(
    [pattern.RewriteRule(lambda op, x, y: op.Mul(x, op.Reciprocal(y)), lambda op, x, y: op.Div(x, y))],
    commute=True,
)
"""Of an RMS norm, whose rsqrt becomes a reciprocal; onnxruntime makes one kernel of a norm that divides."""


def model_of(program: Program, opset: int) -> ir.Model:
    """The ONNX model. Raises ExportError when an operator has no ONNX form, or an axis became a constant."""
    try:
        with TRACING, _quiet():
            exported = torch.onnx.export(
                program.exported, (), dynamo=True, opset_version=opset, verbose=False, external_data=False
            )
    except Exception as error:
        # The exporter's own errors wrap whatever an operator raised.
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportError(f"the graph has no ONNX form: {first}") from error
    assert exported is not None
    model: ir.Model = exported.model
    _QUOTIENTS.apply_to_model(model)
    for names, values in ((program.inputs, model.graph.inputs), (program.outputs, model.graph.outputs)):
        _rename(model, names, values)
    _name_axes(model, program)
    used = nodes_of(model)
    for name in used:
        function = body.function(name, model.opset_imports[""], _sizes(model, name))
        model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = VERSION
    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version = "linearize", __version__
    return model


def nodes_of(model: ir.Model) -> Counter[str]:
    """How many nodes of our domain the model has, by operator."""
    return Counter(node.op_type for node in model.graph if node.domain == DOMAIN)


def _sizes(model: ir.Model, name: str) -> body.Sizes | None:
    """Those of all nodes of an operator; None where they differ, or are not known."""
    nodes: Any = (node for node in model.graph if node.domain == DOMAIN and node.op_type == name)
    found = set()
    for node in nodes:
        inputs = zip((given for given, _ in OPERATORS[name].inputs), node.inputs, strict=True)
        shapes = {given: value.shape for given, value in inputs}
        query, key, value = (shapes[given] for given in ("query", "key", "value"))
        taps = shapes["conv_weight"][1] if "conv_weight" in shapes else 0
        found.add(body.Sizes(query[1], key[1], key[3], value[3], taps))
    sizes = found.pop()
    return None if found or not all(isinstance(size, int) for size in sizes) else sizes


def _rename(model: ir.Model, names: list[str], values: Any) -> None:
    """Give the graph's inputs or outputs their names; a value in the way gives up its own."""
    if len(names) != len(values):
        raise ExportError(f"the graph has {len(values)} inputs or outputs where {len(names)} were expected")
    for value in values:
        value.name = f"{value.name}__"
    taken = {name: value for name, value in model.graph.initializers.items() if name in names}
    for name, value in taken.items():
        value.name = f"{name}__"
    for value, name in zip(values, names, strict=True):
        value.name = name


def _name_axes(model: ir.Model, program: Program) -> None:
    """Names for the axes of inputs that must be free, and so of outputs. Raises ExportError for one that is
    not: a number, or tied to a number (code that reads a size as an int does that without a word)."""
    known: dict[str, str] = {}
    inputs: Any = model.graph.inputs
    for value in inputs:
        for axis, name in program.axes[value.name].items():
            size = value.shape[axis]
            symbols = str(size if isinstance(size, int) else size.value).split(" + ")
            if not all(symbol.isidentifier() for symbol in symbols):
                one = symbols == ["1"]
                why = "give example inputs of at least 2 there" if one else "the model's code fixes it"
                raise ExportError(f"axis {axis} of {value.name} would be {size} for ever: {why}")
            if len(symbols) == 1:
                known.setdefault(symbols[0], name)
            value.shape[axis] = name
    for value in (*inputs, *model.graph.outputs):
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:
                text = re.sub(r"\b[a-z]+\d+\b", lambda m: known.get(m[0], m[0]), size.value)
                value.shape[axis] = TOTAL if set(text.split(" + ")) == {PAST, LENGTH} else text


def write(model: ir.Model, path: Path, external_data: bool | None) -> list[Path]:
    """Write and check `path`, and `path` + ".data" beside it for weights that a protobuf file cannot hold.

    external_data: None decides by size. Returns the files. Raises ExportError.
    """
    files = save(model, path, external_data)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the graph is not valid ONNX: {str(error).splitlines()[0]}") from error
    return files


def save(model: ir.Model, path: Path, external_data: bool | None) -> list[Path]:
    """As `write`, unchecked."""
    if external_data is None:
        external_data = sum(tensor.nbytes for tensor in _weights(model)) > _LIMIT
    data = f"{path.name}.data" if external_data else None
    # A temporary folder lies beside the old file, which reads its weights until the new one is in its place.
    if data and (path.parent.parent / data).exists():
        data = f"{path.stem}.{secrets.token_hex(4)}.onnx.data"
    ir.save(model, path, external_data=data)
    return [path, *([path.parent / data] if data else [])]


def _weights(model: ir.Model) -> Iterator[Any]:
    return (value.const_value for value in model.graph.initializers.values() if value.const_value is not None)


@contextmanager
def staged(target: Path, names_target: bool) -> Iterator[Path]:
    """A folder beside `target` to write in; its files move to `target` at the end, or into its parent.

    names_target: the files bear their final names, in the parent of `target`. Raises ExportError when
    something cannot be written; then nothing is left, and what was there before stays.
    """
    home = target.parent if names_target else target
    try:
        parent = home if names_target else home.parent
        if not parent.is_dir():
            raise ExportError(f"cannot write {target}: there is no folder {parent}")
        folder.finish_killed(home)
        # A file of weights first: a graph without its weights would be half a model.
        old: set[str] = set()
        commit = None if names_target else lambda scratch, place: folder.commit(scratch, place, old)
        with files.staged(home, last=lambda file: file.suffix == ".onnx", commit=commit) as temporary:
            yield temporary
            new = {file.name for file in temporary.iterdir()}
            old |= {name for graph in new for name in _data_of(home / graph)} - new
        for name in old if names_target else ():
            (home / name).unlink(missing_ok=True)
    except (OSError, ValueError, UnicodeError, MemoryError) as error:
        if isinstance(error, LinearizeError):
            raise
        raise ExportError(f"cannot write {files.shown(target)}: {files.reason(error)}") from error


def check_name(path: Path) -> None:
    """Raise ExportError for a name in bytes that are no UTF-8: the onnx package takes none."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ExportError(f"cannot write {files.shown(path)}: the name must be UTF-8") from error


def read_graph(path: Path) -> onnx.ModelProto:
    """A file without the weights beside it. Raises ExportError where it is none, or names other folders."""
    try:
        model = onnx.load(path, load_external_data=False)
    # Whatever protobuf says of a file that is none.
    except Exception as error:
        raise ExportError(f"{files.shown(path)} cannot be read: {files.reason(error)}") from error
    for name in sorted(_locations(model)):
        if not is_inside(name):
            raise ExportError(f"{files.shown(path)} names weights outside its folder: {excerpt(name)}")
    return model


def _locations(model: onnx.ModelProto) -> set[str]:
    tensors = [*model.graph.initializer]
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while nodes:
        for attribute in nodes.pop().attribute:
            tensors += [attribute.t, *attribute.tensors]
            for graph in (attribute.g, *attribute.graphs):
                tensors += graph.initializer
                nodes += graph.node
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def _data_of(graph: Path) -> set[str]:
    """The files beside a graph that hold its weights; none where it is no graph."""
    if graph.suffix != ".onnx" or not any(graph.parent.glob("*.onnx.data")):
        return set()
    try:
        return {name for name in _locations(read_graph(graph)) if is_plain(name, ".onnx.data")}
    except ExportError:
        return set()


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx says of a missing torchvision, and of itself, what no user can act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
