"""Files of an export: whole or not at all, whoever is killed, beside files of others."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from killed import kill_after, killed_at
from torch import nn

import linearize as lz
from linearize.errors import ExportError
from linearize.onnx import quantize


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((64, 64), factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


X = torch.ones(2, 64)


def export(factor: float, path: Path, **options: Any) -> Any:
    return lz.export_onnx(Scaled(factor).eval(), path, (X,), **options)


def factor_of(path: Path) -> float:
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    return float(session.run(None, {name: X.numpy()})[0][0, 0]) / 64


def put(source: Path, target: Path, names: dict[str, str]) -> None:
    """What an export does with files that are written already."""
    from linearize.onnx.file import staged

    with staged(target, True) as folder:
        for name, new in names.items():
            (folder / new).write_bytes((source / name).read_bytes())


def test_weights_beside_a_graph_are_replaced_with_it(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    for name in ("other.onnx.data", "m.onnx.data.bak", "notes.data"):
        (tmp_path / name).write_text("mine")
    first = export(2.0, target, external_data=True)
    assert [file.name for file in first.files] == ["m.onnx", "m.onnx.data"] and factor_of(target) == 2
    second = export(3.0, target, external_data=True)
    assert factor_of(target) == 3 and all(file.is_file() for file in second.files)
    assert not (tmp_path / "m.onnx.data").exists(), "the weights of the old graph are its own"
    export(4.0, target)
    assert factor_of(target) == 4
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["m.onnx", "m.onnx.data.bak", "notes.data", "other.onnx.data"]


def test_an_export_killed_anywhere_leaves_the_old_graph_or_the_new_one(tmp_path: Path) -> None:
    new = tmp_path / "new"
    for place in (tmp_path / "old", new):
        place.mkdir()
    export(2.0, tmp_path / "old/m.onnx", external_data=True)
    (new / "m.onnx.data").write_text("taken, so that the name is another")
    made = export(3.0, new / "m.onnx", external_data=True).files
    names = {file.name: file.name for file in made}
    seen = []
    for step in range(60):
        home = tmp_path / f"{step}"
        home.mkdir()
        for file in (tmp_path / "old").iterdir():
            (home / file.name).write_bytes(file.read_bytes())
        if not killed_at(step, lambda: put(new, home / "m.onnx", names)):  # noqa: B023
            break
        seen.append(factor_of(home / "m.onnx"))
        put(new, home / "m.onnx", names)
        assert factor_of(home / "m.onnx") == 3 and not list(home.glob(".linearize*"))
    assert len(seen) > 5 and seen == sorted(seen) and set(seen) == {2.0, 3.0}


@pytest.mark.parametrize("external", [False, True])
def test_no_room_is_one_error_and_the_old_graph(external: bool, tmp_path: Path) -> None:
    import resource

    export(2.0, tmp_path / "m.onnx", external_data=external)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 3000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(ExportError, match="cannot write") as caught:
                export(3.0, tmp_path / "m.onnx", external_data=external)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(str(caught.value)) < 600
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("place", ["../m.onnx.data", "/etc/passwd", "a/../../b"])
def test_weights_outside_the_folder_are_not_read(place: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    export(2.0, tmp_path / "in/m.onnx", external_data=True)
    graph = onnx.load(tmp_path / "in/m.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place
    (tmp_path / "in/m.onnx").write_bytes(graph.SerializeToString())
    (tmp_path / "in/m.onnx.data").rename(tmp_path / "m.onnx.data")
    with pytest.raises(ExportError, match="outside its folder"):
        quantize(tmp_path / "in/m.onnx", tmp_path / "in/q.onnx")
    for data in (b"", b"no graph at all", graph.SerializeToString()[:100]):
        (tmp_path / "in/m.onnx").write_bytes(data)
        with pytest.raises(ExportError, match=r"m\.onnx"):
            quantize(tmp_path / "in/m.onnx", tmp_path / "in/q.onnx")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["m.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("external", [False, True])
def test_twenty_exports_killed_at_random_moments(external: bool, tmp_path: Path) -> None:
    target, draw = tmp_path / "m.onnx", random.Random(0)

    def both() -> None:
        for factor in (3.0, 2.0):
            export(factor, target, external_data=external)

    export(2.0, target, external_data=external)
    seen = []
    for _ in range(20):
        kill_after(draw.uniform(0.3, 2.5), both)
        seen.append(factor_of(target))
    export(2.0, target, external_data=external)
    print(f"20 kills, {seen.count(2.0)} old, {seen.count(3.0)} new")
    assert set(seen) <= {2.0, 3.0} and not list(tmp_path.glob(".linearize*"))
