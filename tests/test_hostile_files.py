"""Files that were damaged or edited on the way: each is a LinearizeError or is still one, nothing else.

Three of ten are cut short, three have other bits, four are JSON with another value somewhere.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import llama
from records import entries
from tiny_gguf import tiny_gguf

import linearize as lz

pytestmark = pytest.mark.slow

TRIES = 400
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**12, 10**400, 2.5, float("nan"), "", "x\0y", "é" * 5000, "../..", "os.system",
    [], [5], ["a"], {}, {"a": 1}, [[]], {"version": 1},
)  # fmt: skip


def edited(file: Path, draw: random.Random) -> str:
    """Put another value into a file of JSON; where and which."""
    data = json.loads(file.read_text())
    path, value = draw.choice(list(entries(data))), draw.choice(VALUES)
    at = data
    for part in path[:-1]:
        at = at[part]
    at[path[-1]] = value
    file.write_text(json.dumps(data))
    return f"{file.name} {path} = {value!r:.40}"


def damaged(file: Path, draw: random.Random) -> str:
    """Cut a file short or turn some of its bits, most of them near its head; what was done."""
    data = bytearray(file.read_bytes())
    if draw.random() < 0.5:
        end = draw.randrange(len(data))
        file.write_bytes(data[:end])
        return f"{file.name} cut at {end} of {len(data)}"
    near = min(len(data), draw.choice((64, 2000, 10**9)))
    bits = [draw.randrange(near * 8) for _ in range(draw.randint(1, 4))]
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    return f"{file.name} bits {bits}"


def survey(whole: Path, load: Callable[[Path], Any], tmp_path: Path, tries: int = TRIES) -> Counter[str]:
    """Load a folder whose files were damaged, many times."""
    draw, counts, wrong = random.Random(0), Counter[str](), []
    for number in range(tries):
        folder = tmp_path / f"{number}"
        shutil.copytree(whole, folder)
        files = sorted(file for file in folder.iterdir() if file.stat().st_size)
        jsons = [file for file in files if file.suffix == ".json"]
        if jsons and draw.random() < 0.4:
            one = edited(draw.choice(jsons), draw)
        else:
            one = damaged(draw.choice(files), draw)
        try:
            load(folder)
            counts["loaded"] += 1
        except lz.LinearizeError as error:
            counts["refused"] += 1
            if len(str(error)) > 700:
                wrong.append(f"{one}: {len(str(error))} characters")
        except Exception as error:
            wrong.append(f"{one}: {type(error).__name__}: {str(error):.150}")
        shutil.rmtree(folder)
    print(f"{tries} damaged, {dict(counts)}, {len(wrong)} other errors")
    assert not wrong, "\n".join(wrong[:40])
    return counts


@pytest.fixture(scope="module")
def model() -> Any:
    return lz.linearize(llama(), options={"window": 4, "sinks": 2, "salient": 4})


def test_checkpoints(model: Any, tmp_path: Path) -> None:
    lz.save(model, tmp_path / "whole")
    survey(tmp_path / "whole", lz.load, tmp_path)


def test_sharded_checkpoints(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    survey(tmp_path / "whole", lz.load, tmp_path)


def test_exported_folders(tmp_path: Path) -> None:
    from linearize.onnx import OrtModel

    model = lz.linearize(llama(num_hidden_layers=1), mechanism="softmax_window", options={"window": 4})
    lz.export_onnx(model, tmp_path / "whole", external_data=True)
    ids = torch.tensor([[1, 5, 7]])
    survey(tmp_path / "whole", lambda folder: OrtModel(folder)(ids), tmp_path, 150)


def test_heads(model: Any, tmp_path: Path) -> None:
    lz.MedusaHeads(model, 2).save(tmp_path / "whole")
    survey(tmp_path / "whole", lambda folder: lz.MedusaHeads.load(folder, model), tmp_path)


def test_gguf_files(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "whole").mkdir()
    tiny_gguf(tmp_path / "whole/tiny.gguf")
    survey(tmp_path / "whole", lambda folder: lz.load_gguf(folder / "tiny.gguf"), tmp_path)
