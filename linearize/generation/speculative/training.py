"""Training of Medusa heads on a frozen decoder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from ...common.checkpoints import newest_checkpoint
from ...common.files import reason, shown, try_writing
from ...common.progress import shows
from ...common.text import IGNORED, sequences
from ...errors import ConfigError, InputError, LinearizeError, MissingExtraError, TrainingError
from .heads import MedusaHeads
from .rates import hidden_states, pieces_of

_ARGUMENTS: dict[str, Any] = dict(
    lr_scheduler_type="cosine",
    warmup_steps=20,
    save_total_limit=1,
    logging_steps=50,
    report_to="none",
    remove_unused_columns=False,
    dataloader_pin_memory=False,
)
"""What `train_heads` always asks of transformers' Trainer."""


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
    progress: bool | None = None,
    seed: int = 0,
) -> MedusaHeads:
    """Train Medusa heads for a decoder with transformers' Trainer. The decoder does not change.

    Its hidden states on the data are computed once and stored (for every token as many numbers as the hidden
    size, in the model's dtype), and the heads alone are trained on them.

    Args:
        model: The decoder.
        data: Token ids int64 `[n]` or `[B, n]`, a list of these, or texts. They are cut to pieces of
            `context` tokens.
        num_heads: How many heads to train.
        tokenizer: The tokenizer of the model; needed for texts.
        targets: What heads learn to guess. "generated": the model continues the first quarter of each piece
            greedily, and heads learn its continuations, which is what they get when it decodes. "model": what
            the model would choose along the text. "text": the text itself.
        sees_token: See `MedusaHeads`.
        own_layers: See `MedusaHeads`.
        context: Tokens per piece.
        epochs: How often the pieces are gone through.
        batch_size: Pieces per step.
        learning_rate: The highest learning rate of AdamW, with a cosine schedule.
        decay: The loss of head k has the weight `decay ** k`.
        held_out: The share of the data, its end, that is not trained on and gives `heads.rates`.
        output_dir: Folder for the Trainer's checkpoints, one per epoch; None writes none.
        resume: Continue from the newest complete one of these checkpoints, or start if there is none.
        progress: Whether to show a progress bar; on terminals and in notebooks by default.
        seed: Seed of the order of the pieces.

    Returns:
        The heads, in evaluation mode and the model's dtype, with measured `rates`.

    Raises:
        InputError: There is too little data.
        ConfigError: A setting is out of range.
        MissingExtraError: accelerate is not installed.
        TrainingError: A checkpoint cannot be written, or not be read: it is of other heads or other data.
    """
    if targets not in ("generated", "model", "text"):
        raise ConfigError(f"targets must be 'generated', 'model' or 'text', got {targets!r}")
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out must be a share between 0 and 1, got {held_out}")
    if resume and output_dir is None:
        raise ConfigError("resume continues from a checkpoint in output_dir: give output_dir=")
    trainer_class, arguments_class = _trainer()
    if output_dir is not None:
        _try_folder(Path(output_dir))
    heads = MedusaHeads(model, num_heads, sees_token, own_layers)
    pieces = pieces_of(sequences(data, tokenizer), context, num_heads)
    if targets == "generated":
        pieces = pieces_of(_continued(model, pieces, context), context, num_heads)
    first = len(pieces) - max(1, round(len(pieces) * held_out))
    if first <= 0:
        raise InputError(f"{len(pieces)} pieces of {context} tokens are too few to train on: give more text")
    examples = [_example(model, piece, context, num_heads, targets) for piece in pieces[:first]]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = arguments_class(
            output_dir=str(output_dir or scratch),
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            save_strategy="no" if output_dir is None else "epoch",
            disable_tqdm=not shows(progress),
            use_cpu=heads.weight.device.type == "cpu",
            seed=seed,
            **_ARGUMENTS,
        )
        trainer = trainer_class(model=_Training(heads.float(), decay), args=arguments, train_dataset=examples)
        if not shows(progress):
            from transformers import PrinterCallback

            trainer.remove_callback(PrinterCallback)
        checkpoint = newest_checkpoint(Path(arguments.output_dir)) if resume else None
        _train(trainer, checkpoint)
    heads = heads.to(next(iter(model.parameters())).dtype).eval()
    heads.acceptance(model, pieces[first:])
    return heads


def _try_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try_writing(folder)
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot write checkpoints to {shown(folder)}: {reason(error)}") from error


def _train(trainer: Any, checkpoint: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # What a file of another run, and a full disk, make torch and safetensors raise.
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, LinearizeError):
            raise
        where = trainer.args.output_dir if checkpoint is None else checkpoint
        raise TrainingError(
            f"heads cannot be trained with the checkpoints in {shown(Path(where))}: {reason(error)}; use the "
            "model, data and settings that they are of, or another folder"
        ) from error


def _continued(model: Any, pieces: Sequence[Tensor], context: int) -> list[Tensor]:
    """The first quarter of every whole piece, continued greedily by the model.

    Each continuation has `context` tokens in all, or fewer where the model ends the text earlier.
    """
    start, batch = max(1, context // 4), 64
    whole = [piece[:start] for piece in pieces if len(piece) == context]
    if not whole:
        raise InputError(
            f"no text has {context} tokens in a row to continue: give more, or a shorter context"
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
    """The inputs and targets of the heads along a piece, padded to T = context - 1 places: hidden states
    `[T, hidden_size]`, the tokens chosen from them `[T]`, and targets `[T, num_heads]`, -100 where there is
    none."""
    hidden, choice = (x[0].cpu() for x in hidden_states(model, piece[None]))
    right = F.pad(choice[:-1], (1, 0)) if targets == "model" else piece
    count, fill = len(piece) - 1, context - len(piece)
    padded = F.pad(right, (0, num_heads), value=IGNORED)
    wanted = torch.stack([padded[k + 2 : k + 2 + count] for k in range(num_heads)], 1)
    return {
        "hidden": F.pad(hidden[:count], (0, 0, 0, fill)),
        "tokens": F.pad(piece[1:], (0, fill)),
        "targets": F.pad(wanted, (0, 0, 0, fill), value=IGNORED),
    }


class _Training(nn.Module):
    """What the Trainer trains: the heads, with their loss."""

    def __init__(self, heads: MedusaHeads, decay: float) -> None:
        super().__init__()
        self.heads, self.decay = heads, decay

    def forward(self, hidden: Tensor, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = self.heads(hidden.flatten(0, 1), tokens.flatten())
        losses = [
            self.decay**head * F.cross_entropy(logits[head].float(), wanted, ignore_index=IGNORED)
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
