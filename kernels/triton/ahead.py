# mypy: allow-untyped-defs
"""A launch compiled ahead of time, for a GPU that need not be there, to be launched by CUDA's driver."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

import torch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch

_CODES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Code(NamedTuple):
    cubin: bytes
    name: str
    """Of the function in it: cuModuleGetFunction."""
    shared: int
    """Bytes of dynamic shared memory."""


def compile_launch(launch: Launch, arch: int, aligned: Collection[str]) -> Code:
    """The code of a launch for compute capability `arch` (90 for 9.0).

    Its arguments are the launch's tensors and numbers in the kernel's order, pointers and 32-bit integers,
    then two null pointers. aligned: names of the tensors that begin at multiples of 16 bytes. Numbers are not
    specialised: the code serves any. Raises RuntimeError when triton wants other arguments than these.
    """
    signature, attributes = {}, {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constants:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name] = _CODES[value.dtype]
            if name in aligned:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    source = ASTSource(launch.kernel, signature, launch.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    name, metadata = compiled.metadata.name, compiled.metadata
    entry = re.search(rf"\.entry {name}\((.*?)\n\)", compiled.asm["ptx"], re.DOTALL)
    count = 0 if entry is None else len(re.findall(r"\.param \.", entry.group(1)))
    wanted = sum(code != "constexpr" for code in signature.values()) + 2
    scratch = metadata.global_scratch_size or metadata.profile_scratch_size
    if count != wanted or scratch or metadata.num_ctas != 1:
        raise RuntimeError(f"triton {triton.__version__} passes {count} arguments to {name}, not {wanted}")
    return Code(compiled.asm["cubin"], name, metadata.shared)
