"""Train the small decoder that linearize ships for its demo.

A LLaMA-style decoder (grouped heads, rotary positions, RMSNorm, tied embeddings) and its byte-level BPE
tokenizer, trained on the source of the Python standard library that runs this script. No download is needed.

    python examples/train_demo.py --out /tmp/demo --minutes 60

writes a transformers folder (config, bfloat16 weights, tokenizer) and `training.json`, the record of the run.
A killed run continues from `checkpoint.pt` in the same folder when the same command is given again.

The learning rate rises for `warmup` steps, stays, and falls along a cosine over the last `DECAY` of them.
The flat middle is there because the speed of the machine is unknown: with `--minutes` the number of steps is
fixed only when the fall must begin, nothing before that moment depends on it, and so `--steps N` with the
recorded N repeats the run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
PAD = "<|pad|>"
DECAY = 0.25
PERPLEXITY = (
    "exp of the mean negative log-likelihood, in nats, per predicted BPE token. The token stream (every file "
    "preceded by <|endoftext|>) is cut into non-overlapping windows of `context` tokens; `windows` of them, "
    "evenly spread, are scored; the first token of a window is context only. Weights rounded to bfloat16, "
    "arithmetic in float32."
)


@dataclass(frozen=True)
class Settings:
    """What fixes a run, but its steps. Lengths are in tokens; `batch` counts sequences of `context`."""

    seed: int = 0
    vocab: int = 4096
    hidden: int = 256
    intermediate: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    max_positions: int = 4096
    context: int = 512
    batch: int = 4
    long_context: int = 1024
    long_fraction: float = 0.1
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: int = 150


# --- text ---------------------------------------------------------------------------------------------------


def read_sources(root: Path) -> dict[str, str]:
    """Every UTF-8 `.py` file of the standard library at `root`, by relative path, in sorted order.

    Installed packages are not part of the library. Files in other encodings (test data) are left out.
    """
    sources = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if {"site-packages", "dist-packages", "__pycache__"} & set(name.parts):
            continue
        try:
            sources[name.as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
    if not sources:
        raise FileNotFoundError(f"no Python source below {root}; is its source installed?")
    return sources


def is_validation(name: str) -> bool:
    """True for about 5 % of the files. Decided by the path alone, so a file never changes sides."""
    return hashlib.sha256(name.encode()).digest()[0] < 13


def train_tokenizer(texts: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocab` entries, two of them special; any text survives a round trip."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Tensor:
    """One stream of token ids, int64 [N]; every text is preceded by the end-of-text token."""
    stream: list[int] = []
    for text in texts:
        stream.append(tokenizer.bos_token_id)
        stream.extend(tokenizer.backend_tokenizer.encode(text).ids)
    return torch.tensor(stream)


def windows(stream: Tensor, context: int, batch: int, step: int, seed: int) -> Tensor:
    """The batch of training windows for `step`, int64 [batch, context].

    An epoch is the stream cut at a random phase and shuffled, each window once. The result depends on the
    arguments only, so a resumed run sees the data it would have seen.
    """
    per_epoch = (stream.numel() // context - 1) // batch
    epoch, index = divmod(step, per_epoch)
    random = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    phase = int(torch.randint(context, (1,), generator=random))
    order = torch.randperm(per_epoch * batch, generator=random)
    starts = phase + context * order[index * batch : (index + 1) * batch]
    return torch.stack([stream[start : start + context] for start in starts.tolist()])


# --- model --------------------------------------------------------------------------------------------------


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised float32 decoder. Projections into the residual start smaller, as in GPT-2."""
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab,
            hidden_size=settings.hidden,
            intermediate_size=settings.intermediate,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            head_dim=settings.head_dim,
            max_position_embeddings=settings.max_positions,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * settings.layers) ** -0.5)
    return model


