"""An exported folder is of one export: whoever is killed, whoever reads meanwhile."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from killed import kill_after, killed_at, working
from live_models import llama

import linearize as lz
from linearize.errors import ExportError
from linearize.onnx import OrtModel, quantize
from linearize.onnx import folder as folders
from linearize.onnx.file import staged

GRAPHS = ("encoder_model.onnx", "decoder_model.onnx")


def graph_of(number: int, data: str | None) -> bytes:
    """A graph of one constant, whose weights may be in a file beside it."""
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.INT64, [1], [number])
    if data is not None:
        tensor.ClearField("int64_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=data)
        tensor.external_data.add(key="length", value="8")
    out = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.INT64, [1])
    graph = onnx.helper.make_graph([], "g", [], [out], [tensor])
    sets = [onnx.helper.make_opsetid("", 20)]
    return onnx.helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()


def put(number: int, home: Path) -> None:
    """What an export does with two graphs, weights and a configuration that are all of this number."""
    with staged(home, False) as scratch:
        for name in GRAPHS:
            (scratch / f"{name}.{number}.onnx.data").write_bytes(number.to_bytes(8, "little"))
            (scratch / name).write_bytes(graph_of(number, f"{name}.{number}.onnx.data"))
        (scratch / "config.json").write_text(json.dumps({"number": number}))


def numbers(place: Path) -> set[int]:
    """Of every file of a folder. Raises ExportError where one is missing."""
    try:
        graphs = [onnx.load(place / name).graph.initializer[0] for name in GRAPHS]
        found = {int(onnx.numpy_helper.to_array(x)[0]) for x in graphs}
        return found | {json.loads((place / "config.json").read_text())["number"]}
    except (OSError, onnx.checker.ValidationError) as error:
        raise ExportError("a file is missing") from error


def seen(home: Path) -> int:
    (found,) = folders.undisturbed(home / GRAPHS[0], lambda file: numbers(file.parent))
    return found


def by_others(home: Path) -> set[int]:
    """What a reader sees who does not know of the note; nothing where it meets an error."""
    try:
        return numbers(home)
    except ExportError:
        return set()


def test_a_writer_killed_anywhere_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    found = []
    for step in range(80):
        home = tmp_path / f"{step}"
        put(1, home)
        (home / "mine.txt").write_text("mine")
        if not killed_at(step, lambda: put(2, home)):  # noqa: B023
            break
        assert len(by_others(home)) < 2, "graphs and configuration of two exports"
        found.append(seen(home))
        assert len(by_others(home)) == 1, "the reader finished what the writer began"
        put(3, home)
        assert seen(home) == 3 and not list(home.glob(".linearize*"))
        names = {path.name for path in home.iterdir()}
        assert names == {*GRAPHS, *(f"{name}.3.onnx.data" for name in GRAPHS), "config.json", "mine.txt"}
    assert len(found) > 10 and found == sorted(found) and set(found) == {1, 2}


def test_where_only_the_weights_differ_others_never_miss_a_graph(tmp_path: Path) -> None:
    def one(number: int) -> None:
        with staged(tmp_path / "m", False) as scratch:
            (scratch / "model.onnx").write_bytes(graph_of(number, None))
            (scratch / "config.json").write_text("{}")

    one(1)
    for step in range(40):
        if not killed_at(step, lambda: one(2)):
            break
        assert (tmp_path / "m/model.onnx").is_file()


def test_readers_beside_a_writer_see_one_export(tmp_path: Path) -> None:
    put(0, tmp_path / "m")
    turn = iter(range(1, 10**9))
    with working(lambda: put(next(turn), tmp_path / "m")):
        found = []
        end = time.monotonic() + 10
        while len(found) < 60 and (len(found) < 5 or time.monotonic() < end):
            found.append(seen(tmp_path / "m"))
    print(f"{len(found)} reads beside a writer, of {len(set(found))} exports, 0 mixed")
    assert found == sorted(found) and len(set(found)) > 1


def test_a_note_that_leads_astray_is_no_note(tmp_path: Path) -> None:
    put(1, tmp_path / "m")
    put(2, tmp_path / "other")
    for named in ("../other", str(tmp_path / "other"), "..", "", ".linearize-none", 7, None, "a\0b"):
        (tmp_path / "m" / folders.NOTE).write_text(json.dumps({"folder": named, "stale": [GRAPHS[0]]}))
        assert seen(tmp_path / "m") == 1
    (tmp_path / "m" / folders.NOTE).write_bytes(b"\xff\x00 no json")
    assert seen(tmp_path / "m") == 1


BROKEN = (b"", b"{", b"[]", b"null", b"1", b"NaN", b"\xff\xfe{}", b"[" * 100_000, b'{"eos_token_id": "x"}')


@pytest.mark.parametrize("name", ("config.json", "generation_config.json"))
def test_a_damaged_configuration_is_one_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(graph_of(1, None))
    llama().config.save_pretrained(tmp_path)
    llama().generation_config.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / name).read_text())
    OrtModel(tmp_path)
    for content in BROKEN:
        if content[-3:] == b'x"}':
            content = json.dumps(whole | json.loads(content)).encode()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ExportError, match="configuration beside") as caught:
            OrtModel(tmp_path)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ("a\0b", "x" * 5000, "é" * 200, "\udcff", "none", "/proc/self/x"))
def test_names_of_every_kind_are_one_error(name: str, tmp_path: Path) -> None:
    put(1, tmp_path / "m")
    for work in (
        lambda: OrtModel(tmp_path / name),
        lambda: quantize(tmp_path / name / "m.onnx", tmp_path / "q.onnx"),
        lambda: quantize(tmp_path / "m" / GRAPHS[0], tmp_path / name / "m.onnx"),
    ):
        with pytest.raises(ExportError) as caught:
            work()
        assert len(str(caught.value)) < 600


@pytest.mark.slow
def test_twenty_writers_killed_at_random_moments(tmp_path: Path) -> None:
    home, draw = tmp_path / "m", random.Random(0)
    put(0, home)
    counts: Counter[str] = Counter()
    for _ in range(20):
        before = seen(home)
        turn = iter(range(before + 1, 10**9))
        kill_after(draw.uniform(0.02, 0.2), lambda turn=turn: put(next(turn), home))
        foreign = by_others(home)
        counts["for others: " + ("one export", "mixed", "an error")[min(len(foreign), 2) - 1]] += 1
        counts["old" if seen(home) == before else "new"] += 1
    print(f"20 kills: {dict(counts)}")
    assert counts["for others: mixed"] == 0 and not list(home.glob(".linearize*/model.onnx"))


@pytest.mark.slow
def test_twenty_writers_of_a_decoder_killed_at_random_moments(tmp_path: Path) -> None:
    """The vocabulary's size is in the graph and in the configuration."""
    home, draw = tmp_path / "m", random.Random(0)
    for size in (40, 48):
        model = llama().eval()
        model.resize_token_embeddings(size)
        lz.export_onnx(model, tmp_path / f"{size}", external_data=True)

    def export(size: int) -> None:
        """The end of one, where the files are there."""
        with staged(home, False) as scratch:
            for file in (tmp_path / f"{size}").iterdir():
                (scratch / file.name).write_bytes(file.read_bytes())

    export(40)
    counts: Counter[Any] = Counter()
    for _ in range(20):
        kill_after(draw.uniform(0.01, 0.15), lambda: [export(size) for size in (48, 40)])
        runs = OrtModel(home)
        logits = runs(torch.tensor([[1, 2]])).logits
        assert logits.shape[-1] == runs.config.vocab_size
        counts[logits.shape[-1]] += 1
    print(f"20 kills, {counts[40]} old, {counts[48]} new, 0 mixed")


