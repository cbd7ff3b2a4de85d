"""The shipped demo decoder is what its training record says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from linearize import linearize
from linearize.demo import load as demo
from linearize.evaluation.result import measured
from linearize.planning.state import state_of

Loaded = tuple[LlamaForCausalLM, PreTrainedTokenizerFast]
FOLDER = Path(demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return demo.load_demo()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))


def test_it_is_a_plain_llama_in_float32_and_eval_mode(loaded: Loaded) -> None:
    model, tokenizer = loaded
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(tokenizer) == model.config.vocab_size


def test_each_call_returns_its_own_copy(loaded: Loaded) -> None:
    other, _ = demo.load_demo()
    assert other.model.embed_tokens.weight.data_ptr() != loaded[0].model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("folder", [FOLDER, FOLDER / "linear"])
def test_each_model_is_at_most_8_megabytes(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= 8_000_000


def test_the_training_run_is_recorded_and_was_finished(loaded: Loaded, record: dict[str, Any]) -> None:
    assert record["finished"]
    settings = record["settings"]
    assert record["tokens_seen"] == record["steps"] * settings["batch"] * settings["context"]
    assert record["parameters"] == sum(p.numel() for p in loaded[0].parameters())


@torch.no_grad()
def test_perplexity_on_held_out_source_is_the_recorded_one(loaded: Loaded, record: dict[str, Any]) -> None:
    model, tokenizer = loaded
    ids = tokenizer(tokenizer.bos_token + record["snippet"]["text"], return_tensors="pt").input_ids
    nll = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
    assert math.exp(nll) == pytest.approx(record["snippet"]["perplexity"], rel=1e-3)


@torch.no_grad()
def test_the_linear_decoder_is_the_distilled_one(loaded: Loaded, record: dict[str, Any]) -> None:
    model, tokenizer = demo.load_demo(linear=True)
    assert state_of(model).config.mechanism == "augmented_paper"
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    ids = tokenizer(tokenizer.bos_token + record["snippet"]["text"], return_tensors="pt").input_ids
    losses = [
        float(F.cross_entropy(which(input_ids=ids).logits[0, :-1], ids[0, 1:]))
        for which in (loaded[0], model, linearize(demo.load_demo()[0], mechanism="augmented_paper"))
    ]
    assert losses[0] < losses[1] < losses[0] + 0.5 < losses[2]
    how = demo.linear_record()
    assert how["tokens_of_original"] == record["tokens_seen"] and how["tokens"] <= 0.1 * record["tokens_seen"]


def test_its_card_has_what_was_measured() -> None:
    card = (FOLDER / "linear" / "README.md").read_text(encoding="utf-8")
    model, _ = demo.load_demo(linear=True)
    (found,) = measured(model.bfloat16())
    assert f"{found.at(512).model.perplexity:.2f}" in card and "standard library" in card


def test_any_text_survives_the_tokenizer(loaded: Loaded) -> None:
    _, tokenizer = loaded
    text = "def f(x):\n\treturn 'ä€😀'  # ,  spaces ,\r\n\n\n    pass ."
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_greedy_text_is_deterministic(loaded: Loaded) -> None:
    model, tokenizer = loaded
    prompt = tokenizer("import os\n\nclass ", return_tensors="pt")
    first, second = (model.generate(**prompt, max_new_tokens=24, do_sample=False) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape[1] > prompt.input_ids.shape[1]


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL", tmp_path)
    for linear in (False, True):
        with pytest.raises(FileNotFoundError, match="model.safetensors"):
            demo.load_demo(linear)
