"""The import layout: three folders, one package, and no way to step on the PyPI package `kernels`."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import entry_points, requires, version
from pathlib import Path
from types import ModuleType

import pytest
from linearize.kernels import cpu

import linearize
import linearize.onnx

pytestmark = pytest.mark.xdist_group("wheel")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("linearize", "passes", "kernels")


def python(code: str, cwd: Path, path: Path | None = None) -> str:
    """Run `code` in a new interpreter started in `cwd`, with `path` on PYTHONPATH; its standard output."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources() -> list[Path]:
    return [
        path
        for path in ROOT.rglob("*.py")
        if not {".venv", ".venv-serving", "build"} & set(path.relative_to(ROOT).parts)
    ]


def test_every_folder_with_code_is_a_listed_package() -> None:
    found = set()
    for top in FOLDERS:
        for path in (ROOT / top).rglob("*.py"):
            parts = path.parent.relative_to(ROOT).parts
            found.add(".".join(parts if top == "linearize" else ("linearize", *parts)))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_kernels_is_no_regular_package_at_the_top() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_nothing_imports_our_folders_by_their_top_level_names() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & {"kernels", "passes"}, f"{path}:{node.lineno}"


def imports_point_one_way(top: str, allowed: set[str]) -> None:
    for path in (ROOT / top).rglob("*.py"):
        depth = len(path.relative_to(ROOT / top).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots = {(node.module or "").split(".")[0]}
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= depth, f"{path}:{node.lineno} reaches outside {top}/"
                continue
            else:
                continue
            extra = roots - allowed - set(sys.stdlib_module_names)
            assert not extra, f"{path}:{node.lineno} imports {extra}"


def test_passes_know_graphs_only_and_kernels_know_tensors_only() -> None:
    imports_point_one_way("passes", {"torch", "sympy"})
    imports_point_one_way("kernels", {"torch", "triton"})


def test_nothing_inside_the_package_uses_a_public_name_that_is_loaded_on_first_use() -> None:
    """Import-linter would not see where such an import leads; within a package that does not matter."""
    lazy = {"linearize": linearize.__all__, "linearize.onnx": linearize.onnx.__all__}
    for path in (ROOT / "linearize").rglob("*.py"):
        package = path.relative_to(ROOT).parent.parts
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*base, *filter(None, [node.module])])
            if source == ".".join(package):
                continue
            names = {alias.name for alias in node.names} & set(lazy.get(source, ()))
            files = {name for name in names if importlib.util.find_spec(f"{source}.{name}")}
            assert names == files, f"{path}:{node.lineno} imports {names - files} from {source}"


NAMES_OF_0_1_0 = """
    AttentionModule Backend DraftModel Evaluation LinearizeConfig LinearizeError Medusa MedusaHeads
    PromptLookup RECIPES Recipe Report Sensitivity Tree TreeSpeculation Typical __version__ backend
    calibrate distill errors evaluate export_onnx fit_tree inspect linearize load load_demo load_released
    load_released_heads lora_config merge onnx ops passes plan save train_heads transfer tune
"""
ONNX_NAMES_OF_0_1_0 = """
    Exported OrtModel Quantized StateNames build_cuda_library build_library export_onnx quantize register
    write_genai
"""


PASSES_NAMES_OF_0_1_0 = """
SCORE_STEPS CaptureError Effect MatchReport Refusal Row Site capture find_attention lower_attention
raise_attention
"""
OLDER_NAMES = {
    "": NAMES_OF_0_1_0,
    "onnx": ONNX_NAMES_OF_0_1_0,
    "passes": PASSES_NAMES_OF_0_1_0,
    "evaluation": "Evaluation Figures Row evaluate",
}


