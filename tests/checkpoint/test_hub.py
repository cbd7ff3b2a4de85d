"""Models on the Hub, without one: what is fetched, what is read, what is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import linearize as lz
from linearize.checkpoint import hub
from linearize.cli.sources import copy_companions, find_source
from linearize.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model on disk."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    return lz.save(lz.linearize(model), tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def asked(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the Hub is asked; it gives the checkpoint to whoever asks."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_name_is_loaded_from_the_hub(asked: list[dict[str, Any]], checkpoint: Path) -> None:
    ids = torch.arange(3, 20)[None]
    found = lz.load("user/repo", revision="v2", token="secret", dtype="float32")
    assert torch.equal(found(ids).logits, lz.load(checkpoint)(ids).logits)
    assert (asked[0]["name"], asked[0]["revision"], asked[0]["token"]) == ("user/repo", "v2", "secret")
    assert lz.load("gpt2").dtype == torch.float32 and asked[1]["name"] == "gpt2"
    assert find_source("user/repo@v2") == checkpoint and asked[2]["revision"] == "v2"
    assert lz.load(checkpoint, device_map="cpu").device.type == "cpu"


@pytest.mark.parametrize("name", ["./out", "/nowhere", "a/b/c", "~/x", "a b", "user/"])
def test_a_path_is_never_asked_of_the_hub(name: str, asked: list[dict[str, Any]]) -> None:
    with pytest.raises(CheckpointError):
        lz.load(name)
    with pytest.raises(CheckpointError):
        find_source(name)
    assert not asked


def test_the_hub_s_arguments_are_not_for_folders(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="for the Hub"):
        lz.load(checkpoint, revision="main")


def test_all_that_belongs_to_a_model_is_fetched_and_its_weights_once(asked: list[dict[str, Any]]) -> None:
    hub.fetch("user/repo")
    files = """config.json tokenizer.json model.safetensors.index.json chat_template.jinja merges.txt
        additional_chat_templates/tools.jinja tokenizer.model vocab.bpe qwen.tiktoken LICENSE
        model-00001-of-00002.safetensors model.safetensors""".split()
    others = """pytorch_model.bin consolidated.safetensors onnx/model.onnx original/params.json tf_model.h5
        model.fp16.safetensors gguf/model.gguf sub/model.safetensors""".split()
    patterns = dict(allow_patterns=asked[0]["allow_patterns"], ignore_patterns=asked[0]["ignore_patterns"])
    kept = huggingface_hub.utils.filter_repo_objects([*files, *others], **patterns)
    assert sorted(kept) == sorted(files)


def test_pickled_weights_come_where_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **options: patterns.append(options["allow_patterns"]) or str(tmp_path),
    )
    assert hub.fetch("user/repo") == tmp_path
    assert "model.safetensors" in patterns[0] and "pytorch_model.bin" in patterns[1]


def test_what_belongs_to_a_model_is_copied_beside_a_converted_one_and_no_weights(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    kept = "tokenizer.json chat_template.jinja additional_chat_templates/a.jinja vocab.bpe x.tiktoken LICENSE"
    left = (
        "config.json model.safetensors consolidated.pth model.gguf pytorch_model.bin x.index.json m.onnx_data"
    )
    for name in (kept + " " + left).split():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    target.mkdir()
    copy_companions(source, target)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == set(kept.split())


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "linearize" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model.config, "auto_map")
assert any("linear_attention" in name for name, _ in model.named_modules())
torch.save(model(torch.arange(3, 20)[None]).logits, sys.argv[2])
"""


def test_a_fresh_process_restores_it_from_the_hub_without_importing_linearize(
    checkpoint: Path, tmp_path: Path
) -> None:
    """The Hub is its cache on disk, as an earlier download would have left it."""
    home = tmp_path / "home"
    repository = home / "hub" / "models--user--repo"
    shutil.copytree(checkpoint, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE"):
        env.pop(name, None)
    out = tmp_path / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", FRESH, "user/repo", str(out)],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(out), lz.load(checkpoint)(torch.arange(3, 20)[None]).logits)


def test_saving_names_the_code_and_leaves_nothing_in_the_model(checkpoint: Path) -> None:
    known = json.loads((checkpoint / "config.json").read_text())["auto_map"]
    assert known["AutoModelForCausalLM"] == "modeling_linearize.LlamaForCausalLM"
    assert (checkpoint / "modeling_linearize.py").is_file()
    assert "auto_map" not in lz.load(checkpoint).config.to_dict()


@pytest.mark.parametrize("theirs", [False, True])
def test_pushing_keeps_a_card_of_others_and_replaces_all_weights(
    theirs: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any = None) -> None:
            pushed["token"] = token

        def create_repo(self, name: str, **options: Any) -> Any:
            return SimpleNamespace(repo_id=f"me/{name}")

        def file_exists(self, name: str, file: str, **options: Any) -> bool:
            return theirs

        def hf_hub_download(self, name: str, file: str, local_dir: Path, **options: Any) -> str:
            (Path(local_dir) / file).write_text("mine")
            return ""

        def upload_folder(self, *, folder_path: Path, **options: Any) -> str:
            shutil.copytree(folder_path, tmp_path / "there")
            pushed.update(options)
            return "url"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = lz.load(checkpoint)
    assert model.push_to_hub("repo", token="secret", tags=["mine"]) == "url"
    assert pushed["token"] == "secret" and pushed["repo_id"] == "me/repo"
    assert "model*.safetensors" in pushed["delete_patterns"]
    card = tmp_path / "there" / "README.md"
    assert not card.exists() if theirs else "- mine" in card.read_text()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(lz.load(tmp_path / "there")(ids).logits, model(ids).logits)