@pytest.mark.slow
def test_twenty_whole_exports_of_a_decoder_killed_at_random_moments(tmp_path: Path) -> None:
    """From the trace to the last file: ten killed at any moment, ten once the first new file is there."""
    home, draw = tmp_path / "m", random.Random(0)
    ids = torch.tensor([[1, 2, 5, 7]])
    models, wanted = {}, {}
    for size in (40, 48):
        models[size] = llama().eval()
        models[size].resize_token_embeddings(size)
        lz.linearize(models[size], options={"window": 4, "sinks": 2, "salient": 4})
        wanted[size] = models[size](ids).logits.detach()

    started = time.monotonic()
    lz.export_onnx(models[40], home)
    whole = time.monotonic() - started
    size = 40
    counts: Counter[str] = Counter()
    for kill in range(20):
        other = 88 - size
        with working(lambda other=other: lz.export_onnx(models[other], home)):
            if kill % 2:
                time.sleep(draw.uniform(0, 1.2 * whole))
            else:
                while not list(home.glob(".linearize*/*.onnx")):
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, 0.1))
        config = json.loads((home / "config.json").read_text())["vocab_size"]
        graph = home / "model.onnx"
        if graph.exists():
            shape = onnx.load(graph).graph.output[0].type.tensor_type.shape
            assert shape.dim[-1].dim_value == config, "a graph beside the configuration of another"
        counts["for others: one export" if graph.exists() else "for others: no graph"] += 1
        runs = OrtModel(home)
        found = runs(ids).logits
        assert runs.config.vocab_size == found.shape[-1]
        torch.testing.assert_close(found, wanted[found.shape[-1]], atol=1e-4, rtol=1e-4)
        counts["old" if found.shape[-1] == size else "new"] += 1
        size = found.shape[-1]
    lz.export_onnx(models[40], home)
    assert not list(home.glob(".linearize*"))
    print(f"20 kills of whole exports, {whole:.1f} s each: {dict(counts)}, 0 mixed")
