"""Tuning a converted model: LoRA or all weights, on text, on a teacher's answers, or both."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..common.running import without_cache
from ..errors import ConfigError, InvalidModelError
from ..planning.state import LinearizeState, state_of
from ..rewrite.lora import lora_config, require_peft
from ..rewrite.lora import merge as merge_adapter
from ..rewrite.snapshot import Flags, Transaction, put
from .data import Collate, is_pair, rows_of
from .objective import Objective
from .trainer import Run, Stage, train

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
    **run: Any,
) -> Stage:
    """Train a converted `model` on `data`, in place.

    data, tokenizer, context: see `rows_of`. method: "lora" trains adapters on the projections around the
    rewritten attention, and the new parameters, then merges them; lora: fields for `lora_config`; merge=False
    leaves the adapter on: `model` of what is returned is then a `PeftModel`, and `lz.merge` merges it. "full"
    trains every parameter that requires gradients. lm_weight, distill_weight, temperature, teacher: what is
    learned, see `Objective`; the teacher, such as a copy of the softmax original, is run without gradients.
    run: the fields of `Run`.

    Returns how it went. Raises InvalidModelError for a model that is not converted, InputError for the data,
    ConfigError for settings, TrainingError when the loss is no number or a checkpoint cannot be written (the
    earlier ones are kept: `resume=True` goes on from them), MissingExtraError without peft or accelerate; the
    model is then as it was.
    """
    if method not in METHODS:
        raise ConfigError(f"method is one of {', '.join(METHODS)}, got {method!r}")
    if lora and method != "lora":
        raise ConfigError("lora= has settings of method='lora'")
    settings = Run.of(run)
    state = state_of(model)
    rows = rows_of(model, data, tokenizer, context)
    objective = Objective(
        shifts=_shifts(model, state),
        lm_weight=lm_weight,
        distill_weight=distill_weight,
        temperature=temperature,
        teacher=teacher,
        arguments=without_cache(model, {}),
    )
    children = {site.child for site in state.plan.sites}
    before, flags = Transaction(model), Flags(model)
    try:
        module = model
        if method == "lora":
            with torch.random.fork_rng():
                torch.manual_seed(settings.seed)  # every process of a launcher draws the same adapter
                module = require_peft().get_peft_model(model, lora_config(model, **(lora or {})))
        elif not any(parameter.requires_grad for parameter in model.parameters()):
            raise InvalidModelError("no parameter requires gradients: nothing can be tuned")
        with _at_rest(teacher):
            stage = train(
                "tune",
                module,
                objective,
                lambda name: not children.isdisjoint(name.split(".")),
                rows,
                Collate.of(model),
                settings,
            )
        if method == "full" or not merge:
            return dataclasses.replace(stage, model=module)
        merged = {name: p.detach() for name, p in merge_adapter(module).named_parameters()}
    except BaseException:
        before.rollback()
        flags.restore()
        raise
    # PEFT put trained copies in the place of some modules: their values go into the model's own.
    before.rollback()
    flags.restore()
    put(model, merged)
    return dataclasses.replace(stage, model=model)


def _shifts(model: nn.Module, state: LinearizeState) -> bool:
    """Whether logits at t are for the token at t + 1: so it is in decoders, the halves of pairs apart."""
    return not is_pair(model) and any(site.spec.causal for site in state.plan.sites)


@contextlib.contextmanager
def _at_rest(teacher: nn.Module | None) -> Iterator[None]:
    """The teacher in evaluation mode, and afterwards in the mode and on the device where it was."""
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
