"""The C++ kernels of `kernels/cpu`: a shared library with a plain C interface, optional.

Everything else about the package is in pyproject.toml. Without a compiler, or on another family of
processors, the installation succeeds without the library, and linearize computes in PyTorch.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path("kernels", "cpu")
NAME = "linearize.kernels.cpu._kernels"
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fvisibility=hidden", "-g0"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# One library for all machines: each file has its instruction set, and entry.cpp chooses at run time.
FLAGS_OF = {
    "avx2.cpp": AVX2,
    "avx512.cpp": [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"],
    "entry.cpp": [],
}


class BuildKernels(build_ext):
    """Flags per source file, and a file name without a Python version: the library knows no Python."""

    def build_extension(self, ext: Extension) -> None:
        objects = []
        for source in ext.sources:
            flags = [*FLAGS, *FLAGS_OF[Path(source).name]]
            objects += self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=flags, depends=ext.depends
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), extra_postargs=["-pthread"], target_lang="c++")

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class AnyPython(bdist_wheel):
    """The wheel depends on the platform, not on the Python that built it."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def extensions() -> list[Extension]:
    if sys.platform == "win32" or platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    sources = [str(FOLDER / name) for name in FLAGS_OF]
    headers = [str(path) for path in sorted(FOLDER.glob("*.h"))]
    return [Extension(NAME, sources, depends=headers, optional=True)]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython})
