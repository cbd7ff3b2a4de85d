"""Every entry of the C++ library under sanitizers of memory and undefined behaviour; a planted fault."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels" / "cpu"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-fPIC",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]


def library(folder: Path, edit: tuple[str, str] | None = None) -> None:
    """A package that holds the kernels, with a library that watches itself. edit: a text of the sources, and
    its replacement."""
    package, folder = folder, folder / "cpu"
    folder.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    for file in SOURCES.parent.glob("*.py"):
        shutil.copy(file, package)
    for file in SOURCES.iterdir():
        if file.suffix in (".cpp", ".h", ".py"):
            text = file.read_text()
            (folder / file.name).write_text(text if edit is None else text.replace(*edit))
    objects = []
    for name, flags in (("avx2", AVX2), ("avx512", AVX512), ("entry", [])):
        objects.append(str(folder / f"{name}.o"))
        subprocess.run(
            ["g++", *FLAGS, *flags, "-c", str(folder / f"{name}.cpp"), "-o", objects[-1]], check=True
        )
    shared = ["-shared", "-pthread", "-o", str(folder / "_kernels.so")]
    subprocess.run(["g++", *FLAGS, *objects, *shared], check=True)


def run(folder: Path, count: int) -> subprocess.CompletedProcess[str]:
    asan = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    # Python itself leaks; and whoever preloads the sanitizer knows where it comes from.
    options = "detect_leaks=0:verify_asan_link_order=0:abort_on_error=0"
    environment = {
        **os.environ,
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "halt_on_error=1",
    }
    worker = Path(__file__).with_name("sanitized_calls.py")
    return subprocess.run(
        [sys.executable, str(worker), str(folder), str(count)],
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="no torch")
@pytest.mark.timeout(1500)
def test_no_call_reads_or_writes_what_is_not_its_own(tmp_path: Path) -> None:
    library(tmp_path / "as_is")
    done = run(tmp_path / "as_is", 150)
    assert done.returncode == 0 and "150 rounds" in done.stdout, done.stderr[-3000:]
    # The same calls find a scratch that is too small by a cache line or two.
    library(tmp_path / "broken", ("size_t bytes = (floats * sizeof(float) + 127) / 64 * 64;",
                                  "size_t bytes = (floats * sizeof(float)) / 128 * 64;"))  # fmt: skip
    found = run(tmp_path / "broken", 150)
    assert found.returncode != 0 and "heap-buffer-overflow" in found.stderr
