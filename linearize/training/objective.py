"""The loss of tuning: the language-model loss, the distance to a teacher, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.checks import excerpt
from ..common.running import without_cache
from ..common.text import IGNORED
from ..errors import ConfigError, InputError


@dataclass(frozen=True)
class Objective:
    """`lm_weight` times the language-model loss plus `distill_weight` times the distance to `teacher`.

    For models with logits, the first is the cross-entropy with the labels and the second is
    `T^2 KL(teacher || model)` at temperature T. Both are computed in float32 and averaged over the positions
    that have a label other than -100, or, without labels, over those that are not padding.

    Models without logits (encoders) learn from the hidden states of the teacher alone: the squared distance
    divided by the teacher's own square, without padding, plus one minus the cosine of the means over a
    sequence, because sentence embeddings are such means.

    Attributes:
        shifts: True for causal decoders: position t is scored on token t + 1, and labels default to the input
            ids. False where labels are in place, as for encoder-decoders and masked language models.
        lm_weight: Weight of the language-model loss, 0 or more.
        distill_weight: Weight of the distance to the teacher, 0 or more.
        temperature: T above.
        teacher: The softmax original. It runs without gradients, and is moved to the device of the data.
        arguments: Keyword arguments for the model in addition to each batch, such as `use_cache=False`.
    """

    shifts: bool
    lm_weight: float = 1.0
    distill_weight: float = 0.0
    temperature: float = 1.0
    teacher: nn.Module | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.lm_weight < 0 or self.distill_weight < 0 or self.lm_weight + self.distill_weight == 0:
            raise ConfigError(
                "lm_weight and distill_weight must be 0 or more, and at least one of them above 0: got "
                f"{self.lm_weight} and {self.distill_weight}"
            )
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}")
        if self.distill_weight and self.teacher is None:
            raise ConfigError("distill_weight needs a teacher: give teacher=, the softmax original")
        if self.teacher is not None and not isinstance(self.teacher, nn.Module):
            raise ConfigError(f"teacher must be a loaded model, got {excerpt(self.teacher)}", "teacher")

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The loss of one batch, a scalar. inputs: keyword arguments of the model, with or without labels."""
        labels, given = self._labels(inputs)
        output = model(**given, **self.arguments)
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        taught = self._taught(given)
        if logits is None:
            if taught is None:
                raise ConfigError(
                    f"{type(model).__name__} has no logits, so it learns from a teacher alone: give teacher= "
                    "and distill_weight="
                )
            return self.distill_weight * hidden_distance(output, taught, inputs.get("attention_mask"))
        if labels is None:
            if taught is None:
                raise ConfigError("the data has no labels: give some, or teacher= and distill_weight=")
            counts = _real(inputs, logits)
        else:
            if self.shifts and labels.dim() > 1:
                logits, labels = logits[:, :-1], labels[:, 1:]
            counts = labels != IGNORED
        chosen = logits[counts].float()
        # Sums, not means: a batch in which no position counts gives zero instead of NaN.
        number = counts.sum().clamp_min(1)
        loss = chosen.sum() * 0
        if self.lm_weight and labels is not None:
            loss = loss + self.lm_weight * F.cross_entropy(chosen, labels[counts], reduction="sum") / number
        if taught is not None:
            wanted = taught.logits
            if wanted.shape[-1] != logits.shape[-1]:
                raise InputError(
                    f"the teacher has {wanted.shape[-1]} logits and the model {logits.shape[-1]}: they must "
                    "have one vocabulary"
                )
            if wanted.shape[:-1] != logits.shape[:-1]:
                wanted = wanted[:, :-1]
            t = self.temperature
            distance = F.kl_div(
                F.log_softmax(chosen / t, -1),
                F.log_softmax(wanted[counts].float() / t, -1),
                reduction="sum",
                log_target=True,
            )
            loss = loss + self.distill_weight * t**2 * distance / number
        return loss

    def _taught(self, given: Mapping[str, Any]) -> Any:
        """The teacher's output, or None where it has no weight. Moves the teacher to the batch's device."""
        teacher = self.teacher
        if teacher is None or not self.distill_weight:
            return None
        device = next(value.device for value in given.values() if isinstance(value, Tensor))
        if next(teacher.parameters()).device != device:
            teacher.to(device)
        with torch.no_grad():
            return teacher(**without_cache(teacher, given))

    def _labels(self, inputs: Mapping[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        """The labels to score, and the model's keyword arguments."""
        given = dict(inputs)
        if not self.shifts:
            # They stay in: an encoder-decoder makes the inputs of its decoder from them.
            return given.get("labels"), given
        labels = given.pop("labels", None)
        if labels is None and "input_ids" in given:
            labels = given["input_ids"]
            mask = given.get("attention_mask")
            if mask is not None and mask.dim() == 2:
                labels = labels.masked_fill(mask == 0, IGNORED)
        return labels, given


def hidden_distance(output: Any, taught: Any, mask: Tensor | None) -> Tensor:
    """The distance of hidden states `[B, T, size]` and of their means; mask: `[B, T]`, 1 for real tokens."""
    hidden, wanted = _hidden(output), _hidden(taught)
    if hidden.shape != wanted.shape:
        raise InputError(
            f"the teacher's hidden states are {list(wanted.shape)} and the model's {list(hidden.shape)}"
        )
    if mask is not None and mask.dim() == 2 and mask.shape == hidden.shape[:2]:
        real = mask.bool()
    else:
        real = torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    real = real.reshape(*real.shape, *[1] * (hidden.dim() - real.dim()))
    hidden, wanted = (torch.where(real, x.float(), 0.0) for x in (hidden, wanted))
    tiny = torch.finfo(torch.float32).tiny
    loss = (hidden - wanted).square().sum() / wanted.square().sum().clamp_min(tiny)
    if hidden.dim() == 3:
        loss = loss + (1 - F.cosine_similarity(hidden.sum(1), wanted.sum(1), dim=-1)).mean()
    return loss


def _hidden(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is not None:
        return hidden
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    )
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise InputError(f"{type(output).__name__} has neither logits nor hidden states to learn from")


def _real(inputs: Mapping[str, Any], logits: Tensor) -> Tensor:
    """bool: the positions of `logits` that are not padding; all of them without a mask of that shape."""
    masks = [inputs[name] for name in ("decoder_attention_mask", "attention_mask") if name in inputs]
    for mask in masks:
        if mask.shape == logits.shape[:-1]:
            return mask.bool()
    return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
