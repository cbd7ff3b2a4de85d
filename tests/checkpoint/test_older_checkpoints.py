"""Checkpoints of version 0.1.0 (commit e60cc89) load with the code of today and compute the same."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize as lz

FOLDER = Path(__file__).with_name("written_by_0_1")
MAKE = runpy.run_path(str(FOLDER / "make.py"))
NAMES = ("llama", "llama_softmax_window", "gptj", "module")


def loaded(name: str, folder: Path = FOLDER) -> nn.Module:
    model = MAKE["Tower"]().eval() if name == "module" else None
    return lz.load(folder / name, model=model)


def agrees(model: nn.Module, name: str) -> None:
    """The outputs that were stored with the checkpoint, all of them."""
    expected: dict[str, Tensor] = torch.load(FOLDER / name / MAKE["OUTPUTS"])
    found = MAKE["outputs"](model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_0_1_0_gives_the_outputs_that_it_gave(name: str) -> None:
    agrees(loaded(name), name)


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_saved_anew_and_loaded_again(name: str, tmp_path: Path) -> None:
    lz.save(loaded(name), tmp_path / name)
    agrees(loaded(name, tmp_path), name)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_from_pretrained_reads_it(name: str) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(FOLDER / name, local_files_only=True)
    agrees(model, name)


def test_its_heads_draft_for_it(tmp_path: Path) -> None:
    model: Any = loaded("llama")
    heads = lz.MedusaHeads.load(FOLDER / "heads", model)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    tree = lz.Tree(((0,), (1,), (0, 0)))
    ids = MAKE["ids"]()[:1]
    drafted = model.generate(ids, speculative=lz.TreeSpeculation(lz.Medusa(heads, tree)), **settings)
    assert torch.equal(drafted, model.generate(ids, **settings))


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 300_000
