"""Shared by every test: one torch thread per worker, and the command line as a user types it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from shared_search import shared


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # Two workers use two cores and no more.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _searching() -> Iterator[list[bool]]:
    """Models that are built alike are searched once per process; see `shared_search`."""
    from linearize.convert import inspect, linearize

    own = [False]  # whether the running test wants searches of its own
    search = linearize.search
    linearize.search = inspect.search = shared(search, lambda: not own[0])
    yield own
    linearize.search = inspect.search = search


@pytest.fixture(autouse=True)
def _own_search(request: pytest.FixtureRequest, _searching: list[bool]) -> Iterator[None]:
    _searching[0] = "monkeypatch" in request.node._fixtureinfo.argnames
    yield
    _searching[0] = False


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    # What earlier files keep, graphs above all, is not looked through again at each collection: the Trainer
    # asks for several in every run, and each would take seconds.
    gc.collect()
    gc.freeze()


@dataclass
class Result:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The entry point of the command line, in this process."""
    from linearize.cli import main

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["linearize", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            main()
        return Result(done.value.code or 0, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with the demo's tokenizer, as someone would have it on disk. Not to be written to."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import linearize as lz

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama") / "model"
    LlamaForCausalLM(config).save_pretrained(path)
    lz.load_demo()[1].save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama, converted, on disk with its tokenizer; weights so large that scores and text vary."""
    from transformers import LlamaForCausalLM

    import linearize as lz

    model = lz.linearize(
        LlamaForCausalLM.from_pretrained(folder), mechanism="augmented_paper", group_size=8, conv_taps=4
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    path = lz.save(model, tmp_path_factory.mktemp("linear") / "model")
    lz.load_demo()[1].save_pretrained(path)
    return path
