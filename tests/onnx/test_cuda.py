"""The operators for onnxruntime's CUDA provider, without a GPU: the kernel, its code, who gets the library.

Nothing here was ever launched on a GPU. The kernel runs in Triton's interpreter, called by us and called by
the library in a session of the CPU provider, where a library of our own stands for CUDA's driver and hands
each launch to the interpreter. The last test wants a GPU.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from interpreter import interpreted
from onnx_nodes import BFLOAT16, DOUBLE, FLOAT, FLOAT16, Case, session_options, write_node
from triton_aot import build

from linearize.errors import LibraryError
from linearize.onnx import library
from linearize.onnx.library.build import find_compiler, find_headers
from linearize.onnx.library.cuda import kinds, loader
from linearize.onnx.library.cuda.build import build_cuda_library
from linearize.onnx.schema import FAMILIES

CPU, CUDA = ["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]
SMALL = dict(group_size=16, taps=7, dim=16, value_dim=24, heads=(2, 1))
CHUNKS = (5, 1, 70, 4, 1, 15)  # three tiles after a window, one of them folded; 0 and 1 at groups' borders
FEW = (18, 1, 14)


def write_shaped(path: Path, dim: int = 16, value_dim: int = 24, **options: Any) -> Path:
    """`write_node` with the state's sizes told, as exported files do."""
    model = onnx.load(write_node(path, group_size=16, **options))
    (past,) = (value for value in model.graph.input if value.name == "past_recurrent")
    sizes = ["batch", "heads", dim, value_dim]
    past.CopyFrom(onnx.helper.make_tensor_value_info("past_recurrent", FLOAT, sizes))
    onnx.save(model, path)
    return path


# ------------------------------------------------------------------------------------------------ the kernel


