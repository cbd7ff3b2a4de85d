"""The benchmarks' own parts, and that every section of them runs; what they measure is for quiet machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# At the end: benchmarks/passes.py must not be found in the place of anything else.
sys.path.append(str(ROOT / "benchmarks"))

import cpu  # noqa: E402
import generation  # noqa: E402
import gpu  # noqa: E402
import gpu_sections  # noqa: E402
import measured  # noqa: E402
import ort  # noqa: E402
import training  # noqa: E402
from linearize.kernels import naive as oracle  # noqa: E402
from measured import Row  # noqa: E402

TINY = cpu.Sizes(
    lengths=(64, 512),
    plotted=(128,),
    alone=(256,),
    training=(64,),
    contexts=(64,),
    memory=(8192,),
    mechanisms=(64,),
    naive=(64,),
    dims=(64,),
    dtypes=("float32",),
    seconds=0.01,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------- rows and files


def test_a_goal_is_met_missed_or_not_run_and_never_guessed() -> None:
    assert Row("s", "c", "a", "b", 1.0, 4.0, goal=4).verdict == "met"
    assert Row("s", "c", "a", "b", 1.0, 3.99, goal=4).verdict == "MISSED"
    assert Row("s", "c", "a", "b", 1.0, None, goal=4).verdict == "not run"
    assert Row("s", "c", "a", "b", 1.0, 3.0).verdict == ""


def test_the_table_puts_each_goal_beside_its_ratio() -> None:
    rows = [
        Row("forward", "T=1", "ours", "softmax", 0.5, 1.75, goal=3),
        Row("forward", "T=2", "ours", "softmax", 0.5, None, note="not installed"),
        Row("decode", "cache", "ours", "softmax", 2.0, 500.0, goal=300),
    ]
    text = [" ".join(line.split()) for line in measured.table(rows).splitlines()]
    assert "T=1 ours 0.5000 softmax 1.75 3.50x 3x met" in text
    assert "T=2 ours 0.5000 softmax not installed" in text
    assert "cache ours 2.00 softmax 500 250x 300x MISSED" in text
    assert text.index("forward") < text.index("decode")
    assert measured.summary(rows) == "1 of 2 goals met; missed: decode, cache, ours"


def test_a_row_survives_its_json() -> None:
    row = Row("s", "c", "a", "b", 1.0, 4.0, 4.0, "note", {"length": 3})
    assert measured.row_of(json.loads(json.dumps(row.record()))) == row


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "out.json"
    measured.write_json(path, {"a": 1})
    for unwritable in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            measured.write_json(path, unwritable)
    assert json.loads(path.read_text()) == {"a": 1}
    path.parent.joinpath("taken").mkdir()
    with pytest.raises(OSError):
        measured.write_json(path.parent / "taken", {"a": 2})
    whole = Path.write_text

    def full_disk(self: Path, text: str) -> int:
        whole(self, text[:3])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        measured.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert sorted(item.name for item in path.parent.iterdir()) == ["out.json", "taken"]


# ------------------------------------------------------------------------------------------- gpu.py


def test_without_a_gpu_one_sentence_is_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="found no GPU.*--interpret") as end:
        gpu.main([])
    assert str(end.value).count("\n") == 0


@pytest.mark.slow
def test_kernels_are_checked_in_the_interpreter(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    kernels = ["forward", "backward", "backward_split"]
    gpu.main(["--interpret", "--kernels", *kernels, "--dtypes", "bfloat16", "--json", str(path)])
    found = json.loads(path.read_text())
    checks = list(found["checks"].values())
    assert [check["name"] for check in checks] == [f"{kernel}/bfloat16/D64/G64" for kernel in kernels]
    assert [check["failure"] for check in checks] == ["", "", ""]
    assert 1e-4 < checks[0]["errors"]["out"] < 1e-2
    assert found["environment"]["triton"] and found["environment"]["sources"] == measured.sources_hash()


CASES = [
    dict(kernel=kernel, dtype="bfloat16", head_dim=64, group_size=64)
    for kernel in ("forward", "step", "tree")
]


def test_a_kernel_that_takes_its_process_with_it_costs_only_its_own_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward passes, step kills the process, tree is checked in another."""
    started = []

    def workers(arguments: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
        started.append([case["kernel"] for case in arguments["check"]])
        for case in arguments["check"]:
            if case["kernel"] == "step":
                yield {"end": "exit status -11"}
                return
            yield dict(name=gpu._name(case), failure="", errors={})
        yield {"end": ""}

    monkeypatch.setattr(gpu, "workers", workers)
    found = dict(gpu.check(CASES, interpret=False, deadline=float("inf")))
    assert [outcome["failure"] for outcome in found.values()] == [
        "",
        "its process ended: exit status -11",
        "",
    ]
    assert started == [["forward", "step", "tree"], ["tree"]]


def test_what_there_was_no_time_to_check_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "workers", lambda arguments, seconds: iter([{"end": "out of time"}]))
    found = dict(gpu.check(CASES, interpret=False, deadline=0))
    refused = {name: outcome["failure"] for name, outcome in found.items()}
    assert "out of time" in gpu_sections.refusal(("forward",), 64, refused, set(found))
    assert "was not checked" in gpu_sections.refusal(("forward",), 128, refused, set(found))
    assert gpu_sections.refusal(("forward",), 64, {}, {"forward/bfloat16/D64/G64"}) == ""


