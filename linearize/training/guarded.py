"""transformers' Trainer, stopping at a loss that is not finite, and without incomplete checkpoints."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer

from ..common.checkpoints import newest_checkpoint
from ..errors import TrainingError


class GuardedTrainer(Trainer):
    """Minimizes `objective`. Parameters whose name is `is_new` learn at `new_learning_rate`."""

    # Our losses are means over a batch: the Trainer averages them over the batches of a step.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        objective: Callable[[nn.Module, Mapping[str, Any]], Tensor],
        is_new: Callable[[str], bool],
        new_learning_rate: float,
        **settings: Any,
    ) -> None:
        super().__init__(model, args, **settings)
        self.objective, self.is_new, self.new_learning_rate = objective, is_new, new_learning_rate

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        loss = self.objective(model, inputs)
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}{_newest(self.args)}: try a "
                "lower learning_rate, a longer warmup or float32 instead of bf16, and check the data there"
            )
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """The loss alone, for inputs with or without labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Put new parameters into groups of their own, with their own learning rate."""
        optimizer = super().create_optimizer(model)
        named = (self.model if model is None else model).named_parameters()
        new = {id(parameter) for name, parameter in named if self.is_new(name)}
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in new]
            if own:
                group["params"] = [p for p in group["params"] if id(p) not in new]
                settings = {name: value for name, value in group.items() if name != "params"}
                optimizer.add_param_group({**settings, "params": own, "lr": self.new_learning_rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **settings: Any) -> None:
        with _reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **settings)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint completely or not at all, and only with finite weights."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise TrainingError(
                    f"{name} is no longer finite at step {self.state.global_step}{_newest(self.args)}: try a "
                    "lower learning_rate, a longer warmup, or float32 instead of bf16"
                )
        try:
            super()._save_checkpoint(model, trial)
        # torch.save raises RuntimeError when the disk is full.
        except (OSError, SafetensorError, RuntimeError) as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise TrainingError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {folder.parent}: "
                f"{error}{_newest(self.args)}; free some space and continue with resume=True"
            ) from error


@contextlib.contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    """Turn everything that can go wrong with a checkpoint into a TrainingError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(
            f"the checkpoint {checkpoint} is from another run, or cannot be read: {reason}; use its model "
            "and settings, or another folder"
        ) from error


def _newest(arguments: Any) -> str:
    """The newest complete checkpoint, as a part of a message; empty without one."""
    newest = newest_checkpoint(Path(arguments.output_dir)) if arguments.save_strategy != "no" else None
    return "" if newest is None else f" (the checkpoint {newest} is kept)"