class Interpreted:
    """Stands for a session of one node: `Case.run` on the kernel itself."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        self.case, self.dtype = case, dtype

    def run(self, _: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
        from linearize.kernels.triton import launch, rolling

        x = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in given.items()}
        for name in ("query", "key", "value", "past_window"):
            x[name] = x[name].to(self.dtype)
        how = (self.case.activation, self.case.group_size, self.case.normalize)
        item, made = rolling.prepare(*(x[name] for name in rolling.INPUTS), *how)
        launch.run([item], x["query"].device)
        return [y.float().numpy() for y in made]


def check_kernel(
    chunks: tuple[int, ...], dtype: str = "float32", tolerance: float = 2e-5, **sizes: Any
) -> None:
    case = Case.random(sum(chunks), digits=np.float32 if dtype == "float32" else np.float16, **sizes)
    expected = case.expected()
    out = case.run(Interpreted(case, getattr(torch, dtype)), chunks)
    np.testing.assert_allclose(out, expected, atol=tolerance * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("sizes", [
    dict(SMALL),
    dict(SMALL, group_size=3, taps=20, dim=9, value_dim=5, padded=True),
    dict(SMALL, group_size=1, taps=1, activation="linear", normalize=False),
], ids=str)  # fmt: skip
@interpreted
def test_the_kernel_in_pieces_gives_what_the_oracle_gives(sizes: dict[str, Any]) -> None:
    check_kernel(CHUNKS, **sizes)


@interpreted
def test_the_kernel_on_all_at_once_gives_what_the_oracle_gives() -> None:
    check_kernel((40,), padded=True, **{**SMALL, "heads": (4, 2)})


@interpreted
def test_the_kernel_token_by_token_gives_what_the_oracle_gives() -> None:
    check_kernel((1,) * 17, padded=True, **SMALL)


@pytest.mark.parametrize("dtype, tolerance", [("float16", 2e-3), ("bfloat16", 2e-2)])
@interpreted
def test_the_kernel_in_half_precision(dtype: str, tolerance: float) -> None:
    check_kernel(FEW, dtype, tolerance, padded=True, **SMALL)


@interpreted
def test_a_state_that_is_forgotten_is_noticed() -> None:
    case = Case.random(sum(FEW), **SMALL)
    out = case.run(Interpreted(case), FEW, forget=True)
    assert np.abs(out - case.expected()).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [
    dict(padded=True),
    dict(group_size=64, taps=63, dim=64, value_dim=64),
    dict(group_size=3, taps=2, dim=33, value_dim=65),
    dict(padded=True, heads=(4, 1)),
], ids=str)  # fmt: skip
@interpreted
def test_the_kernel_at_other_sizes(sizes: dict[str, Any]) -> None:
    check_kernel((130, 1, 1, 60, 1, 15), **sizes)


# -------------------------------------------------------------------------------------------- compiled ahead


def check_code(target: str, dim: int, dtype: torch.dtype, stack: int) -> None:
    from linearize.kernels.triton import rolling

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    for tokens in rolling.BLOCKS:
        x = meta(2, 4, tokens, dim, dtype=dtype)
        window = meta(2, 4, 63, 2 * dim, dtype=dtype)
        past = (meta(2, 4, dim, dim), window, meta(2, dtype=torch.int64))
        tables = (meta(4), meta(4), meta(4, 32))
        real = meta(2, tokens, dtype=torch.bool)
        item, _ = rolling.prepare(x, x, x, real, *past, *tables, "relu2", 64, True)
        built = build(item, target)
        print(built)
        assert not built.faults(item, stack)


@pytest.mark.parametrize("target", ["sm_90"])
def test_the_kernel_compiles_without_gross_spills(target: str) -> None:
    check_code(target, 64, torch.float16, 64)
    check_code(target, 64, torch.float32, 256)


@pytest.mark.slow
@pytest.mark.parametrize("dim, dtype, stack", [
    (64, torch.float16, 64),
    (64, torch.float32, 256),
    (128, torch.float16, 256),
    (128, torch.float32, 1024),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_the_kernel_compiles_for_other_processors(
    target: str, dim: int, dtype: torch.dtype, stack: int
) -> None:
    check_code(target, dim, dtype, stack)


# ------------------------------------------------------------------------------------------------ the library

# The calls that op.cpp makes. A "module" is the number that its image spells; `hook` gets the launches.
DRIVER = """
#include <cstdlib>
typedef int (*Hook)(void*, unsigned, unsigned, unsigned, void**);
static Hook hook;
extern "C" {
void stand_in(Hook given) { hook = given; }
int cuCtxGetCurrent(void** context) { return *context = &hook, 0; }
int cuCtxGetDevice(int* device) { return *device = 0; }
int cuDeviceGetAttribute(int* value, int which, int) { return *value = which == 75 ? 9 : 0, 0; }
int cuModuleLoadData(void** made, const void* image) { return *made = (void*)atol((const char*)image), 0; }
int cuModuleGetFunction(void** function, void* module, const char*) { return *function = module, 0; }
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuLaunchKernel(void* function, unsigned x, unsigned, unsigned, unsigned threads, unsigned, unsigned,
                   unsigned shared, void*, void** arguments, void**) {
  return hook(function, x, threads, shared, arguments);
}
}
"""
HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)
COLUMNS, WARPS, SHARED = 16, 2, 1000


@pytest.fixture(scope="session")
def headers() -> str:
    try:
        return str(find_headers())
    except LibraryError as error:
        pytest.skip(str(error))


def write_library(folder: Path, headers: str, kind: kinds.Kind) -> Path:
    """The library for the CPU's provider, with "kernels" that DRIVER takes, and DRIVER."""
    (folder / "driver.cpp").write_text(DRIVER)
    source = Path(kinds.__file__).with_name("op.cpp")
    shared = [find_compiler(), "-std=c++17", "-fPIC", "-shared"]
    driver = [
        *shared,
        str(folder / "driver.cpp"),
        "-Wl,-soname,libcuda.so.1",
        "-o",
        str(folder / "driver.so"),
    ]
    defined = ["-DSHORT_BLOCK=16", "-DLONG_BLOCK=32", '-DSOURCES="-"', '-DPROVIDER="CPUExecutionProvider"']
    operators = [*shared, *defined, "-isystem", headers, str(source), "-o", str(folder / "operators.so")]
    for command in (driver, operators):
        subprocess.run(command, check=True, timeout=300)
    lines = ["-"]
    for block in (16, 32):
        (folder / f"{block}.cubin").write_text(f"{block}")
        lines.append(kinds.Built(kind, block, 90, COLUMNS, WARPS, SHARED, f"{block}.cubin").line())
    (folder / "index.txt").write_text("\n".join(lines))
    return folder / "operators.so"


