"""Compiling the library and, for a file's nodes, its kernels: neither needs a GPU nor the CUDA toolkit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ....errors import LibraryError, MissingExtraError
from ..build import compile_with, find_compiler, find_headers
from . import kinds as known
from .kinds import ACTIVATIONS, Built, Kind

ARCHITECTURES = (80, 90, 100)
"""A100 and, with the same code, GeForce 30 and 40, L4 and L40; H100 and H200; B200."""

_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-g0", "-fvisibility=hidden", "-shared", "-s")
_TYPES = {"float": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build_cuda_library(
    file: str | os.PathLike[str],
    include: Path | None = None,
    *,
    architectures: Sequence[int] | None = None,
    compiler: str | None = None,
) -> Path:
    """Compile the library for onnxruntime's CUDA provider with the kernels that `file` needs; where it is.

    Kernels that were built for other files stay. architectures: compute capabilities, 90 for 9.0,
    ARCHITECTURES unless given. include, compiler: as for `build_library`. Raises LibraryError.

    Never run on a GPU: `cuda/__init__.py` says what is known.
    """
    kinds = known.kinds_of(file)
    if isinstance(kinds, str):
        raise LibraryError(kinds)
    headers, found = find_headers(include), find_compiler(compiler)
    try:
        from ....kernels.triton import rolling
    except ImportError as error:
        raise MissingExtraError(
            "kernels for CUDA are compiled by triton: pip install 'linearize[triton]'"
        ) from error
    try:
        known.BUILT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=known.BUILT, prefix=".build-") as folder:
            defined = (f'-DSOURCES="{known.sources()}"', *map(_define, ("SHORT", "LONG"), rolling.BLOCKS))
            source = str(Path(__file__).with_name("op.cpp"))
            made = f"{folder}/library"
            compile_with(found, *_FLAGS, *defined, "-isystem", str(headers), source, "-o", made)
            built = {(entry.kind, entry.block, entry.arch): entry for entry in known.read_index()}
            for kind in sorted(kinds):
                for arch in architectures or ARCHITECTURES:
                    for block in rolling.BLOCKS:
                        if (kind, block, arch) not in built:
                            built[kind, block, arch] = _kernel(kind, block, arch)
            known.index().unlink(missing_ok=True)  # until all is in its place there is nothing to be had
            os.replace(made, known.library())
            known.write_index(list(built.values()))
    except OSError as error:
        raise LibraryError(f"cannot write to {known.BUILT}: {error}") from error
    return known.library()


def _define(name: str, block: int) -> str:
    return f"-D{name}_BLOCK={block}"


def _kernel(kind: Kind, block: int, arch: int) -> Built:
    """Compile one and write it beside the library."""
    from ....kernels.triton import ahead, rolling

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    dtype = _TYPES[kind.type]
    launch, _ = rolling.prepare(
        meta(1, 1, block, kind.dim, dtype=dtype),
        meta(1, 1, block, kind.dim, dtype=dtype),
        meta(1, 1, block, kind.value_dim, dtype=dtype),
        meta(1, block, dtype=torch.bool),
        meta(1, 1, kind.dim, kind.value_dim),
        meta(1, 1, 1, kind.dim + kind.value_dim, dtype=dtype),
        meta(1, dtype=torch.int64),
        meta(1),
        meta(1),
        meta(1, 1),
        ACTIVATIONS[kind.family],
        1,
        bool(kind.normalize),
    )
    try:
        code = ahead.compile_launch(launch, arch, rolling.ALIGNED)
    except Exception as error:  # triton's, ptxas's and LLVM's errors share no base
        raise LibraryError(f"triton cannot compile {kind} for sm_{arch}: {error}") from error
    name = f"{kind.family}-{kind.type}-{kind.dim}-{kind.value_dim}-{kind.normalize}-{block}-sm_{arch}.cubin"
    (known.BUILT / name).write_bytes(code.cubin)
    columns = launch.constants["BV"]
    return Built(kind, block, arch, columns, launch.warps, code.shared, name)
