"""GGUF files: read as ordinary models, converted, saved and loaded, from Python and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_gguf import WIDTH, WORDS, original, tiny_gguf
from transformers import AutoModelForCausalLM

import linearize as lz
from linearize.errors import CheckpointError, InvalidModelError, MissingExtraError

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_it_is_the_model_that_was_written_and_converts_saves_and_loads(file: Path, tmp_path: Path) -> None:
    ids = torch.arange(3, 23)[None]
    model, tokenizer = lz.load_gguf(file.parent)
    assert tokenizer("the").input_ids[-1] == WORDS.index("the")
    expected = original()(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)
    lz.linearize(model, mechanism="augmented")
    torch.testing.assert_close(model(ids).logits, expected)  # all of it fits into the window
    lz.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for loaded in (lz.load(tmp_path / "ours"), AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")):
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_what_transformers_reads_itself_is_refused_until_three_lines_have_mended_it(file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with pytest.raises(InvalidModelError, match="load_gguf") as refused:
        lz.linearize(model)
    lines = [line.strip() for line in str(refused.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    exec("\n".join(lines), {"model": model})
    lz.linearize(model)


def test_inspect_and_convert_take_a_file(run, file: Path, tmp_path: Path) -> None:
    shown = run("inspect", file)
    assert shown.code == 0 and "self_attn" in shown.out
    done = run("convert", file, tmp_path / "out")
    assert done.code == 0, done.err
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert lz.load(tmp_path / "out").config.hidden_size == WIDTH


def test_what_is_no_gguf_file_says_so(
    run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        lz.load_gguf(tmp_path / "missing.gguf")
    with pytest.raises(CheckpointError, match="holds none"):
        lz.load_gguf(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + file.read_bytes()[4:200])
    with pytest.raises(CheckpointError, match="cannot read"):
        lz.load_gguf(tmp_path / "broken.gguf")
    assert "no such file" in run("inspect", tmp_path / "missing.gguf").err
    monkeypatch.setattr("linearize.checkpoint.gguf.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"linearize\[gguf\]"):
        lz.load_gguf(file)