@pytest.mark.parametrize(
    "package, names",
    [
        (importlib.import_module(f"linearize.{name}".rstrip(".")), names)
        for name, names in OLDER_NAMES.items()
    ],
    ids=list(OLDER_NAMES),
)
def test_public_names_are_listed_and_there_those_of_before_too(package: ModuleType, names: str) -> None:
    assert set(names.split()) <= {*dir(package), "__version__"} and set(package.__all__) <= set(dir(package))
    for name in {*package.__all__, *names.split()}:
        getattr(package, name)
    with pytest.raises(AttributeError, match="linearise"):
        package.linearise  # noqa: B018


LAYOUT = """
import transformers, linearize.passes.site, linearize.kernels
from transformers import LlamaConfig
print(linearize.passes.site.__name__, list(linearize.kernels.__path__)[0])
"""


@pytest.fixture
def other_kernels(tmp_path: Path) -> Path:
    """A folder with someone else's regular package `kernels`, as PyPI's would be."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("THEIRS = True\n")
    return package.parent


@pytest.mark.slow
@pytest.mark.parametrize("with_theirs", [False, True])
def test_the_checkout_works_from_its_root_beside_a_package_named_kernels(
    with_theirs: bool, other_kernels: Path
) -> None:
    path = other_kernels if with_theirs else None
    assert python(LAYOUT, ROOT, path).split() == ["linearize.passes.site", str(ROOT / "kernels")]
    if with_theirs:
        assert python("import linearize.passes, kernels; print(kernels.THEIRS)", ROOT, path).strip() == "True"


@pytest.mark.slow
def test_python_m_linearize_and_pytest_run_from_the_root(other_kernels: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(other_kernels)}
    for command in (["linearize", "version"], ["pytest", "--collect-only", "-q", "tests/test_packaging.py"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks or would track: what a fresh clone has."""
    tree = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        source = ROOT / name
        if source.is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(source.read_bytes())
    return tree


def build_wheel(tree: Path, out: Path, compiler: str | None = None) -> Path:
    """Built without network, by `compiler` if given."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        out,
        tree,
    ]
    env = os.environ if compiler is None else {**os.environ, "CC": compiler, "CXX": compiler}
    subprocess.run(command, check=True, timeout=300, env=env)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(clone, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_one_top_level_package_with_its_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"linearize"}
    code = {name for name in names if name.endswith(".py")}
    want = set()
    for top in FOLDERS:
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).parts
            want.add("/".join(parts if top == "linearize" else ("linearize", *parts)))
    assert code == want
    assert {"linearize/py.typed", "linearize/__init__.pyi", "linearize/onnx/__init__.pyi"} <= set(names)
    data = {path for path in (ROOT / "linearize" / "demo" / "model").rglob("*") if path.is_file()}
    assert {path.relative_to(ROOT).as_posix() for path in data} <= set(names)


@pytest.mark.skipif(not cpu.available(), reason=cpu.unavailable_reason() or "")
def test_a_wheel_holds_the_kernels_for_any_python_and_not_their_sources(wheel: Path) -> None:
    assert "-py3-none-" in wheel.name
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("linearize/kernels/cpu/")}
    headers = {path.name for path in (ROOT / "kernels" / "cpu").glob("*.h")}
    modules = {path.name for path in (ROOT / "kernels" / "cpu").glob("*.py")}
    assert names == {f"linearize/kernels/cpu/{name}" for name in {"_kernels.so", *modules, *headers}}


def test_a_wheel_holds_what_the_onnxruntime_library_is_built_from(wheel: Path) -> None:
    folder = "linearize/onnx/library"
    sources = {path.name for path in (ROOT / folder).iterdir() if path.suffix in (".cpp", ".h")}
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{folder}/{name}" for name in sources} | {f"{folder}/cuda/op.cpp"} <= held
    assert "op.cpp" in sources


def test_a_source_distribution_holds_what_the_kernels_are_built_from(clone: Path, tmp_path: Path) -> None:
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    python(code, clone)
    (archive,) = tmp_path.glob("*.tar.gz")
    names = {name.split("/", 1)[1] for name in tarfile.open(archive).getnames() if "/" in name}
    folder = ROOT / "kernels" / "cpu"
    sources = {path.name for path in folder.iterdir() if path.suffix in (".cpp", ".h")}
    assert {f"kernels/cpu/{name}" for name in sources} | {"setup.py"} <= names


def test_without_a_compiler_the_package_installs_and_says_what_is_missing(
    clone: Path, tmp_path: Path
) -> None:
    shutil.rmtree(clone / "build", ignore_errors=True)
    built = build_wheel(clone, tmp_path / "wheel", compiler="no-such-compiler")
    zipfile.ZipFile(built).extractall(tmp_path / "target")
    code = "from linearize.kernels import cpu; print(cpu.available(), cpu.unavailable_reason())"
    said = python(code, tmp_path, tmp_path / "target")
    assert said.startswith("False") and "not built" in said


def test_an_installed_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    zipfile.ZipFile(wheel).extractall(target)
    out = python(LAYOUT, tmp_path, target).split()
    assert out == ["linearize.passes.site", str(target / "linearize" / "kernels")]


USE = """
from torch import nn
import linearize as lz