def launched(case: Case, dtype: Any) -> Any:
    """What stands for a launch: the kernel in the interpreter, on the memory that the library passes."""
    from linearize.kernels.triton import rolling

    dim, width = case.key.shape[3], case.value.shape[3]

    def at(pointer: int, kind: Any, *shape: int) -> torch.Tensor:
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        raw = (ctypes.c_char * size).from_address(pointer)
        return torch.from_numpy(np.frombuffer(raw, kind).reshape(shape))

    def launch(function: int, programs: int, threads: int, shared: int, arguments: Any) -> int:
        pointers = [ctypes.cast(arguments[i], ctypes.POINTER(ctypes.c_void_p))[0] for i in range(13)]
        numbers = [ctypes.cast(arguments[13 + i], ctypes.POINTER(ctypes.c_int32))[0] for i in range(6)]
        scratch = [ctypes.cast(arguments[19 + i], ctypes.POINTER(ctypes.c_void_p))[0] for i in range(2)]
        tokens, heads, repeats, rows, group, taps = numbers
        batch = len(case.real)
        block = 16 if tokens <= 16 else 32
        if (function, threads, shared, scratch) != (block, 32 * WARPS, SHARED, [None, None]):
            return 1
        if programs != batch * heads * -(-width // COLUMNS) or group != case.group_size:
            return 2
        of_state = (np.float32, batch, heads, dim, width)
        of_window = (dtype, batch, heads, rows, dim + width)
        shapes = [
            (dtype, batch, heads * repeats, tokens, dim),
            (dtype, batch, heads, tokens, dim),
            (dtype, batch, heads, tokens, width),
            (np.bool_, batch, tokens),
            of_state,
            of_window,
            (np.int64, batch),
            *[(np.float32, heads * repeats)] * 2,
            (np.float32, heads * repeats, taps),
            (dtype, batch, heads * repeats, tokens, width),
            of_state,
            of_window,
        ]
        tensors = [at(pointer, *shape) for pointer, shape in zip(pointers, shapes, strict=True)]
        for made in tensors[10:]:
            made.fill_(torch.nan)
        rolling.rolling_kernel[(programs,)](
            *tensors,
            *numbers,
            D=dim,
            BD=max(16, 1 << (dim - 1).bit_length()),
            DV=width,
            BV=COLUMNS,
            BLOCK=block,
            RELU2=case.activation == "relu2",
            UNIT=case.normalize,
            PRECISION="ieee",
        )
        return 0

    return launch


@pytest.mark.usefixtures("headers")
@pytest.mark.parametrize(
    "kind, dtype, tolerance", [("float", np.float32, 2e-5), ("float16", np.float16, 4e-3)]
)
@interpreted
def test_the_library_launches_the_kernel_on_a_node(kind: str, dtype: Any, tolerance: float) -> None:
    """Runs in the interpreter's process: the stand-in for the driver stays in that one."""
    folder = Path(tempfile.mkdtemp())
    case = Case.random(sum(FEW), padded=True, digits=np.float16, **{**SMALL, "heads": (4, 2)})
    wanted = kinds.Kind(FAMILIES["relu2"], kind, 16, 24, 1)
    operators = write_library(folder, str(find_headers()), wanted)
    driver = ctypes.CDLL(str(folder / "driver.so"), ctypes.RTLD_GLOBAL)
    hook = HOOK(launched(case, dtype))
    driver.stand_in(hook)
    options = session_options(threads=1)
    options.register_custom_ops_library(str(operators))
    path = write_shaped(folder / "node.onnx", dtype=FLOAT if kind == "float" else FLOAT16)
    out = case.run(ort.InferenceSession(path, options, providers=CPU), FEW)
    assert ctypes.CDLL(str(operators)).linearize_onnx_calls() == len(FEW)
    expected = case.expected()
    np.testing.assert_allclose(out, expected, atol=tolerance * max(1.0, np.abs(expected).max()))


@pytest.fixture(scope="session")
def build_folder(headers: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "BUILT", folder)
        build_cuda_library(write_shaped(folder / "node.onnx"), architectures=[90])
    return folder


@pytest.fixture
def built(build_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library, in place of the user's, with kernels for 16 and 24 features in float, for sm_90 alone."""
    monkeypatch.setattr(kinds, "BUILT", build_folder)
    return kinds.library()


def test_the_library_is_built_without_a_gpu_and_exports_what_onnxruntime_looks_for(built: Path) -> None:
    exported = subprocess.run(["nm", "-D", str(built)], capture_output=True, text=True, check=True).stdout
    assert " T RegisterCustomOps" in exported and " U cu" not in exported
    needed = subprocess.run(["ldd", str(built)], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in needed and "onnxruntime" not in needed
    session_options().register_custom_ops_library(str(built))
    assert loader.unavailable_reason() is None
    mine = [entry for entry in kinds.read_index() if entry.kind[1:4] == ("float", 16, 24)]
    assert {(entry.arch, entry.block) for entry in mine} == {(90, 16), (90, 32)}
    for entry in mine:
        assert (kinds.BUILT / entry.file).read_bytes()[:4] == b"\x7fELF" and entry.shared > 0


# ------------------------------------------------------------------------------------------------ the loader


@pytest.mark.parametrize("here, options, why", [
    ([90], dict(), None),
    ([90, 90], dict(), None),
    ([90, 80], dict(), "no kernel was built for .* on sm_80"),
    ([100], dict(), "no kernel was built for .* on sm_100"),
    ("there is no GPU here", dict(), "there is no GPU here"),
    ([90], dict(dim=17), "no kernel was built for .* 17 and 24"),
    ([90], dict(value_dim=25), "no kernel was built for .* 16 and 25"),
    ([90], dict(normalize=0), "no kernel was built for .* not normalised"),
    ([90], dict(name=FAMILIES["linear"]), "no kernel was built for Plain"),
    ([90], dict(dtype=BFLOAT16), "no kernel was built for .* bfloat16"),
    ([90], dict(dtype=DOUBLE), "no kernel for query in double"),
    ([90], dict(name="LaplaceLinearAttention"), "no node that the library runs"),
], ids=str)  # fmt: skip
def test_only_a_session_whose_nodes_all_have_a_kernel_gets_the_library(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Any, options: dict, why: str | None
) -> None:
    monkeypatch.setattr(loader, "architectures", lambda: here)
    path = write_shaped(tmp_path / "node.onnx", **options)
    found = library.obstacle(path, CUDA)
    session = session_options()
    assert library.register(session, path, CUDA) == (why is None)
    if why is None:
        assert found is None
        return
    assert found is not None and re.search(why, found), found
    ort.InferenceSession(path, session, providers=CPU)  # by the body


def test_code_for_8_0_serves_8_9_and_other_code_its_own_processors_alone() -> None:
    kind = kinds.Kind(FAMILIES["relu2"], "float", 16, 24, 1)
    for arch, device, runs in [
        (80, 80, 1),
        (80, 89, 1),
        (80, 90, 0),
        (90, 90, 1),
        (90, 100, 0),
        (100, 103, 0),
    ]:
        entry = kinds.Built(kind, 16, arch, 16, 4, 0, "x")
        assert entry.runs_on(device) == bool(runs)
        assert kinds.Built.of(entry.line()) == entry


def test_a_file_that_does_not_tell_its_sizes_is_left_to_its_body(built: Path, tmp_path: Path) -> None:
    assert "does not tell" in str(kinds.kinds_of(write_node(tmp_path / "node.onnx")))
    with pytest.raises(LibraryError, match="does not tell"):
        build_cuda_library(tmp_path / "node.onnx")


def test_other_providers_and_stale_builds_get_nothing(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "architectures", lambda: [90])
    path = write_shaped(tmp_path / "node.onnx")
    assert library.obstacle(path, CUDA) is None
    assert "Tensorrt" in str(library.obstacle(path, ["TensorrtExecutionProvider", *CUDA]))
    monkeypatch.setattr(loader, "sources", lambda: "other")
    assert "other sources" in str(library.obstacle(path, CUDA))
    monkeypatch.setattr(kinds, "sources", lambda: "other")
    assert kinds.read_index() == []


def test_a_change_in_what_is_compiled_makes_another_library() -> None:
    """A header that the digest leaves out would change and the old library stay."""
    (source,) = (path for path in kinds.SOURCES if path.name == "op.cpp")
    headers = re.findall(r'#include "(.+)"', source.read_text())
    assert headers and {(source.parent / name).resolve() for name in headers} <= set(kinds.SOURCES)


def test_a_session_on_the_cpu_never_gets_it(built: Path, tmp_path: Path) -> None:
    """And why: a session that has it without the provider does not open."""
    path = write_shaped(tmp_path / "node.onnx")
    options, forced = session_options(), session_options()
    library.register(options, path, CPU)
    case, before = Case.random(40, **SMALL), loader.calls()
    out = case.run(ort.InferenceSession(path, options, providers=CPU), [39, 1])
    np.testing.assert_allclose(out, case.expected(), atol=1e-4)
    assert loader.calls() == before == 0
    forced.register_custom_ops_library(str(built))
    with pytest.raises(Exception, match="AugmentedLinearAttention"):
        ort.InferenceSession(path, forced, providers=CPU)


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="onnxruntime has no CUDAExecutionProvider here: the CUDA library was NEVER LAUNCHED",
)
@pytest.mark.parametrize("dtype, tolerance", [(FLOAT, 1e-4), (FLOAT16, 4e-3), (BFLOAT16, 3e-2)])
def test_on_a_gpu(
    headers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: int, tolerance: float
) -> None:
    monkeypatch.setattr(kinds, "BUILT", tmp_path)
    here = loader.architectures()
    assert not isinstance(here, str), here
    path = write_shaped(tmp_path / "node.onnx", dtype=dtype)
    build_cuda_library(path, architectures=sorted(set(here)))
    options = session_options()
    assert library.register(options, path, CUDA)
    case, before = Case.random(sum(CHUNKS), padded=True, digits=np.float16, **SMALL), loader.calls()
    out = case.run(ort.InferenceSession(path, options, providers=CUDA), CHUNKS)
    assert loader.calls() - before == len(CHUNKS)
    expected = case.expected()
    np.testing.assert_allclose(out, expected, atol=tolerance * max(1.0, np.abs(expected).max()))
