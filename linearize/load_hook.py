"""Makes `from_pretrained` restore converted models, and `save_pretrained` write them so that it can.

A converted transformers checkpoint holds the plan in `config.linearize`. The only public place where
transformers lets a checkpoint change its model before the weights are loaded is a quantizer, so the
checkpoint also names one, `linearize`, which quantizes nothing: it replays the plan and then removes every
trace of a quantized model.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from .cache import state_layer
from .errors import CheckpointError, InputError
from .graft import GraftOwner, state_of
from .seam import sole_child

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    # What `SavesPlan` extends at run time is the model class that `saving_class` puts after it.
    from transformers import PreTrainedModel as _Model

    from .config import LinearizeConfig
    from .planning import Plan
else:
    _Model = object

METHOD = "linearize"
VERSION = 1


def parse(record: Any, where: str) -> tuple[Plan, LinearizeConfig]:
    """The plan and config of a checkpoint from its `linearize` record `{"version", "plan", "config"}`.

    Raises CheckpointError, naming `where`, for a record of another version or form.
    """
    from .config import LinearizeConfig
    from .errors import ConfigError
    from .planning import Plan

    if not isinstance(record, Mapping):
        raise CheckpointError(f"{where} is not a converted checkpoint: it has no `linearize` record")
    version = record.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{where} has a `linearize` record of version {version!r}; this package reads up to {VERSION}: "
            "install a newer linearize"
        )
    try:
        return Plan.from_dict(record["plan"]), LinearizeConfig.from_dict(record["config"])
    except (KeyError, TypeError, AttributeError, ConfigError, CheckpointError) as error:
        raise CheckpointError(f"the `linearize` record of {where} cannot be used: {error}") from error


def measured_in(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The evaluations in a checkpoint's `linearize` record; none where there is no list of them."""
    found = record.get("measured")
    return tuple(item for item in found if isinstance(item, Mapping)) if isinstance(found, list) else ()


def relocate(plan: Plan, model: PreTrainedModel) -> Plan:
    """The plan with the paths `model` has: without the prefix of a head it lacks, or with that of one it has.

    Raises CheckpointError when neither form of a path exists.
    """
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_modules()}

    def path_in_model(path: str) -> str:
        for candidate in (path, path.removeprefix(prefix), prefix + path):
            if candidate in names:
                return candidate
        raise CheckpointError(f"the plan names {path!r}, which {type(model).__name__} does not have")

    return dataclasses.replace(
        plan, sites=tuple(dataclasses.replace(site, path=path_in_model(site.path)) for site in plan.sites)
    )


class SavesPlan(_Model):
    """Mixin of a converted transformers model: its checkpoints name the load hook, its caches hold states."""

    config: Any
    _linearize: Any

    def generate(self, *args: Any, speculative: Any = None, **kwargs: Any) -> Any:
        """As transformers' `generate`; with `speculative`, a `TreeSpeculation`, by draft trees."""
        if speculative is not None:
            if kwargs.get("custom_generate") is not None or kwargs.get("assistant_model") is not None:
                raise InputError("speculative= stands alone: leave out custom_generate= and assistant_model=")
            strings = kwargs.pop("stop_strings", None)
            if strings is not None and kwargs.get("tokenizer") is not None:
                from transformers.generation import StoppingCriteriaList, StopStringCriteria

                # transformers takes the tokenizer away from a callable before it looks for these.
                own = StopStringCriteria(kwargs["tokenizer"], strings)
                kwargs["stopping_criteria"] = StoppingCriteriaList(
                    [*(kwargs.get("stopping_criteria") or ()), own]
                )
            elif strings is not None:
                raise InputError("stop_strings need their tokenizer: generate(..., tokenizer=tokenizer)")
            # transformers streams the prompt, and gives a callable no streamer for what it generates.
            streamer = kwargs.get("streamer")
            bound = {} if streamer is None else {"streamer": streamer}
            kwargs["custom_generate"] = functools.partial(speculative, **bound)
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """As transformers does, then the states take their places: `generate` asks the cache what it can do
        before the first layer runs."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            return
        for path, sites in self._linearize.plan.owners.items():
            owner: Any = self.get_submodule(path)
            if isinstance(owner, GraftOwner):
                state_of(owner, cache)
            else:
                longest = getattr(self, "_previous_max_cache_length", None)  # of the static cache just made
                state_layer(cache, sites[0].layer_index, sole_child(owner), longest)
        if generation_config.is_assistant:
            cache.activate_past_recording()

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.save_pretrained`, and a model card, unless a README.md of someone else's is
        there. Raises CheckpointError when the model is also quantized, or the card cannot be written."""
        if getattr(self.config, "quantization_config", None) is not None:
            raise CheckpointError(
                "a converted model that is also quantized cannot be saved: a checkpoint has one place for a "
                "load hook; save the converted model before quantizing it"
            )
        self.config.quantization_config = LinearizeHookConfig()
        try:
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        finally:
            del self.config.quantization_config
        # transformers only logs where the directory is a file.
        if self.should_save_on_this_rank(is_main_process) and Path(save_directory).is_dir():
            from .card import write_card

            write_card(self, Path(save_directory))


def save_with_plan(model: nn.Module) -> None:
    """Let a converted transformers model write checkpoints that restore it; nothing for any other module."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        base: type = type(model)
        model.__class__ = saving_class(base)


@functools.cache
def saving_class(base: type) -> type:
    """Subclass of `base`, by the same name, that saves with the plan; itself when it already does."""
    if issubclass(base, SavesPlan):
        return base

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuild, (base,), self.__dict__.copy()

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
    }
    return type(base.__name__, (SavesPlan, base), members)


def _rebuild(base: type) -> Any:
    return object.__new__(saving_class(base))


class LinearizeHookConfig(QuantizationConfigMixin):
    """The entry in a checkpoint that makes transformers call the hook. The plan is `config.linearize`."""

    def __init__(self, quant_method: str = METHOD, **unused: Any) -> None:
        self.quant_method = quant_method

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


class LinearizeHook(HfQuantizer):
    """Replays the plan on the empty model before its weights are loaded."""

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        from .apply import apply_plan, carry

        where = f"the checkpoint {getattr(model.config, 'name_or_path', '')!r}"
        record: Any = getattr(model.config, "linearize", None)
        plan, config = parse(record, where)
        apply_plan(model, relocate(plan, model), config)
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
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(LinearizeHookConfig)
        register_quantizer(METHOD)(LinearizeHook)
