"""Converted models on vLLM give the tokens of their own `generate`. Run by `./run test-serving`."""

from __future__ import annotations

import contextlib
import gc
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="./run test-serving has an environment with vLLM")

from transformers import BloomConfig, BloomForCausalLM

import linearize as lz
from linearize import mechanisms
from serving.cases import NEW, Case, case_of, tiny, trained

pytestmark = pytest.mark.timeout(300)

LENGTHS = [3, 50, 1, 17, 90, 31]
OPTIONS = {"window": 8, "sinks": 2, "salient": 4, "features": 16}


STATELESS = ("softmax", "linformer")


def converted(name: str, layers: dict[str, Any] | None = None, grouped: str = "", **more: Any) -> Any:
    known = mechanisms.get(name).options
    options = {key: value for key, value in OPTIONS.items() if key in known}
    options |= {"grouped": grouped} if grouped else {}
    more = {"conv_taps": 4, **more}
    config = lz.LinearizeConfig(mechanism=name, options=options, group_size=8, **more)
    return trained(lz.linearize(tiny(**(layers or {})), config=config))


MODELS: dict[str, Callable[[], Any]] = {
    **{name: partial(converted, name) for name in mechanisms.available() if name not in STATELESS},
    "mean": partial(converted, "augmented_paper", grouped="mean"),
    "long_convolution": partial(converted, "augmented", conv_taps=20),
    "sizes": partial(converted, "augmented", layer_options={1: {"window": 20, "salient": 9}}),
    "hybrid": partial(converted, "augmented", {"num_hidden_layers": 4}, keep_softmax=(1,)),
    "hybrid_window": partial(converted, "softmax_window", {"num_hidden_layers": 3}, keep_softmax=(0,)),
}


