"""Compiling the library, where onnxruntime's C++ headers are to be had; no wheel of onnxruntime has them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ...errors import LibraryError
from .paths import KERNELS, LIBRARY, sources

HEADER = "onnxruntime_cxx_api.h"
_FOLDER = Path(__file__).parent
_PLACES = (Path(sys.prefix), Path("/usr"), Path("/usr/local"), Path("/opt/onnxruntime"))
_FOLDERS = ("", "include", "include/onnxruntime", "include/onnxruntime/core/session", "onnxruntime")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-g0", "-fvisibility=hidden")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")
_KERNELS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-c", "rolling.cpp")


def find_headers(include: Path | None = None) -> Path:
    """The folder that holds onnxruntime's C++ headers: `include` or one below it, else the usual places.

    Raises LibraryError, which says where headers are to be had.
    """
    for place in _PLACES if include is None else (include,):
        for folder in _FOLDERS:
            if (place / folder / HEADER).is_file():
                return (place / folder).absolute()  # the compiler runs in another folder
    where = "in the usual places" if include is None else f"in {include}"
    raise LibraryError(
        f"onnxruntime's C++ headers are not {where} ({HEADER} is missing): install Debian's "
        "libonnxruntime-dev, or unpack the archive of a release of onnxruntime on GitHub, and give the "
        "folder with --include"
    )


def find_compiler(given: str | None = None) -> str:
    """`given`, or the C++ compiler that is here. Raises LibraryError when there is none."""
    found = given or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if found is None:
        raise LibraryError("no C++ compiler was found; install g++ or clang++")
    return found


def build_library(include: Path | None = None, *, compiler: str | None = None) -> Path:
    """Compile the library for this machine's family of processors, in seconds, and return where it is.

    include: where onnxruntime's headers are, 1.21 or newer and not newer than the onnxruntime in use.
    compiler: a C++17 compiler; c++, g++ or clang++ unless given. Raises LibraryError, leaving a library that
    was there before as it was.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise LibraryError(f"the library is for Linux on x86-64, not {sys.platform} on {platform.machine()}")
    headers = find_headers(include)
    found = find_compiler(compiler)
    if not os.access(LIBRARY.parent, os.W_OK):
        raise LibraryError(f"{LIBRARY.parent} is not writable, and the library belongs there")
    shared = (*_FLAGS, f"-I{KERNELS}")
    with tempfile.TemporaryDirectory(dir=LIBRARY.parent, prefix=".build-") as folder:
        parts = {
            # First: wrong headers show here, and the kernels take longer.
            "op.o": (f'-DSOURCES="{sources()}"', "-isystem", str(headers), "-c", "op.cpp"),
            "avx2.o": (*_AVX2, "-DKERNELS=avx2_rolling", *_KERNELS),
            "avx512.o": (*_AVX512, "-DKERNELS=avx512_rolling", *_KERNELS),
        }
        for name, flags in parts.items():
            compile_with(found, *shared, *flags, "-o", f"{folder}/{name}")
        compile_with(
            found, "-shared", "-s", *(f"{folder}/{name}" for name in parts), "-o", f"{folder}/library"
        )
        os.replace(f"{folder}/library", LIBRARY)
    return LIBRARY


def compile_with(*command: str) -> None:
    """Run a compiler in this folder; LibraryError with what it said when it fails."""
    try:
        done = subprocess.run(command, cwd=_FOLDER, capture_output=True, text=True)
    except OSError as error:
        raise LibraryError(f"the compiler {command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise LibraryError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")
