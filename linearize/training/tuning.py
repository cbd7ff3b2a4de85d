"""Tuning a converted model: LoRA or all weights, on text, on the answers of a teacher, or on both."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..common.checks import unknown
from ..common.running import without_cache
from ..errors import ConfigError, InvalidModelError
from ..planning.state import LinearizeState, state_of
from ..rewrite.lora import lora_config, require_peft
from ..rewrite.lora import merge as merge_adapter
from ..rewrite.snapshot import Snapshot
from .data import Collate, is_encoder_decoder, training_data
from .objective import Objective
from .trainer import Stage, TrainingSettings, train

METHODS = ("lora", "full")


def tune(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    teacher: nn.Module | None = None,
    method: str = "lora",
    lm_weight: float = 1.0,
    distill_weight: float = 0.0,
    temperature: float = 1.0,
    lora: Mapping[str, Any] | None = None,
    merge: bool = True,
    context: int = 512,
    **settings: Any,
) -> Stage:
    """Train a converted model on data, in place.

    If this raises, the model is as it was before.

    Args:
        model: A converted model.
        data: Token ids int64 `[n]` or `[B, n]`, a list of these, texts, or dicts of the model's keyword
            arguments.
        tokenizer: The tokenizer of the model; needed for texts.
        teacher: The model to learn from, such as a copy of the softmax original. Runs without gradients.
        method: "lora" trains adapters on the projections around the rewritten attention, and the new
            parameters, and then merges them. "full" trains every parameter that requires gradients.
        lm_weight: Weight of the language-model loss.
        distill_weight: Weight of `T^2 KL(teacher || model)`; needs a `teacher`.
        temperature: T of that.
        lora: Fields of `lz.lora_config`, for method="lora".
        merge: False leaves the adapter in place: `model` of the result is then a `PeftModel`, and `lz.merge`
            merges it.
        context: Tokens per row.
        **settings: Fields of `linearize.training.TrainingSettings`, such as `epochs`, `learning_rate`,
            `batch_size`, `bf16`, `output_dir` or `resume`.

    Returns:
        The losses before and after, what it took, and the trained model.

    Raises:
        InvalidModelError: The model is not converted, or nothing in it can be tuned.
        InputError: The data is empty or does not fit the model.
        ConfigError: A setting is unknown or out of range.
        TrainingError: The loss is not finite, or a checkpoint cannot be written. Earlier checkpoints are
            kept, and `resume=True` continues from them.
        MissingExtraError: peft or accelerate is not installed.
    """
    check_method(method, lora)
    run = TrainingSettings.of(settings)
    state = state_of(model)
    rows = training_data(model, data, tokenizer, context)
    objective = Objective(
        shifts=_shifts(model, state),
        lm_weight=lm_weight,
        distill_weight=distill_weight,
        temperature=temperature,
        teacher=teacher,
        arguments=without_cache(model, {}),
    )
    children = {site.child for site in state.plan.sites}
    with Snapshot(model) as before:
        module = model
        if method == "lora":
            with torch.random.fork_rng():
                torch.manual_seed(run.seed)  # the same adapter in every process
                module = require_peft().get_peft_model(model, lora_config(model, **(lora or {})))
        elif not any(parameter.requires_grad for parameter in model.parameters()):
            raise InvalidModelError("no parameter requires gradients: nothing can be tuned")
        with _evaluating(teacher):
            stage = train(
                "tune",
                module,
                objective,
                lambda name: not children.isdisjoint(name.split(".")),
                rows,
                Collate.of(model),
                run,
            )
        if method == "full" or not merge:
            return dataclasses.replace(stage, model=module)
        merged = {name: p.detach() for name, p in merge_adapter(module).named_parameters()}
    # PEFT replaced some modules by trained copies: the model's own modules get the values of these.
    before.restore(merged)
    return dataclasses.replace(stage, model=model)


def check_method(method: str, lora: Mapping[str, Any] | None) -> None:
    """Raise ConfigError or MissingExtraError for a way to tune that there is not."""
    if method not in METHODS:
        raise ConfigError(unknown("method", method, METHODS), "method")
    if method == "lora":
        require_peft()
    if lora and method != "lora":
        raise ConfigError(f"lora= is for method='lora', and the method is {method!r}")


def _shifts(model: nn.Module, state: LinearizeState) -> bool:
    """Whether the logits at t predict the token at t + 1. Labels of encoder-decoders are shifted already."""
    return not is_encoder_decoder(model) and any(site.spec.causal for site in state.plan.sites)


@contextlib.contextmanager
def _evaluating(teacher: nn.Module | None) -> Iterator[None]:
    """Put the teacher into evaluation mode; afterwards restore its mode and its device."""
    if teacher is None:
        yield
        return
    flags = [(module, module.training) for module in teacher.modules()]
    device = next((p.device for p in teacher.parameters()), None)
    try:
        teacher.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        if device is not None:
            teacher.to(device)
