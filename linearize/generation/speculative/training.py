"""Training of Medusa heads on a frozen decoder, and measuring how often they are right."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.text import sequences
from ...errors import ConfigError, InputError, MissingExtraError
from .heads import MedusaHeads
from .rates import pieces_of, read


def train_heads(
    model: Any,
    data: Any,
    *,
    num_heads: int = 4,
    tokenizer: Any = None,
    targets: str = "generated",
    sees_token: bool = True,
    own_layers: bool = False,
    context: int = 512,
    epochs: float = 3.0,
    batch_size: int = 1,
    learning_rate: float = 2e-3,
    decay: float = 0.8,
    held_out: float = 0.05,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    seed: int = 0,
) -> MedusaHeads:
    """Medusa heads for `model`, trained on `data` by transformers' Trainer (extra `[train]`).

    The model is not changed: its hidden states on the data are computed once and kept (as many numbers as the
    hidden size for every token, in the model's dtype), then the heads alone are trained on them.

    data: int64 `[n]` or `[B, n]`, or several such of any lengths; with `tokenizer`, texts. It is read in
    pieces of `context` tokens. targets: what heads learn to guess. "generated": the model itself goes on,
    greedily, from the first quarter of each piece, and heads learn on what it writes, which is what they
    will see when it decodes; "model": what the model would choose along the text as it is; "text": what the
    text says. sees_token, own_layers: see `MedusaHeads`. epochs, batch_size (in pieces), learning_rate: of
    AdamW, with a cosine schedule. decay: head k's loss counts `decay ** k`. held_out: share of the data, its
    end, that is not trained on but gives `heads.rates`. output_dir: where the Trainer keeps its checkpoints,
    one each epoch; resume: go on from the last of them. progress: show the Trainer's bar.

    Raises InputError for too little data, ConfigError for settings, MissingExtraError without accelerate.
    """
    if targets not in ("generated", "model", "text"):
        raise ConfigError(f"targets are 'generated', 'model' or 'text', got {targets!r}")
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out is a share between 0 and 1, got {held_out}")
    if resume and output_dir is None:
        raise ConfigError("resume goes on from a checkpoint in output_dir: name that")
    trainer_class, arguments_class = _trainer()
    heads = MedusaHeads(model, num_heads, sees_token, own_layers)
    pieces = pieces_of(sequences(data, tokenizer), context, num_heads)
    if targets == "generated":
        pieces = pieces_of(_continued(model, pieces, context), context, num_heads)
    kept = max(1, round(len(pieces) * held_out))
    if len(pieces) <= kept:
        raise InputError(f"{len(pieces)} pieces of {context} tokens are too few to train on: give more text")
    examples = [_example(model, piece, context, num_heads, targets) for piece in pieces[:-kept]]
    training = _Training(heads.float(), decay)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = arguments_class(
            output_dir=str(output_dir or scratch),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            save_strategy="no" if output_dir is None else "epoch",
            save_total_limit=1,
            logging_steps=50,
            disable_tqdm=not progress,
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=heads.weight.device.type == "cpu",
            seed=seed,
        )
        trainer = trainer_class(model=training, args=arguments, train_dataset=examples)
        if not progress:
            from transformers import PrinterCallback

            trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume or None)
    heads = heads.to(next(iter(model.parameters())).dtype).eval()
    heads.acceptance(model, pieces[-kept:])
    return heads


def _continued(model: Any, pieces: Sequence[Tensor], context: int) -> list[Tensor]:
    """What the model writes greedily after the first quarter of every whole piece, `context` tokens in all,
    and where it ended the text before, so many."""
    start, batch = max(1, context // 4), 64
    whole = [piece[:start] for piece in pieces if len(piece) == context]
    if not whole:
        raise InputError(
            f"no text has {context} tokens in a row to go on from: give more, or a shorter context"
        )
    found: list[Tensor] = []
    for i in range(0, len(whole), batch):
        prompts = torch.stack(whole[i : i + batch]).to(next(iter(model.parameters())).device)
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=context - start,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=False,
        ).cpu()
        ends = model.generation_config.eos_token_id
        for row in out:
            stops = torch.isin(row[start:], torch.tensor([] if ends is None else ends)).nonzero()
            found.append(row[: start + int(stops[0]) + 1] if len(stops) else row)
    return found


def _example(model: Any, piece: Tensor, context: int, num_heads: int, targets: str) -> dict[str, Tensor]:
    """What heads see and must say along a piece, filled up to one size: hidden `[T, hidden_size]`, the tokens
    chosen there `[T]`, targets `[T, heads]`, -100 where there is none; T is context - 1."""
    hidden, choice = (x[0].cpu() for x in read(model, piece[None]))
    right = F.pad(choice[:-1], (1, 0)) if targets == "model" else piece
    count, fill = len(piece) - 1, context - len(piece)
    padded = F.pad(right, (0, num_heads), value=-100)
    wanted = torch.stack([padded[k + 2 : k + 2 + count] for k in range(num_heads)], 1)
    return {
        "hidden": F.pad(hidden[:count], (0, 0, 0, fill)),
        "tokens": F.pad(piece[1:], (0, fill)),
        "targets": F.pad(wanted, (0, 0, 0, fill), value=-100),
    }


class _Training(nn.Module):
    """What the Trainer trains: the heads, and their loss."""

    def __init__(self, heads: MedusaHeads, decay: float) -> None:
        super().__init__()
        self.heads, self.decay = heads, decay

    def forward(self, hidden: Tensor, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = self.heads(hidden.flatten(0, 1), tokens.flatten())
        losses = [
            self.decay**head * F.cross_entropy(logits[head].float(), wanted, ignore_index=-100)
            for head, wanted in enumerate(targets.flatten(0, 1).unbind(1))
        ]
        return {"loss": torch.stack(losses).sum()}


def _trainer() -> tuple[Any, Any]:
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("training heads needs accelerate: pip install 'linearize[train]'") from error
    from transformers import Trainer, TrainingArguments

    return Trainer, TrainingArguments