@pytest.mark.slow  # two processes of their own
def test_a_worker_says_how_it_ended() -> None:
    assert list(gpu.workers(dict(section="none"), 60))[-1]["end"].startswith("exit status")
    assert list(gpu.workers(dict(check=[], interpret=True), 0))[-1] == {"end": "out of time"}


def test_checks_of_other_sources_do_not_count(tmp_path: Path) -> None:
    now = dict(sources="a", device="b", torch="c", triton="d")
    failed, late = dict(failure="wrong"), dict(failure="not checked: out of time")
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(dict(environment=now, checks=dict(one=failed, two=late))))
    assert gpu.earlier_checks(path, now) == dict(one=failed)
    with pytest.raises(SystemExit, match="another sources"):
        gpu.earlier_checks(path, {**now, "sources": "z"})


def test_the_crossover_lies_between_two_lengths() -> None:
    def row(length: int, ratio: float) -> Row:
        details = dict(shape="B8 H32 D128", length=length, call="eager")
        return Row("forward", "", "triton", "SDPA flash", 1.0, ratio, details=details)

    (found,) = gpu.crossovers([row(512, 0.8), row(1024, 1.2), row(256, 0.5)])
    assert found.ours_ms == pytest.approx(768) and found.verdict == "met"
    (found,) = gpu.crossovers([row(512, 1.1), row(1024, 1.2)])
    assert found.ours_ms == 512 and found.verdict == "met"
    (found,) = gpu.crossovers([row(2048, 0.8), row(1024, 1.2)])
    assert found.verdict == "MISSED"


@pytest.mark.parametrize("section", [name for name in gpu.SECTIONS if name != "fla"])
def test_every_section_of_the_gpu_benchmark_runs_dry(section: str) -> None:
    torch.set_num_threads(1)
    rows = list(gpu_sections.SECTIONS[section](gpu_sections.Bench({}, [], dry=True)))
    assert rows and [row.note for row in rows if row.ours_ms is None] == []
    if section not in ("tree", "profile"):
        assert any(row.theirs == "SDPA flash" and row.ratio for row in rows)
        assert set(gpu.SECTIONS) == set(gpu_sections.SECTIONS)


def test_a_kernel_wrong_at_its_size_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sections, "CLOSE", 0.0)
    rows = list(gpu_sections.training(gpu_sections.Bench({}, [], dry=True)))
    assert rows and all(row.ours_ms is None and "dquery is off by 0 at this size" in row.note for row in rows)


def test_a_side_that_would_take_too_long_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sections, "SLOWEST", 1e-6)
    rows = gpu_sections.sequences(gpu_sections.Bench({}, [], dry=True), "training", 1, 2, 64, [], True)
    first, second = (row for row in rows if row.theirs == "SDPA flash")
    assert first.theirs_ms and not first.note
    assert second.ours_ms and second.theirs_ms is None and second.note.startswith("not run: would take")


# ------------------------------------------------------------------------------------------- cpu.py


