"""What a node asks of a kernel, which of them a file asks for, and which were built."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import onnx

from ....errors import LibraryError
from ....kernels import cpu
from ...schema import DOMAIN, FAMILIES, VERSION

BUILT = Path(__file__).with_name("built")
"""Where the library, its kernels and the index of them lie."""

_KERNELS = Path(cpu.__file__).parent.parent / "triton"
SOURCES = (
    Path(__file__).with_name("op.cpp"),
    Path(__file__).parent.with_name("operator.h"),
    *(_KERNELS / f"{name}.py" for name in ("rolling", "normalize", "launch")),
)
"""What the library and its kernels are compiled from."""
_TYPES = {
    onnx.TensorProto.FLOAT: "float",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}
ACTIVATIONS = {FAMILIES[activation]: activation for activation in ("relu2", "linear")}


class Kind(NamedTuple):
    """A node's operator, type T, D, Dv and `normalize`: a kernel serves any other sizes."""

    family: str
    type: str
    dim: int
    value_dim: int
    normalize: int

    def __str__(self) -> str:
        unit = "" if self.normalize else ", not normalised"
        return f"{self.family} in {self.type} with {self.dim} and {self.value_dim} features{unit}"


class Built(NamedTuple):
    """A line of the index: a compiled kernel, and how it is launched."""

    kind: Kind
    block: int
    arch: int
    columns: int
    warps: int
    shared: int
    file: str

    def line(self) -> str:
        return " ".join(map(str, (*self.kind, *self[1:])))

    @classmethod
    def of(cls, line: str) -> Built:
        family, kind, *sizes, file = line.split()
        dim, value_dim, normalize, block, arch, columns, warps, shared = map(int, sizes)
        return cls(Kind(family, kind, dim, value_dim, normalize), block, arch, columns, warps, shared, file)

    def runs_on(self, arch: int) -> bool:
        """Code for 8.0 runs on 8.6 and 8.9 too; later code is for its own processors alone."""
        return self.arch == arch or (self.arch // 10 == arch // 10 == 8 and self.arch < arch)


def kinds_of(path: str | PathLike[str]) -> set[Kind] | str:
    """The kinds of the file's nodes; one sentence instead when a node is not to be claimed.

    Raises LibraryError when the file cannot be read.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own errors share no base with the system's
        raise LibraryError(f"{path} is not a readable ONNX file: {error}") from error
    versions = [entry.version for entry in model.opset_import if entry.domain == DOMAIN]
    inside = [node for function in model.functions for node in function.node if _claimed(node)]
    nested = [node for node in _nested(model.graph) if _claimed(node)]
    nodes = [node for node in model.graph.node if _claimed(node)]
    if inside or nested:
        return f"{path} has nodes inside functions or branches, where their sizes are not known"
    if not nodes or versions != [VERSION]:
        return f"{path} has no node that the library runs"
    types = {value.name: value.type.tensor_type for value in (*model.graph.input, *model.graph.value_info)}
    found = set()
    for node in nodes:
        tokens, past = types.get(node.input[0]), types.get(node.input[4])
        sizes = [] if past is None else [size.dim_value for size in past.shape.dim]
        if tokens is None or len(sizes) != 4 or min(sizes[2:]) < 1:
            return f"{path} does not tell the type and sizes of node {node.name}"
        if tokens.elem_type not in _TYPES:
            name = onnx.TensorProto.DataType.Name(tokens.elem_type).lower()
            return f"the library has no kernel for query in {name}"
        normalize = next(entry.i for entry in node.attribute if entry.name == "normalize")
        found.add(Kind(node.op_type, _TYPES[tokens.elem_type], sizes[2], sizes[3], normalize))
    return found


def _claimed(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in ACTIVATIONS


def _nested(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Nodes of the graph's branches and loops."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from attribute.g.node
                yield from _nested(attribute.g)


def library() -> Path:
    return BUILT / "_operators.so"


def index() -> Path:
    return BUILT / "index.txt"


def read_index() -> list[Built]:
    """The kernels that were built from the sources that are here."""
    lines = index().read_text().splitlines() if index().is_file() else [""]
    entries = [Built.of(line) for line in lines[1:]] if lines[0] == sources() else []
    return [entry for entry in entries if (BUILT / entry.file).is_file()]


def write_index(built: Sequence[Built]) -> None:
    index().write_text("\n".join([sources(), *(entry.line() for entry in built)]) + "\n")


@cache
def sources() -> str:
    """A digest of SOURCES."""
    digest = hashlib.sha256()
    for path in SOURCES:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
