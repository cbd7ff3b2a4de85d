"""Records from anywhere: what is not one is one clear error, before anything is built, and never accepted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from records import entries
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import linearize as lz
from linearize.checkpoint.checking import class_of
from linearize.checkpoint.hook import relocate
from linearize.checkpoint.replay import check_owners
from linearize.common.files import read_json
from linearize.errors import CheckpointError
from linearize.planning.left_alone import Skipped
from linearize.planning.plan import Plan, SitePlan
from linearize.planning.record import parse
from linearize.planning.schema import PLAN, SITE, SKIPPED, SPEC


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return lz.linearize(LlamaForCausalLM(config).eval(), keep_softmax=(1,))


@pytest.fixture(scope="module")
def folder(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lz.save(llama, tmp_path_factory.mktemp("saved") / "m")


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["linearize"]


@pytest.fixture(scope="module")
def fresh() -> nn.Module:
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    with torch.device("meta"):
        return LlamaForCausalLM(config)


WRONG: tuple[Any, ...] = (
    None, True, False, -1, -(10**12), 10**12, 10**400, 2.5, float("nan"), float("inf"), "", "a",
    "os.system", "../..", "lm_head", "model.layers.0.mlp", "model.layers.9.self_attn", "x\0y", "é" * 5000,
    [], [5],
    ["a"], {}, {"a": 1}, [[]], {"version": 1},
)  # fmt: skip
FREE = ("source", "message")
"""Texts for people; any is one."""


def means_the_same(path: tuple[Any, ...], old: Any, new: Any) -> bool:
    """What an entry may be instead: what is valid, in the words of the documentation of each."""
    name = path[-1] if isinstance(path[-1], str) else path[-2]
    valid: dict[str, Any] = {
        # Settings of other layers than these, and what has no bound in a record.
        "scale": lambda x: x is None or (type(x) in (int, float) and abs(x) <= 1e6),
        "softcap": lambda x: x is None or (type(x) in (int, float) and 0 < x <= 1e6),
        "window": lambda x: x is None and "spec" in path,
        "dropout": lambda x: type(x) in (int, float) and 0 <= x <= 1,
        "local_scale": lambda x: type(x) in (int, float) and abs(x) <= 1e30,
        "augmentation": lambda x: x is None or isinstance(x, bool),
        "compact_masks": lambda x: isinstance(x, bool),
        "causal": lambda x: isinstance(x, bool),
        "cross": lambda x: x is False,
        "tail": lambda x: isinstance(x, bool),
        "layers": lambda x: x is None or x in ([], [5]),
        "keep_softmax": lambda x: x in ([], [5], ["a"]) or isinstance(x, str) or type(x) is int and x >= 0,
        "approximate": lambda x: x == [],
        "terms": lambda x: x == [],
        "options": lambda x: x == {},
        "layer_options": lambda x: x == {},
        "measured": lambda x: True,
        "skipped": lambda x: x == [],
        "path": lambda x: "skipped" in path and isinstance(x, str) and len(x) < 1000 and "\0" not in x,
    }
    if name in FREE:
        return isinstance(new, str) and len(new) < 10_000
    return new == old and type(new) is type(old) or (name in valid and bool(valid[name](new)))


def test_every_entry_of_a_record_with_every_wrong_value_is_refused(
    record: dict[str, Any], fresh: nn.Module
) -> None:
    def accepts(edited: Any) -> bool:
        try:
            plan, _ = parse(edited, "here")
            check_owners(fresh, relocate(plan, fresh, "here"), "here")
        except CheckpointError as error:
            assert len(str(error)) <= 600 and "here" in str(error)
            return False
        return True

    assert accepts(record)
    tries = 0
    wrongly: list[str] = []
    for path in entries(record):
        for value in WRONG:
            edited = copy.deepcopy(record)
            at = edited
            for part in path[:-1]:
                at = at[part]
            old, at[path[-1]] = at[path[-1]], value
            tries += 1
            if accepts(edited) and not means_the_same(path, old, value):
                wrongly.append(f"{path} = {value!r:.40}")
    assert not wrongly, wrongly[:20]
    assert tries > 1500
    print(f"{tries} edited records, none accepted")


def test_an_entry_too_many_or_too_few_is_refused_where_it_matters(record: dict[str, Any]) -> None:
    objects = [path for path in [(), *entries(record)] if isinstance(_at(record, path), dict)]
    for path in objects:
        edited = copy.deepcopy(record)
        _at(edited, path)["surprise"] = 1
        with pytest.raises(CheckpointError, match="surprise"):
            parse(edited, "here")
    for path in [("plan",), ("config",), ("plan", "sites"), ("plan", "sites", 0, "spec"), ("version",)]:
        edited = copy.deepcopy(record)
        del _at(edited, path[:-1])[path[-1]]
        with pytest.raises(CheckpointError):
            parse(edited, "here")


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        data = data[part]
    return data


def test_the_schema_has_a_rule_for_every_field() -> None:
    import dataclasses

    from linearize.mechanisms.spec import SiteSpec

    for kind, rules in ((Plan, PLAN), (SitePlan, SITE), (SiteSpec, SPEC), (Skipped, SKIPPED)):
        assert {field.name for field in dataclasses.fields(kind)} <= set(rules)


def test_sites_twice_or_out_of_order_are_refused(record: dict[str, Any], fresh: nn.Module) -> None:
    def sites(edit: Any) -> Any:
        edited = copy.deepcopy(record)
        edit(edited["plan"]["sites"])
        return edited

    def swap(found: Any) -> None:
        found[0]["path"], found[1]["path"] = found[1]["path"], found[0]["path"]

    for edit in (
        lambda found: found.append(found[0]),
        lambda found: found[0].update(slot=1),
        lambda found: found[0].update(path=found[1]["path"]),
        lambda found: found[0].update(layer_index=2),
        swap,
    ):
        with pytest.raises(CheckpointError):
            plan, _ = parse(sites(edit), "here")
            check_owners(fresh, plan, "here")


@pytest.mark.parametrize(
    "name", [[5], ["pipeline"], ["os"], [None], "LlamaForCausalLM", {}, 5, ["AutoModel"], ["x\0"], []]
)
def test_only_a_class_of_model_is_one(name: Any, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": name}))
    with pytest.raises(CheckpointError):
        class_of(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"a": ' * 50_000, "\x00", "[1]", "null", "{'a': 1}"]
)
def test_text_that_is_no_config_is_an_error_that_names_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json"):
        lz.load(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"config.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "target",
    [
        "../model.safetensors",
        "/etc/passwd",
        "model.safetensors.index.json",
        "a/../../b",
        "",
        "C:\\x",
        5,
        None,
    ],
)
def test_an_index_names_files_inside_the_folder(target: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": target}}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        lz.load(tmp_path)
    from linearize.checkpoint.weight_files import read

    with pytest.raises(CheckpointError, match=r"index\.json"):
        list(read(tmp_path))


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/model.safetensors", 5, "", "a.index.json"])
def test_a_config_names_weights_inside_the_folder(name: Any, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    inner = tmp_path / "in"
    inner.mkdir()
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (inner / "a.index.json").write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    (inner / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    with pytest.raises(CheckpointError):
        lz.load(inner)


HTML = "x<script>alert(1)</script>\n# title [a](javascript:b) `c` | d"


def test_nothing_of_a_record_is_html_or_markdown_in_a_card(folder: Path, tmp_path: Path) -> None:
    model = lz.load(folder)
    weights = lz.evaluation.result.fingerprint(model)
    row = {"length": 4, "tokens": 3, "model": {"perplexity": 2.0}, "reference": {"perplexity": 1.0}}
    record = dict(
        version=1, kind="decoder", name=HTML, model=HTML, reference=HTML, setting=HTML, weights=weights
    )
    config = json.loads((folder / "config.json").read_text())
    config["linearize"]["plan"]["skipped"][0]["path"] = HTML.replace("\n", " ")
    config["linearize"]["measured"] = [
        {**record, "rows": [row]},
        {**record, "rows": [{**row, "tokens": "many"}]},
        {**record, "rows": [{**row, "model": {"perplexity": "low"}}]},
        {**record, "rows": 5},
        {"version": 1, "kind": "parts", "name": HTML, "rows": [], "lengths": ["x"], "tokens": None},
    ]
    for name in ("model.safetensors", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    lz.load(tmp_path).save_pretrained(tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "<script" not in card and "&lt;script" in card
    assert not [line for line in card.splitlines() if line.startswith("# title")]
    assert "[a](" not in card and "`c`" not in card and "| d" not in card.replace("\\| d", "")


def test_weights_that_are_no_numbers_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "linear_attention" in name)
    for wrong in (float("nan"), float("inf")):
        edited = {key: tensor.clone() for key, tensor in tensors.items()}
        edited[name].view(-1)[0] = wrong
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        save_file(edited, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match="finite"):
            lz.load(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_damaged_archives_are_errors_that_name_the_file(kind: str, tmp_path: Path) -> None:
    import random

    from safetensors.torch import save_file

    from linearize.checkpoint.weight_files import read

    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2, dtype=torch.int64)}
    file = tmp_path / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    if kind == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=kind == "zip")
    whole, draw = file.read_bytes(), random.Random(0)
    head = min(len(whole), 400)
    errors = 0
    for _ in range(170):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(head)] = draw.randrange(256)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        file.write_bytes(data)
        try:
            for found in read(file):
                assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())
        except CheckpointError as error:
            errors += 1
            assert file.name in str(error) and len(str(error)) < 700
    print(f"170 damaged files ({kind}): {errors} refused, the others are archives still")
    assert errors > 60


def test_every_entry_of_a_record_of_heads_with_every_wrong_value_is_refused(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    heads = lz.MedusaHeads(llama, 2)
    heads.rates = [[0.5, 0.2], [0.25, 0.1]]
    heads.save(tmp_path)
    file = tmp_path / "medusa_heads.json"
    record = json.loads(file.read_text())
    for path in entries(record):
        for value in WRONG:
            edited = copy.deepcopy(record)
            _at(edited, path[:-1])[path[-1]] = value
            file.write_text(json.dumps(edited))
            old = _at(record, path)
            if (value == old and type(value) is type(old)) or path == ("rates",) and value is None:
                continue
            try:
                found = lz.MedusaHeads.load(tmp_path, llama)
            except lz.LinearizeError as error:
                assert len(str(error)) <= 600
            else:
                rates = path[0] == "rates" and found.rates is not None
                assert rates and all(
                    type(x) in (int, float) and 0 <= x <= 1 for row in found.rates for x in row
                )


@pytest.mark.parametrize("content", (b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000))
def test_a_damaged_generation_config_is_said(content: bytes, folder: Path, tmp_path: Path) -> None:
    """transformers goes on without it, and so with other ends of a text."""
    import shutil

    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="generation_config"):
        lz.load(tmp_path / "m")
