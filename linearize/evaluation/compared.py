"""The models that are evaluated side by side, and running them on the same inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..common.given import cause
from ..common.running import vocabulary_size, without_cache
from ..errors import InputError, InvalidModelError
from .figures import Figures
from .speed import device_of, interleaved


@dataclass(frozen=True)
class Compared:
    """The model to evaluate, and the reference that it is compared with, if there is one."""

    model: nn.Module
    reference: nn.Module | None

    @property
    def all(self) -> list[nn.Module]:
        """The model, then the reference."""
        return [self.model] if self.reference is None else [self.model, self.reference]

    def outputs(self, inputs: Mapping[str, Any], where: str) -> list[Any]:
        """The output of each model on the same inputs. Raises InputError, naming the batch, if one fails."""
        return [output(model, inputs, where) for model in self.all]


def kind_of(model: nn.Module) -> str:
    """The kind of a model, which decides what is measured: "decoder", "encoder-decoder" or "encoder".

    Raises InvalidModelError for anything but a transformers model.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "is_encoder_decoder"):
        hint = "; give the model that it names, loaded" if isinstance(model, str) else ""
        raise InvalidModelError(f"this needs transformers models, got {type(model).__name__}{hint}")
    whole: Any = model
    if config.is_encoder_decoder:
        if whole.get_output_embeddings() is None:
            raise InvalidModelError(
                f"{type(model).__name__} is an encoder-decoder without an output layer: give one with it"
            )
        return "encoder-decoder"
    return "decoder" if whole.can_generate() else "encoder"


def output(model: nn.Module, inputs: Mapping[str, Any], where: str) -> Any:
    """The output of a model; that of an encoder always has hidden states."""
    device = device_of(model)
    placed = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    if kind_of(model) == "encoder" and getattr(model, "base_model", model) is not model:
        placed["output_hidden_states"] = True  # the head on top of the encoder returns something else
    try:
        return model(**without_cache(model, placed))
    except Exception as error:
        why = cause(model, inputs, error)
        raise InputError(f"{type(model).__name__} does not run on {where}: {why}") from error


def check_vocabulary(compared: Compared, ids: Tensor) -> None:
    """Raise InputError if a model has no embedding for one of the ids."""
    for who, model in zip(("model", "reference"), compared.all, strict=False):
        size = vocabulary_size(model)
        if size is not None and len(ids) and (int(ids.max()) >= size or int(ids.min()) < 0):
            wrong = int(ids.max()) if int(ids.max()) >= size else int(ids.min())
            raise InputError(
                f"the data has the token {wrong}, but the {who} has {size}: the tokenizer is another model's"
            )


def positions(model: Any) -> int:
    """The maximum number of tokens by the model's config; a huge number if it has none."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else 1 << 62


def dicts(data: Any) -> Iterable[Mapping[str, Any]]:
    """The dicts in `data`. Raises InputError for anything else."""
    for item in [data] if isinstance(data, Mapping) else data:
        if not isinstance(item, Mapping):
            raise InputError(
                "this model is evaluated on dicts of its keyword arguments, but the data has "
                f"{type(item).__name__}"
            )
        yield item


def with_forward_rate(
    figures: list[Figures], compared: Compared, batch: Mapping[str, Any], tokens: int
) -> list[Figures]:
    """Add the rate of forward passes over one batch of `tokens` tokens to the figures of each model."""
    calls = [partial(output, model, batch, "the first batch") for model in compared.all]
    seconds = interleaved(calls, device_of(compared.model))
    return [
        replace(figure, forward_tokens_per_second=tokens / second)
        for figure, second in zip(figures, seconds, strict=True)
    ]
