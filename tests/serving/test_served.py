"""Converted models on vLLM give the tokens of their own `generate`. Run by `./run test-serving`."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="./run test-serving has an environment with vLLM")

import linearize as lz
from linearize import mechanisms
from serving.cases import NEW, Case, case_of, tiny, trained

pytestmark = pytest.mark.timeout(300)

LENGTHS = [3, 50, 1, 17, 90, 31]
OPTIONS = {"window": 8, "sinks": 2, "salient": 4, "features": 16}


def options_of(name: str) -> dict[str, Any]:
    return {key: value for key, value in OPTIONS.items() if key in mechanisms.get(name).options}


def converted(name: str, seed: int = 0, layers: dict[str, Any] | None = None, **more: Any) -> Any:
    config = lz.LinearizeConfig(mechanism=name, options=options_of(name), group_size=8, **more)
    return trained(lz.linearize(tiny(seed, **(layers or {})), config=config))


MODELS: dict[str, Callable[[], Any]] = {
    **{
        name: lambda name=name: converted(name)
        for name in mechanisms.available()
        if name not in ("softmax", "linformer")
    },
    "mean": lambda: trained(
        lz.linearize(
            tiny(), config=lz.LinearizeConfig(mechanism="augmented_paper", options={"grouped": "mean"})
        )
    ),
    "sizes": lambda: converted("augmented", layer_options={1: {"window": 20, "salient": 9}}),
    "hybrid": lambda: converted("augmented", keep_softmax=(1,), layers={"num_hidden_layers": 4}),
    "hybrid_window": lambda: converted(
        "softmax_window", keep_softmax=(0, 2), layers={"num_hidden_layers": 3}
    ),
}


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


def tokens_of(llm: Any, prompts: list[list[int]], count: int = NEW) -> list[list[int]]:
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": x} for x in prompts], greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_generate(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    with engine(case.folder) as llm:
        assert tokens_of(llm, case.prompts) == case.wanted
