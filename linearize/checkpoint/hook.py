"""The hook by which transformers' `from_pretrained` restores a converted model before it reads weights."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer

from ..common.checks import excerpt
from ..errors import CheckpointError
from ..planning.record import METHOD, LinearizeHookConfig, measured_in, parse
from ..planning.state import carry
from .replay import replay

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..planning.plan import Plan


def relocate(plan: Plan, model: PreTrainedModel, where: str) -> Plan:
    """The plan with the paths `model` has: without the prefix of a head it lacks, or with that of one it has.

    Raises CheckpointError, naming `where`, when neither form of a path exists.
    """
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_modules()}

    def path_in_model(path: str) -> str:
        for candidate in (path, path.removeprefix(prefix), prefix + path):
            if candidate in names:
                return candidate
        raise CheckpointError(
            f"{where} was saved from another architecture: its plan names {excerpt(path)}, which a "
            f"{type(model).__name__} does not have"
        )

    return dataclasses.replace(
        plan, sites=tuple(dataclasses.replace(site, path=path_in_model(site.path)) for site in plan.sites)
    )


class LinearizeHook(HfQuantizer):
    """Replays the plan on the empty model before its weights are loaded."""

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        where = f"the checkpoint {getattr(model.config, 'name_or_path', '')!r}"
        record: Any = getattr(model.config, "linearize", None)
        plan, config = parse(record, where)
        replay(model, relocate(plan, model, where), config, where)
        carry(model, measured_in(record))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        self.remove_quantization_config(model)
        del model.is_quantized  # an ordinary model has no such attribute
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_is_quantized"):
                del config._is_quantized
        return model


def register() -> None:
    """Make the hook known to transformers. Idempotent."""
    # Here and not above: a reload of that module makes new mappings.
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(LinearizeHookConfig)
        auto.register_quantizer(METHOD)(LinearizeHook)
