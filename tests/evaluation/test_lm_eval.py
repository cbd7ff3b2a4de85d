"""lm-evaluation-harness on converted models: through its own interface to transformers, and its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import linearize as lz

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed: pip install 'linearize[eval]'")

TEXT = Path(lz.__file__).read_text()
QUESTIONS = [
    {"question": TEXT[:40], "choices": [" one", " two and more", "\n\n\nclass"], "answer": 0},
    {"question": TEXT[:211], "choices": [TEXT[211:260], " no", " import everything"], "answer": 0},
    {"question": "value", "choices": [" = 1", "(x)", " is there"], "answer": 1},
]
TEXTS = [{"text": TEXT[300:420]}, {"text": TEXT[:33]}, {"text": TEXT[100:500]}]
PROMPTS = [{"prompt": TEXT[:25], "target": "-"}, {"prompt": TEXT[:180], "target": "-"}]
OUTPUTS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "multiple_choice": (
        QUESTIONS,
        {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"},
    ),
    "loglikelihood_rolling": (TEXTS, {"doc_to_text": "", "doc_to_target": "{{text}}"}),
    "generate_until": (PROMPTS, {"doc_to_text": "{{prompt}}", "doc_to_target": "{{target}}"}),
}
MORE: dict[str, dict[str, Any]] = {
    "multiple_choice": {"target_delimiter": "", "metric_list": [{"metric": "acc"}]},
    "loglikelihood_rolling": {"metric_list": [{"metric": "byte_perplexity"}]},
    "generate_until": {
        "generation_kwargs": {"until": ["\u0000"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files as a user writes them: YAML (of which JSON is a part) beside JSON lines."""
    folder = tmp_path_factory.mktemp("tasks")
    for kind, (rows, fields) in OUTPUTS.items():
        data = folder / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        task = {
            "task": f"local_{kind}",
            "dataset_path": "json",
            "dataset_kwargs": source,
            "test_split": "test",
        }
        (folder / f"{kind}.yaml").write_text(
            json.dumps({**task, "output_type": kind, **fields, **MORE[kind]})
        )
    return folder


def harness(model: Any, tokenizer: Any, tasks: Path, batch_size: int) -> dict[str, list[Any]]:
    """What the harness got from the model: for each kind of request, its answers in order."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        wrapped,
        tasks=[f"local_{kind}" for kind in OUTPUTS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    samples = {
        kind: [answer for sample in found["samples"][f"local_{kind}"] for (answer,) in sample["resps"]]
        for kind in OUTPUTS
    }
    return {**samples, "results": found["results"]}


@torch.no_grad()
def log_likelihood(model: Any, context: list[int], text: list[int]) -> float:
    """Of a continuation, run alone."""
    logits = model(torch.tensor([context + text]), use_cache=False).logits[0].log_softmax(-1)
    return -F.nll_loss(logits[len(context) - 1 : -1], torch.tensor(text), reduction="sum").item()


def test_scores_are_the_models_own_at_every_batch_size(converted: Path, tasks: Path) -> None:
    model: Any = lz.load(converted)
    tokenizer = lz.load_demo()[1]
    one, three = (harness(model, tokenizer, tasks, size) for size in (1, 3))

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    choices = [
        log_likelihood(
            model, ids(row["question"]), ids(row["question"] + choice)[len(ids(row["question"])) :]
        )
        for row in QUESTIONS
        for choice in row["choices"]
    ]
    start = [tokenizer.eos_token_id]  # what the harness puts before a text that is scored whole
    whole = [log_likelihood(model, start, ids(row["text"])) for row in TEXTS]
    written = []
    for row in PROMPTS:
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        written.append(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    for found in (one, three):
        assert [answer for answer, _ in found["multiple_choice"]] == pytest.approx(choices, rel=1e-4)
        assert found["loglikelihood_rolling"] == pytest.approx(whole, rel=1e-4)
        assert found["generate_until"] == written
    assert len(set(written)) == 2 and len({round(x, 3) for x in choices}) == len(choices)


def test_its_command_line_reads_a_saved_model(converted: Path, tasks: Path, tmp_path: Path) -> None:
    """`linearize lm-eval` hands all its arguments on, and the harness finds a folder that it can load."""
    kinds = ("multiple_choice", "loglikelihood_rolling")
    arguments = ["--model", "hf", "--model_args", f"pretrained={converted}", "--device", "cpu"]
    arguments += ["--tasks", ",".join(f"local_{kind}" for kind in kinds), "--include_path", str(tasks)]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "linearize",
            "lm-eval",
            "run",
            *arguments,
            "--output_path",
            str(tmp_path / "out"),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("*.json")
    results = json.loads(written.read_text())["results"]
    wanted = harness(lz.load(converted), lz.load_demo()[1], tasks, 2)["results"]
    for task, metric in (("multiple_choice", "acc"), ("loglikelihood_rolling", "byte_perplexity")):
        key = f"{metric},none"
        assert results[f"local_{task}"][key] == pytest.approx(wanted[f"local_{task}"][key], rel=1e-4)
