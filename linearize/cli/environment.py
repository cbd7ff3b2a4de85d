"""`linearize env`: what matters of this machine for a bug report, and which kernels run on it, or why not."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table
from rich.text import Text

from .terminal import console

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "triton",
    "peft",
    "accelerate",
    "onnx",
    "onnxruntime",
    "gguf",
    "lm-eval",
    "vllm",
)


def env() -> None:
    """Print versions, the processor, and which kernels are built, with the reason where one is not."""
    from ..common.version import __version__

    table = Table(show_header=False, box=None)
    for name, value in [("linearize", __version__), *_machine(), *_packages(), *_kernels()]:
        table.add_row(name, Text(value))
    console(120).print(table)


def _machine() -> list[tuple[str, str]]:
    import torch

    here = str(Path(__file__).resolve().parent.parent)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    rows = [
        ("installed in", here),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("processor", f"{_processor()}, torch uses {torch.backends.cpu.get_cpu_capability()}"),
        ("threads of torch", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ("memory", f"{memory / 1e9:.1f} GB"),
    ]
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        rows += [("GPU", f"{x.name}, {x.major}.{x.minor}, {x.total_memory / 1e9:.0f} GB") for x in devices]
    elif torch.accelerator.is_available():
        rows.append(("accelerator", str(torch.accelerator.current_accelerator())))
    else:
        rows.append(("GPU", "none that torch sees"))
    return rows


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _packages() -> list[tuple[str, str]]:
    rows = []
    for name in PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _kernels() -> list[tuple[str, str]]:
    import torch

    from ..kernels import dispatch

    rows = [("torch form", "runs everywhere")]
    for form, device in (("cpu", "cpu"), ("triton", "cuda")):
        found = dispatch.load(form)
        missing = found if isinstance(found, str) else None
        if missing is None and device == "cuda" and not torch.cuda.is_available():
            missing = "torch sees no GPU"
        elif not isinstance(found, str):
            missing = found.unavailable_reason(torch.device(device))
        isa = f", {found.isa()}" if missing is None and form == "cpu" and not isinstance(found, str) else ""
        rows.append((f"{form} form", f"runs{isa}" if missing is None else f"does not run: {missing}"))
    return [*rows, ("operators of onnxruntime", _library())]


def _library() -> str:
    try:
        from ..onnx.library.loader import unavailable_reason
    except ImportError as error:
        return f"not there: {error}"
    reason = unavailable_reason()
    return "run" if reason is None else f"not there: {reason}"