def test_the_cpu_benchmark_runs_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "FORMS", ("torch",))
    path, picture = tmp_path / "cpu.json", tmp_path / "cost.png"
    sections = [name for name in cpu.SECTIONS if name != "memory"]
    cpu.main(["--json", str(path), "--section", *sections], TINY)
    found = json.loads(path.read_text())
    rows = [measured.row_of(record) for record in found["rows"]]
    assert {row.section for row in rows} == set(sections)
    timed = {row.details["length"]: row for row in rows if row.section == "forward"}
    assert set(timed) == {64, 128, 256, 512} and timed[256].theirs_ms is None
    assert timed[512].goal == 1.3 and timed[512].ratio and timed[64].goal is None
    names = {row.ours for row in rows if row.section == "mechanisms"}
    assert {"augmented_paper", "local", "linformer", "softmax_window"} <= names

    pytest.importorskip("matplotlib")
    cpu.main(["--from", str(path), "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # every figure takes a process of its own
def test_the_cpu_benchmark_measures_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No less than the results, no more than a few times them."""
    monkeypatch.setattr(cpu, "FORMS", ("torch",))
    path = tmp_path / "cpu.json"
    cpu.main(["--json", str(path), "--section", "memory"], TINY)
    rows = [measured.row_of(record) for record in json.loads(path.read_text())["rows"]]
    output = 8192 * cpu.HEADS * 64 * 4
    forward, training = (row.details["peak"] for row in rows)
    assert 0.9 * output < forward < 2 * output
    assert 3.6 * output < training < 8 * output


def test_memory_is_fitted_by_a_line() -> None:
    row = cpu.fit([(1000, 5_000_000), (2000, 7_000_000)], "torch", train=True)
    assert row.details["bytes_per_token"] == pytest.approx(2000)
    assert row.details["constant_bytes"] == pytest.approx(3e6)
    assert row.note == "2000 bytes per token and 3 MB; results alone are 8192 per token"


def test_goals_are_for_heads_of_64_only() -> None:
    assert cpu.named(cpu.FORWARD_GOALS, 2048, 64) == {"torch form": 4.0, "cpu form": 9.0}
    assert cpu.named(cpu.FORWARD_GOALS, 2048, 128) == {}
    assert cpu.named(cpu.FORWARD_GOALS, 1000, 64) == {}


def test_a_side_slower_than_a_second_is_its_first_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = dict(slow=0, fast=0)

    def sample(call: Any, times: int) -> tuple[float, float]:
        calls[call()] += 1
        return (4.0, 4.0) if call() == "slow" else (0.001, 0.5)

    monkeypatch.setattr(cpu, "_sample", sample)
    torch.set_num_threads(1)
    found = cpu.compare(dict(slow=lambda: "slow", fast=lambda: "fast"), 0.01)
    assert calls == dict(slow=1, fast=5)
    assert (found["slow"].ms, found["fast"].ms, found["fast"].runs) == (4000, 1, 3)


# ------------------------------------------------------------------------------------------- generation.py

GENERATION = generation.Sizes(
    tokens=512,
    piece=192,
    checkpoints=(64, 512),
    contexts=(100,),
    models=("demo",),
    nodes=(1, 5),
    budgets=(2,),
    mechanisms=(("augmented_paper", 0),),
    training_tokens=1500,
    epochs=0.2,
    prompts=1,
    new_tokens=8,
    seconds=0.01,
)


def test_the_recurrence_beside_the_long_run_is_the_oracle() -> None:
    torch.manual_seed(0)
    module: Any = generation.attentions(generation.converted(generation.softmax_model("demo")))[0]
    query, key, value = (torch.randn(1, heads, 320, 32) for heads in (8, 4, 4))
    recurrence = generation.Recurrence(module)
    pieces = [recurrence(*(x[:, :, a:b] for x in (query, key, value))) for a, b in ((0, 64), (64, 320))]
    wanted = oracle.augmented_attention(
        query,
        key.repeat_interleave(2, 1),
        value.repeat_interleave(2, 1),
        alpha=module.alpha.detach().expand(8),
        conv_weight=module.conv_weight.detach(),
    )
    torch.testing.assert_close(torch.cat(pieces, 1).detach(), wanted[0], rtol=0, atol=1e-10)


def generated(path: Path, *sections: str) -> dict[str, list[Row]]:
    generation.main(["--json", str(path), "--section", *sections], GENERATION)
    rows = [measured.row_of(record) for record in json.loads(path.read_text())["rows"]]
    return {name: [row for row in rows if row.section == name] for name in sections}


def test_the_generation_benchmark_measures_decoding_and_trees(tmp_path: Path) -> None:
    found = generated(tmp_path / "generation.json", "decode", "trees")
    (decode,) = found["decode"]
    kinds = [kind for kind in decode.details if kind.startswith("softmax")]
    assert len(kinds) == 2 and decode.theirs_ms == min(decode.details[kind] for kind in kinds)
    assert {(row.details["nodes"], row.details["part"]) for row in found["trees"]} == {
        (nodes, part) for nodes in (1, 5) for part in ("whole pass and commit", "attention", "linear layers")
    }


@pytest.mark.slow  # a long sequence, and heads that are trained
def test_the_generation_benchmark_measures_memory_and_speculation(tmp_path: Path) -> None:
    found = generated(tmp_path / "generation.json", "memory", "speculation")
    size, early, late, steps = found["memory"]
    assert size.details["state_bytes"][0] == size.details["state_bytes"][1]
    assert [early.details["tokens"], late.details["tokens"]] == [64, 512]
    assert 0 < max(late.details["output_error"]) < 1e-5 and 0 < max(late.details["state_error"]) < 1e-5
    assert 0 < steps.details["output_error"] < 1e-5 and steps.details["length"] == 512 + 64

    # Two models, each with lookup, heads and both, and the best of those with heads.
    assert [row.details["model"] for row in found["speculation"]] == ["softmax"] * 4 + ["augmented_paper"] * 4
    assert all("heads" in row.details["drafter"] for row in found["speculation"][3::4])
    assert all(row.ratio and "NOT the same" not in row.note for row in found["speculation"])
    assert [row.goal for row in found["speculation"]] == [None] * 7 + [2.0]


@pytest.mark.slow
def test_the_generation_benchmark_compiles_both_sides() -> None:
    torch.set_num_threads(1)
    (row,) = generation.compiled(GENERATION)
    assert row.theirs == "softmax, static cache" and row.ratio


def test_goals_of_decoding_are_for_the_model_with_much_attention() -> None:
    timed = {name: cpu.Timed(ms, ms, 3) for name, ms in (("linear", 2.0), ("a", 40.0), ("b", 30.0))}
    wide, demo = (generation.decode_row("decode", name, 65536, timed) for name in ("wide", "demo"))
    assert (wide.theirs, wide.ratio, wide.goal, wide.verdict) == ("b", 15.0, 15.0, "met")
    assert demo.goal is None


# ------------------------------------------------------------------------------------------- ort.py


@pytest.mark.slow
def test_the_onnxruntime_benchmark_measures_both_exports(tmp_path: Path) -> None:
    path = tmp_path / "onnx.json"
    ort.main(["--json", str(path)], ort.Sizes(prefill=(32,), decode=(16, 32), layers=1, seconds=0.01))
    rows = [measured.row_of(record) for record in json.loads(path.read_text())["rows"]]
    assert {row.section for row in rows} == {"prefill", "decode", "flat"}
    for row in rows:
        assert row.ratio or row.note, row
    timed = {(row.section, row.ours) for row in rows if row.ratio}
    assert {("prefill", "body"), ("decode", "body"), ("flat", "body")} <= timed


# ------------------------------------------------------------------------------------------- training.py


@pytest.mark.slow
def test_the_training_benchmark_measures_time_and_memory_of_a_step(tmp_path: Path) -> None:
    path = tmp_path / "training.json"
    training.main(["--json", str(path)], training.Sizes(models=("demo",), lengths=(1024,), seconds=0.01))
    rows = [measured.row_of(record) for record in json.loads(path.read_text())["rows"]]
    assert [(row.section, row.theirs) for row in rows] == [
        (section, side) for section in ("step", "memory") for side in ("softmax SDPA", "softmax eager")
    ]
    assert all(row.ratio for row in rows[:2]) and rows[0].ours_ms == rows[1].ours_ms
    held = rows[2].details["bytes"]
    # Gradients and AdamW's two moments, in float32, and 8 heads' scores of 4 layers on the eager side.
    parameters = 4 * sum(p.numel() for p in generation.softmax_model("demo").parameters())
    assert 3 * parameters < held["linear"] < 3 * parameters + 400e6
    assert held["softmax eager"] - held["softmax SDPA"] > 4 * 8 * 1024**2 * 4


def test_a_step_is_a_step_of_training() -> None:
    one = training.Step("demo", "linear")
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    assert 0 < one(128) < 20
    still = [name for name, p in one.model.named_parameters() if torch.equal(p, before[name])]
    assert not still
    assert training.Step("demo", "softmax eager").model.config._attn_implementation == "eager"
    assert not training._attentions(training.Step("demo", "softmax SDPA").model)


def test_scores_that_do_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_SHARE", 1e-9)
    assert "do not fit" in training.refusal("demo", "softmax eager", 1024)
    assert training.refusal("demo", "softmax SDPA", 1024) == ""
    monkeypatch.setattr(training, "in_a_process", lambda name, side, length: 1000)
    (sdpa, eager) = training.memory(training.Sizes(models=("demo",), lengths=(128,)))
    assert sdpa.details["bytes"].keys() == {"linear", "softmax SDPA"} and "do not fit" in eager.note
