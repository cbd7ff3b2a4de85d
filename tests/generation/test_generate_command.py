"""`linearize generate`: the text, what it took, and what it costs in memory beside a KV cache."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import linearize as lz
from linearize.errors import ConfigError
from linearize.generation.run import generate, speculation_of

PROMPT = "import os\nimport sys\n\n\ndef main("
LONG = 65_536


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A smaller decoder without a tokenizer, heads trained for it, and an encoder."""
    root = tmp_path_factory.mktemp("others")
    sizes: dict[str, Any] = dict(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    decoder = LlamaForCausalLM(LlamaConfig(**sizes))
    decoder.save_pretrained(root / "other")
    BertModel(BertConfig(**sizes)).save_pretrained(root / "bert")
    lz.MedusaHeads(decoder).save(root / "heads")
    return {name: root / name for name in ("other", "bert", "heads")}


def continuation(folder: Path, prompt: str = PROMPT, count: int = 20, **options: Any) -> tuple[str, Any]:
    """What transformers' own `generate` makes of it: text, and cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(
        ids, max_new_tokens=count, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **options
    )
    text = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    return text, out.past_key_values


def nbytes(cache: Any) -> int:
    """Bytes of every tensor in a cache's layers."""
    total = 0
    for layer in cache.layers:
        states = getattr(layer, "states", None)
        tensors = [layer.keys, layer.values] if states is None else states.tensors()
        total += sum(tensor.nbytes for tensor in tensors)
    return total


def row(result: Any, name: str) -> list[int]:
    """The numbers of one line of the table."""
    line = next(line for line in result.err.splitlines() if name in line)
    return [int(cell.replace(",", "")) for cell in re.findall(r"[\d,]{2,}", line)]


def lengths(result: Any) -> list[int]:
    return [int(text.replace(",", "")) for text in re.findall(r"at ([\d,]+) tokens", result.err)]


def test_the_text_is_all_of_stdout_and_the_numbers_are_those_of_the_cache(run, converted: Path) -> None:
    result = run("generate", converted, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert result.code == 0, result.err
    wanted, cache = continuation(converted)
    assert result.out == f"{wanted}\n"
    length, long = lengths(result)
    assert long == LONG and re.search(
        rf"20 tokens: [\d.]+ per second, 1.00 per pass; {length - 20} ", result.err
    )
    assert row(result, "this model's state") == [nbytes(cache)] * 2
    per_token = 2 * 2 * 2 * 8 * 4  # key and value, layers, key/value heads, head size, bytes
    assert row(result, "KV cache instead") == [per_token * length, per_token * LONG]


def test_an_unconverted_model_is_told_to_be_one(run, folder: Path) -> None:
    result = run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 20)
    wanted, cache = continuation(folder)
    assert result.code == 0 and result.out == f"{wanted}\n" and "this model's state" not in result.err
    length, _ = lengths(result)
    # The last token is not in the cache: nothing came after it.
    at_length, at_long = row(result, "KV cache (this model is not converted)")
    assert at_length * (length - 1) == nbytes(cache) * length and at_long * length == at_length * LONG


def test_half_precision_halves_the_cache(run, folder: Path) -> None:
    command = ("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 5)
    whole, half = run(*command), run(*command, "--dtype", "bfloat16")
    assert half.code == 0 and [2 * n for n in row(half, "KV cache")] == row(whole, "KV cache")


def test_a_model_with_a_softmax_layer_left_grows_by_that_layer(run, folder: Path, tmp_path: Path) -> None:
    assert run("convert", folder, tmp_path / "hybrid", "--group-size", 8, "--layers", "1").code == 0
    result = run("generate", tmp_path / "hybrid", "--prompt", PROMPT, "--max-new-tokens", 5)
    (now, later), (cache_now, cache_later) = (
        row(result, "this model's state"),
        row(result, "KV cache instead"),
    )
    assert cache_later - cache_now == 2 * (later - now) > 0


def test_the_demo_is_converted_on_the_way(run) -> None:
    result = run("generate", "demo", "--prompt", PROMPT, "--max-new-tokens", 12)
    assert result.code == 0 and "converted now and not tuned" in result.err
    model, tokenizer = lz.load_demo()
    ids = tokenizer(tokenizer.bos_token + PROMPT, return_tensors="pt").input_ids
    out = lz.linearize(model).generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert result.out == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


def test_the_prompt_can_be_a_file(run, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.py").write_text(PROMPT)
    result = run("generate", converted, "--file", tmp_path / "prompt.py", "--max-new-tokens", 20)
    assert result.code == 0 and result.out == continuation(converted)[0] + "\n"


def test_sampling_is_repeated_by_its_seed_alone(run, converted: Path) -> None:
    def sampled(*more: object) -> str:
        result = run("generate", converted, "--prompt", PROMPT, "--max-new-tokens", 12, *more)
        assert result.code == 0, result.err
        return result.out

    hot = ("--temperature", 2.0, "--seed")
    assert sampled(*hot, 1) == sampled(*hot, 1) != sampled(*hot, 2)
    # So few candidates that the likeliest is left alone.
    assert sampled(*hot, 1, "--top-p", 1e-6) == sampled()


def test_text_comes_in_pieces(converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    for speculation in (None, speculation_of("lookup", model)):
        pieces: list[str] = []
        taken = generate(
            model, tokenizer, PROMPT, max_new_tokens=20, speculation=speculation, write=pieces.append
        )
        assert len([piece for piece in pieces if piece]) > 2
        assert "".join(pieces) == continuation(converted)[0]
        assert taken.tokens == 20 and 0 < taken.first < taken.seconds and taken.tokens_per_second > 0


def test_generate_streams_with_drafts_what_it_returns(converted: Path) -> None:
    class Keep:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, streamer = AutoModelForCausalLM.from_pretrained(converted), Keep()
    ids = torch.arange(5, 14)[None]
    speculation = lz.TreeSpeculation(lz.PromptLookup())
    settings = dict(max_new_tokens=15, do_sample=False, pad_token_id=0)
    out = model.generate(ids, speculative=speculation, streamer=streamer, **settings)
    assert streamer.tokens == [*out[0].tolist(), -1]


def drafted(result: Any) -> tuple[float, int]:
    """Tokens per pass, and accepted percent."""
    found = re.search(r"([\d.]+) per pass, (\d+)% of the drafted depth accepted", result.err)
    assert result.code == 0 and found, result.err
    return float(found[1]), int(found[2])


@pytest.mark.parametrize("nodes", [(), ("--nodes", 3)])
def test_every_drafter_leaves_the_text_as_it_is(run, converted: Path, tmp_path: Path, nodes: tuple) -> None:
    wanted = continuation(converted)[0] + "\n"
    base = ("generate", converted, "--prompt", PROMPT, "--max-new-tokens", 20, "--speculative")
    result = run(*base, "lookup", *nodes)
    assert result.out == wanted and drafted(result)[0] >= 1
    # A model that drafts for itself is always right; only the last draft reaches past the end.
    result = run(*base, "draft", "--draft", converted, *nodes)
    assert result.out == wanted and drafted(result)[0] > 3 and drafted(result)[1] > 90
    model = lz.load(converted)
    heads = lz.MedusaHeads(model)
    heads.rates = [[0.5, 0.2], [0.3, 0.1], [0.2, 0.1], [0.1, 0.1]]
    heads.save(tmp_path / "heads")
    result = run(*base, "medusa", "--heads", tmp_path / "heads", *nodes)
    assert result.out == wanted and drafted(result)[0] >= 1
    own = shutil.copytree(converted, tmp_path / "own")
    heads.save(own)
    assert run(base[0], own, *base[2:], "medusa", *nodes).out == wanted
    together = run(base[0], own, *base[2:], "medusa+draft", "--draft", converted, *nodes)
    assert together.out == wanted and drafted(together)[0] > 3


def test_a_model_that_was_not_converted_is_drafted_for_as_well(run, folder: Path) -> None:
    wanted = continuation(folder)[0] + "\n"
    result = run(
        "generate",
        folder,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        20,
        "--speculative",
        "draft",
        "--draft",
        folder,
    )
    assert result.out == wanted and drafted(result) == (4.75, 94)  # 19 tokens in 4 passes


def test_fewer_nodes_draft_less(converted: Path) -> None:
    model = lz.load(converted)
    assert speculation_of("lookup", model, nodes=3).drafter == lz.PromptLookup(depth=3, branches=1)
    assert speculation_of("lookup", model, nodes=19).drafter == lz.PromptLookup(depth=8, branches=2)
    assert speculation_of("draft", model, draft=model, nodes=2).drafter.depth == 2
    with pytest.raises(ConfigError, match="at least one token"):
        speculation_of("lookup", model, nodes=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "--prompt", "x"], "no such folder"),
        (["{folder}"], "either as --prompt TEXT or as --file FILE"),
        (["{folder}", "--prompt", "x", "--file", "{folder}/config.json"], "either as --prompt TEXT or"),
        (["{folder}", "--prompt", ""], "the prompt is empty"),
        (["{folder}", "--file", "/nowhere/x"], "cannot read the prompt"),
        (["{folder}", "--file", "{folder}/model.safetensors"], "cannot read the prompt"),
        (["{folder}", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["{folder}", "--prompt", "x", "--temperature", "-1"], "temperature at least 0"),
        (["{folder}", "--prompt", "x", "--temperature", "1", "--top-p", "1.5"], "at most 1"),
        (["{folder}", "--prompt", "x", "--top-p", "0.5"], "give a temperature"),
        (["{folder}", "--prompt", "x", "--nodes", "4"], "go with --speculative"),
        (
            ["{folder}", "--prompt", "x", "--speculative", "oracle"],
            "unknown drafter 'oracle'; known: medusa",
        ),
        (["{folder}", "--prompt", "x", "--speculative", "draft"], "--draft DIR"),
        (["{folder}", "--prompt", "x", "--speculative", "draft", "--draft", "/nowhere"], "no such folder"),
        (["{folder}", "--prompt", "x", "--speculative", "draft", "--draft", "{other}"], "same tokenizer"),
        (["{folder}", "--prompt", "x", "--speculative", "medusa"], "no heads in {folder}"),
        (
            ["{folder}", "--prompt", "x", "--speculative", "medusa", "--heads", "{heads}"],
            "trained on a model with",
        ),
        (["{folder}", "--prompt", "x", "--dtype", "int8"], "dtype must be one of auto, float32"),
        (["{folder}", "--prompt", "x", "--device", "nowhere"], "cannot run on 'nowhere'"),
        (["{bert}", "--prompt", "x"], "has a BertModel, which cannot continue text"),
        (["{other}", "--prompt", "x"], "cannot load the tokenizer"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
    run, folder: Path, others: dict[str, Path], arguments: list[str], message: str
) -> None:
    places = others | {"folder": folder}
    result = run("generate", *(argument.format(**places) for argument in arguments))
    assert result.code == 1 and message.format(**places) in result.err and not result.out.strip()
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.err


def test_a_tokenizer_of_another_model_is_noticed(run, folder: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size = 10
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    lz.load_demo()[1].save_pretrained(tmp_path / "small")
    result = run("generate", tmp_path / "small", "--prompt", PROMPT)
    assert result.code == 1 and "the model has 10" in result.err
