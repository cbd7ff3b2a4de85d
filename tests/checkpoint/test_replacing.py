"""A checkpoint is replaced in one step, whoever is killed or reads meanwhile, whatever cannot be written."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import kill_after, killed_at, working
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import linearize as lz
from linearize.common import scratch
from linearize.errors import CheckpointError

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def converted(value: float, group_size: int) -> LlamaForCausalLM:
    """Weights and config that tell of each other: old weights under a new config would show."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).eval()
    lz.linearize(model, mechanism="augmented_paper", group_size=group_size)
    with torch.no_grad():
        model.get_parameter(WEIGHT).fill_(value)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, LlamaForCausalLM]:
    return {"old": converted(1.0, 8), "new": converted(2.0, 4)}


def which(model: Any) -> str:
    """Which of the two a loaded model is; "mixed" where its weights and its config disagree."""
    weights = {1.0: "old", 2.0: "new"}[float(model.get_parameter(WEIGHT)[0, 0])]
    record = {8: "old", 4: "new"}[model._linearize.config.group_size]
    return weights if weights == record else "mixed"


class Toy(nn.Module):
    """Attention of a plain module; its weight and the group size tell of each other as well."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        nn.init.constant_(self.qkv.weight, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def toy(value: float, group_size: int) -> nn.Module:
    return lz.linearize(Toy(value), torch.randn(1, 6, 8), mechanism="augmented_paper", group_size=group_size)


@pytest.fixture(scope="module")
def toys() -> tuple[nn.Module, nn.Module]:
    return toy(1.0, 8), toy(2.0, 4)


def which_toy(folder: Path) -> str:
    model: Any = lz.load(folder, model=Toy(0.0))
    weights = {1.0: "old", 2.0: "new"}[float(model.qkv.weight[0, 0])]
    record = {8: "old", 4: "new"}[model._linearize.config.group_size]
    return weights if weights == record else "mixed"


def leftovers(folder: Path) -> list[str]:
    return [path.name for place in (folder, folder.parent) for path in place.glob(f"{scratch.PREFIX}*")]


@pytest.mark.parametrize("shards", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_writer_killed_anywhere_leaves_the_old_checkpoint_or_the_new_one(
    shards: bool, models: dict[str, LlamaForCausalLM], tmp_path: Path
) -> None:
    size = {"max_shard_size": "2KB"} if shards else {}
    seen = []
    for step in range(100):
        target = tmp_path / f"{step}"
        models["old"].save_pretrained(target, **size)
        mine = {target / name: name for name in ("model-best.safetensors", "model.safetensors.bak", "notes")}
        for file, text in mine.items():
            file.write_text(text)
        if not killed_at(step, lambda: models["new"].save_pretrained(target, **size)):  # noqa: B023
            break
        seen.append(which(LlamaForCausalLM.from_pretrained(target, local_files_only=True)))
        if step % 3 == 0:
            assert which(lz.load(target)) == seen[-1]
        models["old"].save_pretrained(target, **size)
        assert not leftovers(target)
        if step % 3 == 1:
            assert which(lz.load(target)) == "old"
        assert all(file.read_text() == text for file, text in mine.items())
    assert len(seen) > 10 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


def test_a_plain_module_is_replaced_in_one_step_as_well(
    toys: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    old, new = toys
    seen = []
    for step in range(100):
        target = tmp_path / f"{step}"
        lz.save(old, target)
        if not killed_at(step, lambda: lz.save(new, target)):  # noqa: B023
            break
        seen.append(which_toy(target))
        if step % 4 == 0:
            lz.save(old, target)
            assert which_toy(target) == "old" and not leftovers(target)
    assert len(seen) > 8 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


def test_a_checkpoint_of_another_kind_is_replaced_too(
    models: dict[str, LlamaForCausalLM], toys: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    lz.save(toys[0], tmp_path / "m")
    lz.save(models["new"], tmp_path / "m")
    assert which(lz.load(tmp_path / "m")) == "new"
    lz.save(toys[0], tmp_path / "m")
    assert which_toy(tmp_path / "m") == "old" and not (tmp_path / "m/config.json").exists()


def test_only_files_that_the_old_index_names_are_removed(
    models: dict[str, LlamaForCausalLM], tmp_path: Path
) -> None:
    target = tmp_path / "m"
    models["old"].save_pretrained(target, max_shard_size="2KB")
    index = json.loads((target / "model.safetensors.index.json").read_text())
    owned = set(index["weight_map"].values())
    other = "model-00001-of-00099.safetensors"  # of no index: someone else's
    (target / other).write_text("mine")
    index["weight_map"]["x"] = "../outside.safetensors"
    index["weight_map"]["y"] = "notes.txt"
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("../outside.safetensors", "notes.txt"):
        (target / name).write_text("mine")
    lz.save(models["new"], target)
    names = {path.name for path in target.iterdir()}
    assert not owned & names and "model.safetensors.index.json" not in names
    assert all(
        (target / name).read_text() == "mine" for name in (other, "../outside.safetensors", "notes.txt")
    )
    assert which(lz.load(target)) == "new"


def test_two_writers_and_a_reader_who_only_sees_whole_checkpoints(
    models: dict[str, LlamaForCausalLM], tmp_path: Path
) -> None:
    target = tmp_path / "m"
    lz.save(models["old"], target)
    problems: list[BaseException] = []

    def write(model: Any) -> None:
        try:
            for _ in range(6):
                lz.save(model, target)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=write, args=(model,)) for model in models.values()]
    for thread in threads:
        thread.start()
    seen = []
    while any(thread.is_alive() for thread in threads):
        seen.append(which(lz.load(target)))
    assert not problems and seen and "mixed" not in seen and not leftovers(target)


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may be larger: to a writer the same as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 500, 4000])
@pytest.mark.parametrize("kind", ["transformers", "pretrained", "module"])
def test_no_room_is_one_error_and_the_old_checkpoint(
    size: int,
    kind: str,
    models: dict[str, LlamaForCausalLM],
    toys: tuple[nn.Module, nn.Module],
    tmp_path: Path,
) -> None:
    target = tmp_path / "m"
    old, new = toys if kind == "module" else (models["old"], models["new"])
    save = (
        (lambda model: model.save_pretrained(target))
        if kind == "pretrained"
        else lambda m: lz.save(m, target)
    )
    save(old)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    if kind == "module" and size == 4000:
        pytest.skip("it is smaller than that")
    with file_limit(size), pytest.raises(CheckpointError, match=r"cannot (save|write).*(large|space)"):
        save(new)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before and not leftovers(target)


def test_it_writes_through_links_and_into_folders_that_can_only_be_written_to(
    models: dict[str, LlamaForCausalLM], tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    for name in ("link", "dangling"):
        for model in models.values():
            lz.save(model, tmp_path / name)
        assert (tmp_path / name).is_symlink() and which(lz.load(tmp_path / name)) == "new"
    if (shm := Path("/dev/shm")).is_dir() and os.access(shm, os.W_OK):
        import tempfile

        with tempfile.TemporaryDirectory(dir=shm) as other:  # another file system
            (tmp_path / "far").symlink_to(other)
            lz.save(models["old"], tmp_path / "far")
            lz.save(models["new"], tmp_path / "far")
            assert which(lz.load(tmp_path / "far")) == "new" and not leftovers(Path(other))
    # Root may read what it likes; then there is nothing to see here but that it works.
    target = tmp_path / "drop"
    target.mkdir()
    target.chmod(0o333)
    lz.save(models["old"], target)
    lz.save(models["new"], target)
    target.chmod(0o755)
    assert which(lz.load(target)) == "new"


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "x/" * 3000, "y\udcff\udcfe", "é ü"])
def test_any_name_is_saved_and_loaded_again_or_one_error(
    name: str, models: dict[str, LlamaForCausalLM], tmp_path: Path
) -> None:
    for act in (lambda: lz.save(models["old"], tmp_path / name), lambda: lz.load(tmp_path / name)):
        try:
            act()
        except lz.LinearizeError as error:
            text = str(error)
            assert len(text) < 600 and "\0" not in text and text.encode("utf-8")
            assert name != "é ü"


def test_pretrained_weights_are_left_out_of_nothing_by_processes_that_do_not_write(
    models: dict[str, LlamaForCausalLM], tmp_path: Path
) -> None:
    models["new"].save_pretrained(tmp_path / "m", is_main_process=False)
    assert not (tmp_path / "m" / "config.json").exists() and not leftovers(tmp_path / "m")
    models["new"].save_pretrained(tmp_path / "m", variant="b")
    assert sorted(path.name for path in (tmp_path / "m").glob("*.safetensors")) == ["model.b.safetensors"]
    models["old"].save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "model.b.safetensors").exists() and which(lz.load(tmp_path / "m")) == "old"


def test_heads_are_replaced_in_one_step_as_well(models: dict[str, LlamaForCausalLM], tmp_path: Path) -> None:
    def heads(count: int) -> lz.MedusaHeads:
        made = lz.MedusaHeads(models["old"], count)
        nn.init.constant_(made.weight, float(count))
        return made

    seen = []
    for step in range(60):
        heads(2).save(tmp_path / f"{step}")
        if not killed_at(step, lambda: heads(3).save(tmp_path / f"{step}")):  # noqa: B023
            break
        found = lz.MedusaHeads.load(tmp_path / f"{step}", models["old"])
        assert float(found.weight[0, 0, 0]) == found.num_heads
        seen.append(found.num_heads)
    assert len(seen) > 8 and seen == sorted(seen) and set(seen) == {2, 3}


KILLS, LOADS = 20, 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["save", "save_pretrained", "shards", "module"])
def test_twenty_writers_killed_at_random_moments(
    kind: str, models: dict[str, LlamaForCausalLM], toys: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    target, draw = tmp_path / "m", random.Random(0)
    writers: dict[str, Any] = {
        "save": lambda name: lz.save(models[name], target),
        "save_pretrained": lambda name: models[name].save_pretrained(target),
        "shards": lambda name: models[name].save_pretrained(target, max_shard_size="6KB"),
        "module": lambda name: lz.save(toys[name == "new"], target),
    }

    def both() -> None:
        for name in ("new", "old"):
            writers[kind](name)

    writers[kind]("old")
    (target / "model-best.safetensors").write_text("mine")
    seen = []
    for _ in range(KILLS):
        kill_after(draw.uniform(0.01, 0.3), both)
        seen.append(which_toy(target) if kind == "module" else which(lz.load(target)))
    writers[kind]("old")
    assert (target / "model-best.safetensors").read_text() == "mine"
    found = ", ".join(f"{seen.count(name)} {name}" for name in ("old", "new", "mixed"))
    print(f"{kind}: {KILLS} kills, {found}")
    assert len(seen) == KILLS and "mixed" not in seen and not leftovers(target)


@pytest.mark.slow
def test_a_hundred_loads_beside_two_writing_processes(
    models: dict[str, LlamaForCausalLM], tmp_path: Path
) -> None:
    target = tmp_path / "m"
    lz.save(models["old"], target)
    with working(lambda: lz.save(models["old"], target)), working(lambda: lz.save(models["new"], target)):
        seen = [which(lz.load(target)) for _ in range(LOADS)]
    lz.save(models["old"], target)
    found = ", ".join(f"{seen.count(name)} {name}" for name in ("old", "new", "mixed"))
    print(f"{LOADS} loads: {found}")
    assert set(seen) == {"old", "new"} and not leftovers(target)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("shards", [False, True])
def test_from_pretrained_notices_a_checkpoint_that_is_replaced_while_it_reads(
    shards: bool, when: str, models: dict[str, LlamaForCausalLM], tmp_path: Path, monkeypatch: Any
) -> None:
    """Its own readers of configs and weights know nothing of us: only the hook stands between them."""
    from linearize.checkpoint import hook

    size = {"max_shard_size": "2KB"} if shards else {}
    models["old"].save_pretrained(tmp_path / "m", **size)
    others, plain = models["new"], hook.replay

    def replay(*arguments: Any) -> None:
        if when == "before":
            others.save_pretrained(tmp_path / "m", **size)
        plain(*arguments)
        if when == "after":
            others.save_pretrained(tmp_path / "m", **size)

    monkeypatch.setattr(hook, "replay", replay)
    with pytest.raises(CheckpointError, match="was replaced while it was read"):
        LlamaForCausalLM.from_pretrained(tmp_path / "m", local_files_only=True)
    monkeypatch.undo()
    assert which(LlamaForCausalLM.from_pretrained(tmp_path / "m", local_files_only=True)) == "new"


@pytest.mark.slow
def test_a_hundred_loads_by_transformers_beside_a_writing_process(
    models: dict[str, LlamaForCausalLM], tmp_path: Path
) -> None:
    target = tmp_path / "m"
    lz.save(models["old"], target)

    def both() -> None:
        for name in ("new", "old"):
            lz.save(models[name], target)
            time.sleep(0.2)  # or no load would be fast enough

    seen = []
    with working(both):
        for _ in range(LOADS):
            try:
                seen.append(which(LlamaForCausalLM.from_pretrained(target, local_files_only=True)))
            except (CheckpointError, OSError, ValueError, RuntimeError) as error:
                seen.append(type(error).__name__)
    print(f"{LOADS} loads by transformers: {dict(Counter(seen))}")
    assert "mixed" not in seen and {"old", "new"} & set(seen)
