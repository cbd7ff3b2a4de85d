"""Small models of other families for `quality.py`, trained here on the source of the standard library.

    python benchmarks/small_models.py [--out build/small_models]

trains what is missing, a few minutes each: `llama-small` (a decoder of 0.9 million parameters), `gpt2`
(learned positions, fused projections, LayerNorm) and `t5` (encoder, decoder, cross-attention, relative
biases), all with the demo model's tokenizer, on the files that the demo model was trained on. What is left
out of training is the same 5 % of the files.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measured import ROOT
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import linearize as lz

sys.path.append(str(ROOT / "examples"))
from train_demo import encode, is_validation, read_sources  # noqa: E402

OUT = ROOT / "build" / "small_models"
CONTEXT = 512
SENTINELS = 32
SPANS, SPAN = 12, 4
"""Of a T5 example: spans of tokens that are hidden, and their length."""


@dataclass(frozen=True)
class Small:
    """How one model is made. steps of `batch` sequences of `context` tokens; its loss on `Batch`."""

    build: Callable[[int], Any]
    steps: int
    learning_rate: float
    context: int = CONTEXT
    batch: int = 4


def llama(vocab: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
    )


def gpt2(vocab: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_embd=192,
            n_layer=4,
            n_head=6,
            n_positions=1024,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def t5(vocab: int) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocab + SENTINELS,
            d_model=192,
            d_kv=32,
            d_ff=384,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=6,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=1,
            pad_token_id=1,
            eos_token_id=0,
        )
    )


MODELS = {
    "llama-small": Small(llama, 900, 3e-3),
    "gpt2": Small(gpt2, 700, 2e-3),
    "t5": Small(t5, 900, 2e-3, context=256, batch=8),
}


def text() -> tuple[Tensor, Tensor]:
    """Token ids of the training and of the held-out files, int64 [N] each."""
    _, tokenizer = lz.load_demo()
    sources = read_sources(Path(sysconfig.get_path("stdlib")))
    sides = [
        [body for name, body in sources.items() if is_validation(name) == side] for side in (False, True)
    ]
    train, held_out = (encode(tokenizer, side) for side in sides)
    return train, held_out


def rows(ids: Tensor, context: int) -> Tensor:
    """[N] -> [N // context, context]; the rest is left out."""
    return ids[: ids.numel() // context * context].view(-1, context)


def denoising(ids: Tensor, vocab: int) -> dict[str, Tensor]:
    """T5's task on ids [B, T]: spans become one sentinel each, labels [B, ...] say sentinel and span.

    Where the spans lie follows from the ids alone, so a row is the same example at every time.
    """
    inputs, labels = [], []
    for row in ids:
        draw = torch.Generator().manual_seed(int(row.sum()))
        places = torch.randperm(len(row) // SPAN, generator=draw)[:SPANS].sort().values * SPAN
        source, target, end = [], [], 0
        for number, place in enumerate(places.tolist()):
            sentinel = torch.tensor([vocab + number])
            source += [row[end:place], sentinel]
            target += [sentinel, row[place : place + SPAN]]
            end = place + SPAN
        inputs.append(torch.cat([*source, row[end:]]))
        labels.append(torch.cat(target))
    return {"input_ids": torch.stack(inputs), "labels": torch.stack(labels)}


def batch_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What the model is trained on, of ids [B, T]: keyword arguments with labels."""
    if model.config.is_encoder_decoder:
        return denoising(ids, model.config.vocab_size - SENTINELS)
    return {"input_ids": ids, "labels": ids}


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the labels, in nats."""
    logits, labels = model(**batch, use_cache=False).logits, batch["labels"]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@torch.no_grad()
def perplexity(model: Any, held_out: Tensor, count: int = 64) -> float:
    """exp of the mean loss over `count` evenly spread rows of held_out [N, T]."""
    chosen = held_out[torch.linspace(0, len(held_out) - 1, count).long()]
    losses = [float(loss_of(model, batch_of(model, part))) * len(part) for part in chosen.split(8)]
    return math.exp(sum(losses) / len(chosen))


def train(name: str, train_ids: Tensor, held_out: Tensor) -> Any:
    """One pass of AdamW with warm-up and a cosine; every row of the text at most once."""
    small = MODELS[name]
    torch.manual_seed(0)
    model = small.build(4096).train()
    found = rows(train_ids, small.context)
    found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(1))]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=small.learning_rate, betas=(0.9, 0.99), weight_decay=0.1
    )
    warmup = 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * (0.51 + 0.49 * math.cos(math.pi * step / small.steps)),
    )
    began = time.perf_counter()
    for step, part in enumerate(found[: small.steps * small.batch].split(small.batch)):
        loss = loss_of(model, batch_of(model, part))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - began
            print(
                f"{name}: step {step + 1} of {small.steps}, loss {float(loss):.3f}, {seconds:.0f} s",
                flush=True,
            )
    model.eval()
    print(f"{name}: held-out perplexity {perplexity(model, rows(held_out, small.context)):.2f}", flush=True)
    return model


def load(name: str, out: Path = OUT) -> Any:
    """A new copy of a trained model, in float32 and eval mode. FileNotFoundError when there is none."""
    if not (out / name / "config.json").is_file():
        raise FileNotFoundError(f"{out / name} is missing: run python benchmarks/small_models.py first")
    kind = type(MODELS[name].build(4096))
    return kind.from_pretrained(out / name, local_files_only=True).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the models")
    options = parser.parse_args()
    train_ids, held_out = text()
    for name in MODELS:
        if not (options.out / name / "config.json").is_file():
            train(name, train_ids, held_out).save_pretrained(options.out / name)


if __name__ == "__main__":
    main()
