"""The operators for onnxruntime: their numbers, who gets them, and what happens to who does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx_nodes import BFLOAT16, DOUBLE, FLOAT, FLOAT16, Case, session_options, write_node

from linearize.errors import LibraryError
from linearize.onnx import library
from linearize.onnx.library.build import find_headers
from linearize.onnx.schema import FAMILIES

CPU = ["CPUExecutionProvider"]
CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")
# Uneven, with calls that begin at 0 and at 1 modulo 64, 16 and 3, of one token and of more than two groups.
CHUNKS = (130, 1, 1, 60, 64, 1, 14, 1, 29, 3)


@pytest.fixture(scope="session")
def built() -> Path:
    """The library, built now when it was not and the headers are here."""
    if library.unavailable_reason() is not None:
        try:
            library.build_library()
        except LibraryError as error:
            pytest.skip(f"the library for onnxruntime is not built and cannot be: {error}")
    reason = library.unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return library.LIBRARY


def open_with(path: Path, level: str = "ORT_ENABLE_ALL", threads: int = 1) -> ort.InferenceSession:
    options = session_options(level, threads)
    assert library.register(options, path)
    return ort.InferenceSession(path, options, providers=CPU)


SIZES = [
    dict(),
    dict(group_size=64, taps=63, dim=64, value_dim=64),
    dict(group_size=16, taps=40, dim=16, value_dim=24),
    dict(group_size=3, taps=2, dim=33, value_dim=65),
    dict(group_size=1, taps=1, dim=8, value_dim=7),
    dict(padded=True),
    dict(activation="linear", normalize=False, heads=(2, 2)),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_prefill_pieces_and_single_tokens_give_what_the_oracle_gives(
    built: Path, tmp_path: Path, sizes: dict
) -> None:
    case = Case.random(sum(CHUNKS), **sizes)
    path = write_node(
        tmp_path / "node.onnx",
        FAMILIES[case.activation],
        group_size=case.group_size,
        normalize=int(case.normalize),
    )
    expected = case.expected()
    for level in LEVELS:
        session = open_with(path, level)
        for chunks in (CHUNKS, [sum(CHUNKS)], [1] * 70 + [sum(CHUNKS) - 70]):
            before = library.calls()
            out = case.run(session, chunks)
            assert library.calls() - before == len(chunks)
            np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(FLOAT16, 2e-3), (BFLOAT16, 2e-2)])
def test_half_precision(built: Path, tmp_path: Path, dtype: int, tolerance: float) -> None:
    case = Case.random(sum(CHUNKS), padded=True, digits=np.float16)
    session = open_with(write_node(tmp_path / "node.onnx", dtype=dtype))
    before = library.calls()
    out = case.run(session, CHUNKS)
    assert library.calls() - before == len(CHUNKS)
    expected = case.expected()
    np.testing.assert_allclose(out, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("activation", ["relu2", "linear"])
def test_the_body_of_the_same_file_gives_the_same_and_is_not_the_library(
    built: Path, tmp_path: Path, activation: str
) -> None:
    case = Case.random(sum(CHUNKS), activation=activation, padded=True)
    path = write_node(tmp_path / "node.onnx", FAMILIES[activation])
    before = library.calls()
    for level in LEVELS:
        bare = ort.InferenceSession(path, session_options(level), providers=CPU)
        np.testing.assert_allclose(case.run(bare, CHUNKS), case.expected(), atol=1e-4)
    assert library.calls() == before


def test_the_numbers_do_not_depend_on_the_number_of_threads(built: Path, tmp_path: Path) -> None:
    case = Case.random(700, heads=(8, 8), dim=64, value_dim=64)
    path = write_node(tmp_path / "node.onnx")
    one, two = (case.run(open_with(path, threads=threads), [700]) for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_a_state_that_is_forgotten_is_noticed(built: Path, tmp_path: Path) -> None:
    case = Case.random(sum(CHUNKS))
    out = case.run(open_with(write_node(tmp_path / "node.onnx")), CHUNKS, forget=True)
    assert np.abs(out - case.expected()).max() > 0.1


# ------------------------------------------------------------------------------------------------ the loader


@pytest.mark.parametrize("providers, covered", [(CPU, True), (CUDA, False)])
@pytest.mark.parametrize("dtype, known", [(FLOAT, True), (FLOAT16, True), (BFLOAT16, True), (DOUBLE, False)])
def test_registering_never_stops_a_file_that_its_body_would_run(
    built: Path, tmp_path: Path, dtype: int, known: bool, providers: list[str], covered: bool
) -> None:
    path = write_node(tmp_path / "node.onnx", dtype=dtype)
    options = session_options()
    registered = library.register(options, path, providers)
    assert registered == (known and covered)
    assert (library.obstacle(path, providers) is None) == registered
    case = Case.random(70)
    before = library.calls()
    here = [name for name in providers if name in ort.get_available_providers()]
    out = case.run(ort.InferenceSession(path, options, providers=here), [69, 1])
    assert library.calls() - before == 2 * registered
    np.testing.assert_allclose(out, case.expected(), atol=0.2)


def test_without_the_loader_a_type_that_is_not_covered_is_an_error(built: Path, tmp_path: Path) -> None:
    """What the loader is for: if this ever loads, onnxruntime falls back by itself."""
    path = write_node(tmp_path / "node.onnx", dtype=DOUBLE)
    options = session_options()
    options.register_custom_ops_library(str(built))
    with pytest.raises(Exception, match="AugmentedLinearAttention"):
        ort.InferenceSession(path, options, providers=CPU)


@pytest.mark.parametrize("name", ["LaplaceLinearAttention", "BidirectionalAugmentedLinearAttention"])
def test_an_operator_that_the_library_does_not_have_runs_by_its_body(
    built: Path, tmp_path: Path, name: str
) -> None:
    path = write_node(tmp_path / "node.onnx", name)
    options = session_options()
    assert not library.register(options, path)
    assert "no node that the library runs" in str(library.obstacle(path))
    options.register_custom_ops_library(str(built))  # as another node of the file might ask for
    ort.InferenceSession(path, options, providers=CPU)


def test_nodes_whose_types_are_not_known_are_left_to_their_bodies(built: Path, tmp_path: Path) -> None:
    plain = onnx.load(write_node(tmp_path / "node.onnx"))
    (node,) = plain.graph.node
    branch = onnx.helper.make_graph([node], "branch", [], plain.graph.output)
    names = [value.name for value in plain.graph.output]
    choice = onnx.helper.make_node("If", ["always"], names, then_branch=branch, else_branch=branch)
    always = onnx.helper.make_tensor("always", onnx.TensorProto.BOOL, [], [True])
    nested = onnx.ModelProto()
    nested.CopyFrom(plain)
    del nested.graph.node[:]
    nested.graph.node.append(choice)
    nested.graph.initializer.append(always)
    onnx.save(nested, tmp_path / "nested.onnx")
    # Their types are those of the inputs.
    assert library.register(session_options(), tmp_path / "nested.onnx")

    for value in nested.graph.input:
        value.name = f"{value.name}_outer"
        cast = onnx.helper.make_node("Identity", [value.name], [value.name.removesuffix("_outer")])
        nested.graph.node.insert(0, cast)
    onnx.save(nested, tmp_path / "untold.onnx")
    options = session_options()
    assert not library.register(options, tmp_path / "untold.onnx")
    ort.InferenceSession(tmp_path / "untold.onnx", options, providers=CPU)

    wrapped = onnx.ModelProto()
    wrapped.CopyFrom(plain)
    inputs = [value.name for value in plain.graph.input]
    function = onnx.helper.make_function("other", "Wrapped", inputs, names, [node], plain.opset_import)
    wrapped.functions.append(function)
    onnx.save(wrapped, tmp_path / "wrapped.onnx")
    assert "inside functions" in str(library.obstacle(tmp_path / "wrapped.onnx"))


def test_what_is_no_onnx_file_is_said_so(built: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf")
    for name in ("broken.onnx", "missing.onnx"):
        with pytest.raises(LibraryError, match=name):
            library.register(session_options(), tmp_path / name)


def test_shapes_that_do_not_fit_are_an_error_and_not_a_crash(built: Path, tmp_path: Path) -> None:
    case = Case.random(70, group_size=32)  # its window is too short for the groups of the node
    session = open_with(write_node(tmp_path / "node.onnx", group_size=64))
    with pytest.raises(Exception, match="the rows of past_window"):
        case.run(session, [70])


# ---------------------------------------------------------------------------------------------- the compiler


def test_without_headers_one_sentence_says_where_they_are_to_be_had(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="libonnxruntime-dev.*--include") as caught:
        library.build_library(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_the_command_says_it_in_one_line_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "linearize", "build-library", "--include", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: onnxruntime's C++ headers") and done.stderr.count("\n") == 1


def test_headers_are_found_below_the_folder_that_is_given(tmp_path: Path) -> None:
    folder = tmp_path / "include" / "onnxruntime"
    folder.mkdir(parents=True)
    (folder / "onnxruntime_cxx_api.h").touch()
    assert find_headers(tmp_path) == folder


def test_a_build_that_fails_leaves_the_library_as_it_was(built: Path, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime_cxx_api.h").write_text("#error not these\n")
    before = built.read_bytes()
    with pytest.raises(LibraryError, match="not these"):
        library.build_library(tmp_path)
    with pytest.raises(LibraryError, match="cannot be run"):
        library.build_library(tmp_path, compiler="no-such-compiler")
    assert built.read_bytes() == before and library.unavailable_reason() is None
    assert not list(built.parent.glob(".build-*"))