class Mine(nn.Module): ...

reveal_type(lz.linearize(Mine()))
reveal_type(lz.load("folder", Mine()))
lz.linearise(Mine())
lz.onnx.quantise
"""
MYPY = """
[mypy]
follow_imports = silent
[mypy-torch.*,transformers.*,sympy.*,numpy.*,onnx.*,onnx_ir.*,onnxruntime.*,onnxscript.*,triton.*,peft.*,accelerate.*]
follow_imports = skip
ignore_missing_imports = True
"""


def test_type_checkers_see_typos_in_public_names_and_that_a_model_keeps_its_type(
    wheel: Path, tmp_path: Path
) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "target")
    (tmp_path / "use.py").write_text(USE)
    (tmp_path / "mypy.ini").write_text(MYPY)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", os.devnull, "use.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(tmp_path / "target")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout.splitlines()
    wanted = ['type is "use.Mine"'] * 2 + [
        'no attribute "linearise"',
        'no attribute "quantise"',
        "Found 2 errors",
    ]
    assert len(said) == len(wanted), done.stdout + done.stderr
    assert all(text in line for text, line in zip(wanted, said, strict=True)), done.stdout


BLOCKED = """
import sys
ABSENT = {"triton", "onnx", "onnxruntime", "onnxscript", "peft", "accelerate", "sentence_transformers",
          "matplotlib", "lm_eval"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
import linearize
for name in linearize.__all__:
    try:
        getattr(linearize, name)
    except linearize.errors.MissingExtraError as error:
        assert name == "export_onnx" and "linearize[onnx]" in str(error), error
import linearize.backend, linearize.cli
assert not ABSENT & set(sys.modules)
model, _ = linearize.load_demo()
linearize.linearize(model)
print("ok")
"""


def test_everything_public_works_without_any_extra() -> None:
    assert python(BLOCKED, ROOT).strip() == "ok"


def test_the_backend_is_registered_with_dynamo() -> None:
    (found,) = entry_points(group="torch_dynamo_backends", name="linearize")
    assert callable(found.load())


def test_constraints_pin_every_direct_requirement_of_every_extra() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines += (ROOT / "tests" / "serving" / "constraints.txt").read_text().splitlines()  # an environment apart
    names = {line.split("==")[0].lower().removesuffix("-cpu") for line in lines if "==" in line}
    for requirement in requires("linearize") or []:
        name = re.split(r"[<>=!\[; ]", requirement)[0].lower()
        assert name in names | {"linearize"}, requirement


def test_the_versions_under_test_are_the_pinned_ones() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    for name in ("torch", "transformers", "peft", "accelerate"):
        assert f"{name}=={version(name).split('+')[0]}\n" in pins
