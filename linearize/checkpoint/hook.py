"""The hook by which transformers' `from_pretrained` restores a converted model before it reads weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.base import HfQuantizer

from ..common.checks import excerpt
from ..common.files import shown
from ..common.replacing import TRANSFORMERS, identity, read_entry
from ..errors import CheckpointError
from ..planning.record import METHOD, LinearizeHookConfig, measured_in, parse
from ..planning.state import carry
from ..rewrite import auto_map
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


@dataclass(frozen=True)
class _Reading:
    """What one call of `from_pretrained` reads: the record, and of the files of weights what they were before
    they were read."""

    folder: Path
    record: Any
    files: Mapping[Path, tuple[int, int, int] | None]

    def check(self) -> None:
        """Raise CheckpointError where another writer replaced the checkpoint since its config was read."""
        now = read_entry(self.folder / TRANSFORMERS.record, "linearize")
        if now != self.record or any(identity(file) != before for file, before in self.files.items()):
            raise CheckpointError(
                f"the checkpoint {shown(self.folder)} was replaced while it was read; read it again, or by "
                "lz.load, which does that by itself"
            )


class LinearizeHook(HfQuantizer):
    """Replays the plan on the empty model before its weights are loaded, and makes sure that they are of one
    checkpoint with it. transformers makes one of these for each call of `from_pretrained`."""

    _reading: _Reading | None = None

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        name = getattr(model.config, "name_or_path", "")
        where = f"the checkpoint {name!r}"
        record: Any = getattr(model.config, "linearize", None)
        plan, config = parse(record, where)
        if (Path(name) / TRANSFORMERS.record).is_file():
            files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
            self._reading = _Reading(Path(name), copy.deepcopy(record), {x: identity(x) for x in files})
            self._reading.check()
        replay(model, relocate(plan, model, where), config, where)
        carry(model, measured_in(record))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._reading is not None:
            self._reading.check()
        self.remove_quantization_config(model)
        auto_map.forget(model.config)
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