@pytest.fixture(autouse=True, scope="session")
def _before_any_engine(many: Case, softmax: Path, refused: dict[str, Path], smollm2: Case | None) -> None:
    """All that transformers' classes are needed for."""


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: case_of(make(), tmp_path_factory.mktemp(name), LENGTHS) for name, make in MODELS.items()}


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    settings = dict(
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=23,  # no prompt fits with the others, and no piece is a whole block
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=2**26,
        disable_log_stats=True,
    )
    llm = LLM(model=str(folder), **{**settings, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.unfreeze()
        cleanup_dist_env_and_memory()


def greedy(count: int, **more: Any) -> Any:
    from vllm import SamplingParams

    options: dict[str, Any] = dict(temperature=0, ignore_eos=True, detokenize=False, **more)
    return SamplingParams(max_tokens=count, min_tokens=count, **options)


def tokens_of(llm: Any, prompts: list[list[int]], count: int = NEW) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": x} for x in prompts], greedy(count), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_generate(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    with engine(case.folder) as llm:
        assert tokens_of(llm, case.prompts) == case.wanted


@pytest.fixture(scope="session")
def many(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> Case:
    source = random.Random(0)
    lengths = [source.randint(1, 70) for _ in range(40)]
    return case_of(converted("augmented"), tmp_path_factory.mktemp("many"), lengths, count=40)


def run(llm: Any, todo: list[tuple[list[int], int]], seed: int, aborted: int = 0) -> dict[int, list[int]]:
    """Requests, each a prompt and a number of tokens, that arrive while others run; some are aborted."""
    source, waiting, done = random.Random(seed), list(range(len(todo))), dict[int, list[int]]()
    source.shuffle(waiting)
    leaving = set(source.sample(waiting, aborted))
    engine = llm.llm_engine
    while waiting or engine.has_unfinished_requests():
        for _ in range(min(len(waiting), source.randint(0, 4))):
            number = waiting.pop()
            prompt, count = todo[number]
            engine.add_request(str(number), {"prompt_token_ids": prompt}, greedy(count))
        for output in engine.step():
            number = int(output.request_id)
            if number in leaving and len(output.outputs[0].token_ids) > 1:
                engine.abort_request([output.request_id])
            elif output.finished:
                done[number] = list(output.outputs[0].token_ids)
    return done


def test_two_hundred_requests_in_random_order_and_some_are_aborted(many: Case) -> None:
    source = random.Random(1)
    which = [source.randrange(len(many.prompts)) for _ in range(200)]
    counts = [source.randint(2, 40) for _ in which]
    todo = [(many.prompts[i], count) for i, count in zip(which, counts, strict=True)]
    with engine(many.folder, max_num_seqs=9, max_num_batched_tokens=61) as llm:
        found = run(llm, todo, seed=2, aborted=20)
    assert len(found) >= 180
    for number, tokens in found.items():
        assert tokens == many.wanted[which[number]][: counts[number]], number


def test_a_request_that_was_preempted_goes_on_where_it_was(cases: dict[str, Case]) -> None:
    case, preempted = cases["hybrid"], 0
    todo = [(prompt, NEW) for prompt in case.prompts]
    with engine(case.folder, num_gpu_blocks_override=9, max_model_len=160) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        step = llm.llm_engine.step
        requests = llm.llm_engine
        for number, (prompt, count) in enumerate(todo):
            requests.add_request(str(number), {"prompt_token_ids": prompt}, greedy(count))
        found = {}
        while requests.has_unfinished_requests():
            outputs = step()
            preempted = max([preempted, *(x.num_preemptions for x in scheduler.requests.values())])
            found |= {int(x.request_id): list(x.outputs[0].token_ids) for x in outputs if x.finished}
    assert preempted
    assert [found[number] for number in range(len(todo))] == case.wanted


def test_log_probabilities_are_those_of_the_model(cases: dict[str, Case]) -> None:
    for name in ("augmented", "augmented_paper", "hybrid"):
        case = cases[name]
        with engine(case.folder) as llm:
            outputs = llm.generate(
                [{"prompt_token_ids": x} for x in case.prompts], greedy(NEW, logprobs=3), use_tqdm=False
            )
        for output, expected in zip(outputs, case.scores, strict=True):
            (answer,) = output.outputs
            for found, row in zip(answer.logprobs, expected, strict=True):
                for token, one in found.items():
                    assert abs(one.logprob - float(row[token])) < 1e-3


def test_a_lost_state_does_not_go_unseen(cases: dict[str, Case]) -> None:
    """The control: were the states not read at all, the comparisons of this file would not pass."""
    case = cases["augmented"]
    with engine(case.folder) as llm:
        llm.llm_engine.add_request("0", {"prompt_token_ids": case.prompts[1]}, greedy(NEW))
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        found, steps = list[int](), 0
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                found = list(output.outputs[0].token_ids)
            steps += 1
            if steps == 10:
                for layer in layers.values():
                    layer.kv_cache[0].zero_()
    assert found[:5] == case.wanted[1][:5]
    assert found != case.wanted[1]


def concurrency(folder: Path, length: int) -> float:
    """Sequences of so many tokens that 64 MiB hold."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    with engine(folder, max_model_len=length, max_num_batched_tokens=256) as llm:
        core = llm.llm_engine.engine_core.engine_core
        return get_max_concurrency_for_kv_cache_config(core.vllm_config, core.scheduler.kv_cache_config)


def test_a_sequence_takes_the_same_memory_at_any_length(cases: dict[str, Case], softmax: Path) -> None:
    short, long = (concurrency(cases["augmented"].folder, length) for length in (1024, 65536))
    assert short == long
    few, fewer = (concurrency(softmax, length) for length in (1024, 16384))
    assert fewer == pytest.approx(few / 16, rel=0.05)
    assert long > 10 * few


def test_what_softmax_has_no_blocks_for_runs(cases: dict[str, Case], softmax: Path) -> None:
    options: dict[str, Any] = dict(max_model_len=65536, kv_cache_memory_bytes=2**22)
    with pytest.raises(ValueError, match="KV cache"), engine(softmax, **options):
        pass
    case = cases["augmented"]
    with engine(case.folder, **options) as llm:
        assert tokens_of(llm, case.prompts) == case.wanted


@pytest.fixture(scope="session")
def softmax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("softmax")
    tiny().save_pretrained(folder)
    return folder


def test_a_model_that_was_not_converted_is_served_as_ever(cases: dict[str, Case], softmax: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    made = EngineArgs(model=str(softmax), skip_tokenizer_init=True, max_model_len=128).create_engine_config()
    assert made.model_config.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"enable_prefix_caching": True}, "prefix caching is not served"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"enable_lora": True}, "LoRA adapters are not served"),
    ],
    ids=["prefix", "speculation", "lora"],
)
def test_what_is_not_exact_is_refused(cases: dict[str, Case], options: dict[str, Any], reason: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    folder = str(cases["augmented"].folder)
    with pytest.raises(Exception, match=reason) as error:
        EngineArgs(
            model=folder, skip_tokenizer_init=True, max_model_len=128, **options
        ).create_engine_config()
    assert len(str(error.value).split("[type=")[0]) < 600


def test_models_that_have_no_place_there_are_refused(refused: dict[str, Path]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    for reason, folder in refused.items():
        with pytest.raises(Exception, match=reason):
            EngineArgs(model=str(folder), skip_tokenizer_init=True, max_model_len=64).create_engine_config()


@pytest.fixture(scope="session")
def refused(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    graph = BloomForCausalLM(BloomConfig(vocab_size=96, hidden_size=64, n_layer=1, n_head=2)).eval()
    found = {
        "on its own graph": lz.linearize(graph, mechanism="augmented", approximate=("alibi",)),
        "no state of constant size": lz.linearize(tiny(), mechanism="softmax"),
    }
    folders = {reason: tmp_path_factory.mktemp("refused") for reason in found}
    for reason, model in found.items():
        model.save_pretrained(folders[reason])
    return folders


@pytest.mark.parametrize("name", ["augmented", "hybrid"])
def test_two_processes_share_the_heads(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    with engine(case.folder, tensor_parallel_size=2) as llm:
        assert tokens_of(llm, case.prompts, 20) == [tokens[:20] for tokens in case.wanted]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Case | None:
    from linearize.checkpoint.gguf import load_gguf
    from linearize.demo.language_model import weights

    file = weights()
    if file is None:
        return None
    model, _ = load_gguf(file)
    return case_of(lz.linearize(model.float().eval()), tmp_path_factory.mktemp("smollm2"), [400, 20, 7], 40)


def test_a_pretrained_model(smollm2: Case | None) -> None:
    if smollm2 is None:
        pytest.skip("the weights of SmolLM2 are not installed")
    options: dict[str, Any] = dict(max_model_len=512, kv_cache_memory_bytes=2**28, max_num_batched_tokens=97)
    with engine(smollm2.folder, **options) as llm:
        assert tokens_of(llm, smollm2.prompts, 40) == smollm2.wanted
