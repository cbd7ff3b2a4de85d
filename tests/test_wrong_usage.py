"""What a newcomer gets wrong is told in a sentence: what is wrong, what there is, and what was meant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import linearize as lz
from linearize.cli.flags import in_flags
from linearize.errors import LinearizeError

IDS = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))


def tiny() -> Any:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=512)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A model, and the same converted."""
    return tiny(), lz.linearize(tiny())


Use = Callable[[Any, Any], Any]
WRONG: dict[str, tuple[Use, str]] = {
    "a mechanism": (lambda m, c: lz.linearize(m, mechanism="augmentd"), "did you mean 'augmented'"),
    "a setting": (lambda m, c: lz.linearize(m, mecanism="local"), "did you mean 'mechanism'"),
    "an option as a setting": (lambda m, c: lz.linearize(m, window=8), r'options=\{"window": 8\}'),
    "an option": (lambda m, c: lz.linearize(m, options={"windw": 8}), "did you mean 'window'.*known: window"),
    "an option's kind": (lambda m, c: lz.linearize(m, options={"window": "8"}), "must be an int"),
    "options of a layer": (
        lambda m, c: lz.linearize(m, layer_options={0: {"windw": 8}}),
        "layer_options of 0",
    ),
    "a layer's path": (
        lambda m, c: lz.linearize(m, keep_softmax="model.layers.0.self_atn"),
        "did you mean 'model.layers.0.self_attn'",
    ),
    "a layer's number": (lambda m, c: lz.linearize(m, layers=9), "layers names 9.*are 0 to 1"),
    "a number in quotes": (lambda m, c: lz.linearize(m, keep_softmax="0"), "without quotes"),
    "a part to drop": (lambda m, c: lz.linearize(m, approximate="softcapp"), "did you mean 'softcap'"),
    "a policy": (lambda m, c: lz.linearize(m, on_refusal="skip"), "'error' or 'keep'"),
    "a field of a config": (lambda m, c: lz.linearize(m, config={"mechansm": "local"}), "'mechanism'"),
    "a mechanism as a config": (lambda m, c: lz.linearize(m, config="local"), "mechanism='local'"),
    "a mechanism as inputs": (lambda m, c: lz.linearize(m, "local"), "by name, such as mechanism="),
    "a config as inputs": (lambda m, c: lz.linearize(m, {"mechanism": "local"}), "as config="),
    "a name as a model": (lambda m, c: lz.linearize("gpt2"), "load it first"),
    "a class as a model": (lambda m, c: lz.linearize(LlamaForCausalLM), "an object of it"),
    "model and tokenizer": (lambda m, c: lz.linearize((m, None)), "holds one; give that alone"),
    "an input's name": (lambda m, c: lz.linearize(m, {"ids": IDS}), "no argument of its forward.*input_ids"),
    "a name that kwargs swallow": (
        lambda m, c: lz.linearize(m, {"input_ids": IDS, "attention_msk": IDS}),
        "did you mean 'attention_mask'",
    ),
    "texts as inputs": (lambda m, c: lz.linearize(m, ["hello"]), "give token ids: tokenizer"),
    "ids of another tokenizer": (lambda m, c: lz.linearize(m, IDS + 1000), "vocabulary has 64"),
    "ids that are floats": (lambda m, c: lz.linearize(m, IDS.float()), "must be integers"),
    "one sequence": (lambda m, c: lz.linearize(m, IDS[0]), r"\[batch, tokens\], got \[40\]"),
    "calibrate as a flag": (lambda m, c: lz.linearize(m, calibrate=True), "batches are token ids.*bool"),
    "texts to calibrate on": (lambda m, c: lz.calibrate(c, ["hello"]), "tokenizer"),
    "no batches": (lambda m, c: lz.calibrate(c, []), "no batch"),
    "a batch of another tokenizer": (lambda m, c: lz.calibrate(c, IDS + 99), "vocabulary has 64"),
    "no tokens": (lambda m, c: lz.calibrate(c, IDS, max_tokens=0), "max_tokens must be"),
    "a negative ridge": (lambda m, c: lz.calibrate(c, IDS, ridge=-1.0), "ridge must be"),
    "a batch's name": (
        lambda m, c: lz.calibrate(c, {"input_ids": IDS, "attention_maks": IDS}),
        "did you mean 'attention_mask'",
    ),
    "an unconverted model": (lambda m, c: lz.calibrate(m, IDS), "call linearize"),
    "a search": (lambda m, c: lz.plan(m, IDS, budget=1, search="gredy"), "'greedy'"),
    "a divergence": (lambda m, c: lz.plan(m, IDS, max_divergence="a"), "a number above 0"),
    "a length": (lambda m, c: lz.plan(m, IDS, budget=1, lengths="16"), "different ints above 0"),
    "lengths in words": (lambda m, c: lz.evaluate(m, IDS, lengths="16"), "lengths must be"),
    "a number in words": (lambda m, c: lz.evaluate(m, IDS, max_tokens="a"), "max_tokens must be"),
    "a tokenizer's name": (lambda m, c: lz.evaluate(m, ["a"], tokenizer="gpt2"), "AutoTokenizer"),
    "a reference's name": (lambda m, c: lz.evaluate(m, IDS, reference="gpt2"), "loaded"),
    "a config to compare": (lambda m, c: lz.compare(m, IDS, "locl"), "did you mean 'local'"),
    "a test": (lambda m, c: lz.recall(m, lambda text: {}, length=300, tasks="passky"), "passkey"),
    "no folder": (lambda m, c: lz.load(None), "a folder is a path"),
    "a dtype": (lambda m, c: lz.load(str(Path(__file__).parent), dtype="float17"), "floating"),
    "a folder that is no checkpoint": (lambda m, c: lz.load(Path(__file__).parent), "config.json"),
    "no place to save": (lambda m, c: lz.save(c, None), "a folder is a path"),
    "no place to export": (lambda m, c: lz.export_onnx(c, None), "path must be"),
    "a setting of training": (lambda m, c: lz.transfer(c, IDS, epoch=1), "did you mean 'epochs'"),
    "epochs in quotes": (lambda m, c: lz.transfer(c, IDS, epochs="1"), "epochs must be a number"),
    "half a row": (lambda m, c: lz.transfer(c, IDS, batch_size=2.5), "batch_size must be an int"),
    "no data": (lambda m, c: lz.transfer(c, 3), "data must be"),
    "a method": (lambda m, c: lz.tune(c, IDS, method="loar"), "did you mean 'lora'"),
    "a schedule": (lambda m, c: lz.tune(c, IDS, method="full", schedule="cosin"), "did you mean 'cosine'"),
    "a field of LoRA": (lambda m, c: lz.lora_config(c, rank=4), "did you mean 'r'"),
    "a place for metrics": (
        lambda m, c: lz.tune(c, IDS, method="full", report_to="tensorbord"),
        "did you mean 'tensorboard'",
    ),
    "a field of the Trainer": (
        lambda m, c: lz.tune(c, IDS, method="full", trainer_args={"warmup_stepz": 1}),
        "did you mean 'warmup_steps'",
    ),
    "a teacher's name": (
        lambda m, c: lz.tune(c, IDS, method="full", teacher="gpt2", distill_weight=1.0),
        "loaded model",
    ),
    "a recipe": (lambda m, c: lz.distill(m, IDS, recipe="quik"), "did you mean 'quick'"),
    "a model to distill": (lambda m, c: lz.distill("gpt2", IDS), "load it first"),
    "fewer than no tokens": (lambda m, c: lz.distill(m, IDS, tokens=-1), "tokens must be"),
    "which demo": (lambda m, c: lz.load_demo("linear"), "True or False"),
    "a drafter's name": (lambda m, c: c.generate(IDS, speculative="lookup"), "TreeSpeculation"),
    "a speculation's name": (lambda m, c: lz.TreeSpeculation("lookup"), "PromptLookup"),
    "a draft model's name": (lambda m, c: lz.DraftModel("gpt2"), "loaded decoder"),
    "no text for heads": (lambda m, c: lz.train_heads(c, 3), "token ids or texts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_a_sentence_and_nothing_is_done(name: str, models: tuple[Any, Any]) -> None:
    use, message = WRONG[name]
    model, converted = models
    before = [copy.copy(vars(x)) for x in models]
    with pytest.raises(LinearizeError, match=message) as caught:
        use(model, converted)
    said = str(caught.value)
    assert len(said) <= 300 and "\n" not in said, said
    assert [vars(x).keys() for x in models] == [x.keys() for x in before]


def test_one_value_stands_for_several_and_a_tensor_for_batches(models: tuple[Any, Any]) -> None:
    one = lz.linearize(tiny(), layers=1, keep_softmax="model.layers.0")
    assert [site.layer_index for site in one._linearize.plan.sites] == [1]
    _, converted = models
    found = [
        lz.calibrate(copy.deepcopy(converted), batches)
        for batches in (IDS, [IDS], {"input_ids": IDS}, [{"input_ids": IDS.tolist()}], [IDS.tolist()])
    ]
    assert all(other == found[0] for other in found)
    assert lz.plan(models[0], IDS, budget=1, lengths=16).lengths == (16,)
    settings = dict(max_steps=1, context=16, held_out=0.0)
    copies = [copy.deepcopy(converted) for _ in range(3)]
    forms = zip(copies, (IDS, [IDS], list(IDS)), strict=True)
    assert len({lz.transfer(model, data, **settings).after for model, data in forms}) == 1
    rows = lz.compare(models[0], IDS, "local", lengths=16, speed=False).rows
    assert rows[1].config == lz.LinearizeConfig(mechanism="local")


FLAGS = {
    "keep_softmax": "--keep-softmax",
    "approximate": "--approximate",
    "on_refusal": "--on-refusal",
    "options": "--option",
    "mechanism": "--mechanism",
    "layers": "--layers",
    "lengths": "--lengths",
}


@pytest.mark.parametrize(
    ("message", "setting", "said"),
    [
        ("What helps: keep_softmax=(0, 'a.b').", "", "What helps: --keep-softmax 0 --keep-softmax a.b."),
        ('approximate=("bias", "window"), or', "", "--approximate bias --approximate window, or"),
        ("or on_refusal='keep', which", "", "or --on-refusal keep, which"),
        ('a window in options={"window": 64} does', "", "a window in --option window=64 does"),
        ("give more, or shorter lengths=", "", "give more, or shorter --lengths"),
        ("layers names 9, and the layers are", "", "--layers names 9, and the layers are"),
        ("lengths must be 2", "", "--lengths must be 2"),
        ("unknown mechanism 'x'; known: mechanism", "mechanism", "unknown --mechanism 'x'; known: mechanism"),
        ("the mechanism 'local' cannot", "", "the mechanism 'local' cannot"),
        (
            "X is not converted; call linearize(model) first",
            "",
            "X is not converted; `linearize",
        ),
    ],
)
def test_messages_speak_of_the_options_of_the_command_line(message: str, setting: str, said: str) -> None:
    assert in_flags(message, FLAGS, setting).startswith(said)
