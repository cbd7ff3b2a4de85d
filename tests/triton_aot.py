"""Compile Triton launches ahead of time for GPUs that are not there, and read what the compiler made of them.

triton brings ptxas, cuobjdump, nvdisasm and its AMD back end along, so this needs no driver. Registers and
spills are read from the machine code: triton itself reports them only when it can load the kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from linearize.kernels.triton.launch import Launch, Target
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Processors as on A100, H100/H200, B200 and MI300X: splits are chosen by them.
TARGETS = {
    "sm_80": Target("cuda", 80, 108),
    "sm_90": Target("cuda", 90, 132),
    "sm_100": Target("cuda", 100, 148),
    "gfx942": Target("hip", 0x942, 304),
}

# What a matrix product compiles to. sm_90 and up have older, slower forms too, so the name matters.
_MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC[A-Z]*MMA", "gfx942": "v_mfma"}
# Bytes of shared memory that one program can have. What wants more compiles, to nothing.
_SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Built:
    """What the compiler made of one launch."""

    kernel: str
    target: str
    registers: int
    stack: int
    """Bytes of stack (CUDA), where arrays and spilled registers live."""
    spills: int
    """Spill loads and stores in the code (CUDA), spilled vector registers (AMD)."""
    shared: int
    matrix: int
    """Matrix instructions of the target's own kind."""

    def faults(self, launch: Launch, stack: int = 64) -> list[str]:
        """Why this must not ship; empty when it may. stack: the bytes of it that are let pass."""
        found = []
        if self.stack > stack:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > _SHARED[self.target]:
            found.append(f"{self.shared} bytes of shared memory")
        if self.target == "gfx942" and self.spills:
            found.append(f"{self.spills} spilled registers")
        if launch.matrix and not self.matrix:
            found.append(f"no {_MATRIX[self.target]}")
        return [f"{self.kernel} on {self.target}: {fault}" for fault in found]

    def __str__(self) -> str:
        return (
            f"{self.target:7} {self.kernel:24} {self.registers:4} registers {self.stack:5} B stack "
            f"{self.spills:4} spills {self.shared:7} B shared {self.matrix:4} matrix instructions"
        )


def identity(launch: Launch) -> str:
    """Equal for launches that compile to the same code."""
    source = _source(launch)
    return (
        f"{source.name} {source.signature} {source.constants} {source.attrs} {launch.warps} {launch.stages}"
    )


def build(launch: Launch, target: str) -> Built:
    """Compile `launch` (made from meta tensors) for a name in TARGETS."""
    backend, arch, _ = TARGETS[target]
    gpu = GPUTarget("cuda", arch, 32) if backend == "cuda" else GPUTarget("hip", f"gfx{arch:x}", 64)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    compiled = triton.compile(_source(launch), target=gpu, options=options)
    name = launch.kernel.__name__
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        spills = _number(r"\.vgpr_spill_count:\s*(\d+)", text)
        matrix = len(re.findall(_MATRIX[target], text))
        return Built(name, target, registers, 0, spills, compiled.metadata.shared, matrix)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(file))
        code = _tool("nvdisasm", "-c", str(file))
    return Built(
        name,
        target,
        _number(r"REG:(\d+)", usage),
        _number(r"STACK:(\d+)", usage),
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        compiled.metadata.shared,
        len(re.findall(rf"\b{_MATRIX[target]}\b", code)),
    )


def _source(launch: Launch) -> ASTSource:
    """The signature triton's own launcher would derive: pointers aligned, numbers specialised by value."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    given = {**launch.arguments, **launch.constants}
    names = [param.name for param in launch.kernel.params]
    assert set(given) == set(names), f"{launch.kernel.__name__}: {sorted(set(given) ^ set(names))}"
    for place, param in enumerate(launch.kernel.params):
        value = given[param.name]
        aligned = False
        if param.name in launch.constants or value is None:
            kind = "constexpr"
        elif isinstance(value, torch.Tensor):
            kind, aligned = f"*{_TYPES[value.dtype]}", True
        elif hasattr(value, "block_shape"):
            kind = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            kind = "fp32"
        elif value == 1 and not param.do_not_specialize:
            kind = "constexpr"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not param.do_not_specialize
        signature[param.name] = kind
        if kind == "constexpr":
            constants[param.name] = value
        elif aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} not in {text[:500]}"
    return int(found.group(1))


def _tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True).stdout