def loss_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats of tokens[:, 1:] given what precedes; `tokens` is int64 [B, T]."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def validate(model: LlamaForCausalLM, stream: Tensor, context: int, count: int) -> float:
    """Mean negative log-likelihood in nats over `count` evenly spread windows of the stream."""
    cut = stream[: stream.numel() // context * context].view(-1, context)
    cut = cut[torch.linspace(0, len(cut) - 1, count).long()]
    model.eval()
    # Windows are equally long, so the mean over windows is the mean over tokens.
    total = sum(float(loss_of(model, part)) * len(part) for part in cut.split(4))
    model.train()
    return total / len(cut)


def rounded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A float32 copy of the model whose weights are those the saved bfloat16 file holds."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    return copy.eval()


def rate(step: int, steps: int | None, settings: Settings) -> float:
    """Learning rate at `step`; `steps` is None while the length of the run is still open."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    if steps is None or step < (1 - DECAY) * steps:
        return settings.learning_rate
    done = (step - (1 - DECAY) * steps) / (DECAY * steps)
    return settings.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def optimizer_for(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    """AdamW; matrices decay, norm gains do not. The slow second moment suits the small, noisy batches."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)


# --- files --------------------------------------------------------------------------------------------------


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model (bfloat16) and tokenizer into `out`; each file is replaced whole, never half written."""
    scratch = out / "saving"
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    for path in scratch.iterdir():
        os.replace(path, out / path.name)
    scratch.rmdir()


def save_atomically(write: bytes | dict[str, object], path: Path) -> None:
    """Bytes as they are, a dictionary by torch.save; the old file stays until the new one is complete."""
    partial = path.with_suffix(".partial")
    if isinstance(write, bytes):
        partial.write_bytes(write)
    else:
        torch.save(write, partial)
    os.replace(partial, path)


@torch.no_grad()
def snippet_of(
    sources: dict[str, str], tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM
) -> dict[str, object]:
    """A fixed piece of held-out text with its perplexity, so that a test can check the shipped weights."""
    name = next(n for n, t in sources.items() if is_validation(n) and "test" not in n and len(t) > 6000)
    text = sources[name][:3000]
    nll = float(loss_of(model, encode(tokenizer, [text])[None]))
    return {"file": name, "text": text, "perplexity": math.exp(nll)}


# --- run ----------------------------------------------------------------------------------------------------


def train(
    settings: Settings,
    model: LlamaForCausalLM,
    stream: Tensor,
    *,
    steps: int | None,
    seconds: float | None,
    checkpoint: Path,
    every: int,
) -> Iterator[tuple[int, int | None, float]]:
    """Train in place; yield (steps done, steps planned or None, seconds) at each checkpoint and the end.

    `stream` is int64 [N]. Without `steps` the run aims at `seconds` of wall time. A run found in the file
    `checkpoint` is continued; ValueError if it had other settings.
    """
    optimizer = optimizer_for(model, settings)
    step, before = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["settings"] != asdict(settings):
            raise ValueError(f"{checkpoint} has other settings; remove it or choose another --out")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, before, steps = saved["step"], saved["seconds"], steps or saved["steps"]
        print(f"continuing at step {step}", flush=True)
        if step == steps:  # killed after the last step, before the model was written
            yield step, steps, before
    started = time.monotonic()
    reported, mean_loss, pace = (time.monotonic(), step), float("nan"), 0.0

    model.train()
    while steps is None or step < steps:
        elapsed = before + time.monotonic() - started
        falling = round(step * DECAY / (1 - DECAY))  # steps still to do if the fall began here
        if steps is None and seconds is not None and pace and elapsed + falling * pace >= seconds:
            steps = step + falling
            print(f"step {step}: the learning rate falls from here, {steps} steps in all", flush=True)
        context, batch = settings.context, settings.batch
        if steps is not None and step >= (1 - settings.long_fraction) * steps:
            context, batch = settings.long_context, max(1, batch * settings.context // settings.long_context)

        learning_rate = rate(step, steps, settings)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss = loss_of(model, windows(stream, context, batch, step, settings.seed))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        mean_loss = loss.item() if math.isnan(mean_loss) else 0.95 * mean_loss + 0.05 * loss.item()

        if step % 50 == 0:
            now = time.monotonic()
            pace = (now - reported[0]) / (step - reported[1])
            reported = (now, step)
            print(
                f"step {step}/{steps or '?'}  loss {mean_loss:.3f}  lr {learning_rate:.2e}  "
                f"{pace:.2f} s/step  {(before + now - started) / 60:.1f} min",
                flush=True,
            )
        if step % every == 0 or step == steps:
            elapsed = before + time.monotonic() - started
            state = {
                "settings": asdict(settings),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "steps": steps,
                "seconds": elapsed,
            }
            save_atomically(state, checkpoint)
            yield step, steps, elapsed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, created if missing")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=60.0, help="wall time to aim at (default: 60)")
    length.add_argument("--steps", type=int, help="exact number of steps instead")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--checkpoint-every", type=int, default=300, help="steps between checkpoints")
    args = parser.parse_args()

    settings = Settings()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    sources = read_sources(Path(sysconfig.get_path("stdlib")))
    train_texts = [text for name, text in sources.items() if not is_validation(name)]
    held_texts = [text for name, text in sources.items() if is_validation(name)]
    tokenizer = train_tokenizer(train_texts, settings.vocab)
    tokenizer.model_max_length = settings.max_positions
    stream, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_texts)
    model = build_model(settings, tokenizer)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{len(train_texts)} files, {stream.numel():,} tokens to train on; {len(held_texts)} files, "
        f"{held_out.numel():,} tokens held out; {size:,} parameters",
        flush=True,
    )

    checkpoint, record_file = args.out / "checkpoint.pt", args.out / "training.json"
    # One command, or more where a run was interrupted and continued.
    continued = checkpoint.exists() and record_file.exists()
    commands = json.loads(record_file.read_text())["commands"] if continued else []
    commands.append(shlex.join(["python", *sys.argv]))
    seconds = None if args.steps else args.minutes * 60
    run = train(
        settings,
        model,
        stream,
        steps=args.steps,
        seconds=seconds,
        checkpoint=checkpoint,
        every=args.checkpoint_every,
    )
    for step, steps, elapsed in run:
        save_model(model, tokenizer, args.out)
        shipped, finished = rounded(model), step == steps
        count = 400 if finished else 40
        nll = validate(shipped, held_out, settings.context, count)
        print(f"step {step}  validation perplexity {math.exp(nll):.2f}", flush=True)
        record = {
            "commands": commands,
            "repeat_with": f"python examples/train_demo.py --out DIR --steps {steps or step}",
            "finished": finished,
            "steps": step,
            "tokens_seen": step * settings.batch * settings.context,
            "wall_seconds": round(elapsed),
            "threads": args.threads,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "data": {
                "source": "Python standard library (Python Software Foundation License), all UTF-8 .py files",
                "split": "validation if the first byte of sha256(relative path) is below 13",
                "train": describe(train_texts, stream),
                "validation": describe(held_texts, held_out),
            },
            "settings": asdict(settings) | {"decay": DECAY},
            "parameters": size,
            "validation": {
                "perplexity": math.exp(nll),
                "nats_per_token": nll,
                "context": settings.context,
                "windows": count,
                "definition": PERPLEXITY,
            },
            "snippet": snippet_of(sources, tokenizer, shipped),
        }
        if finished:
            nll_long = validate(shipped, held_out, settings.long_context, 100)
            record["validation_long"] = {
                "perplexity": math.exp(nll_long),
                "nats_per_token": nll_long,
                "context": settings.long_context,
                "windows": 100,
            }
        save_atomically((json.dumps(record, indent=2) + "\n").encode(), record_file)
    # Reached only after the last step: an interrupted run leaves its checkpoint for the next call.
    checkpoint.unlink(missing_ok=True)


def describe(texts: list[str], stream: Tensor) -> dict[str, int]:
    """Number of files, UTF-8 bytes and tokens."""
    return {"files": len(texts), "bytes": sum(len(t.encode()) for t in texts), "tokens": stream.numel()}


if __name__ == "__main__":
    main()
