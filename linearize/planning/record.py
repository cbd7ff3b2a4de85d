"""The record of a conversion in a checkpoint: reading it, and the entry that makes transformers read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..common.checks import excerpt
from ..errors import CheckpointError

if TYPE_CHECKING:
    from .config import LinearizeConfig
    from .plan import Plan


METHOD = "linearize"
"""The name of our entry among transformers' quantization methods."""
VERSION = 1
"""Of the record."""


def parse(record: Any, where: str) -> tuple[Plan, LinearizeConfig]:
    """The plan and config of a checkpoint from its `linearize` record `{"version", "plan", "config"}`.

    Raises CheckpointError, naming `where`, for a record of another version or form.
    """
    from ..errors import ConfigError
    from .config import LinearizeConfig
    from .plan import Plan
    from .schema import check_record

    if not isinstance(record, Mapping):
        raise CheckpointError(f"{where} is not a converted checkpoint: it has no `linearize` record")
    version = record.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{where} has a `linearize` record of version {excerpt(version)}; this package reads up to "
            f"{VERSION}: install a newer linearize"
        )
    try:
        check_record(record)
        return Plan.from_dict(record["plan"]), LinearizeConfig.from_dict(record["config"])
    except (KeyError, TypeError, AttributeError, ConfigError, CheckpointError) as error:
        raise CheckpointError(f"the `linearize` record of {where} cannot be used: {error}") from error


def measured_in(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The evaluations in a checkpoint's `linearize` record; none where there is no list of them."""
    found = record.get("measured")
    return tuple(item for item in found if isinstance(item, Mapping)) if isinstance(found, list) else ()


class LinearizeHookConfig(QuantizationConfigMixin):
    """The entry in a checkpoint that makes transformers call the hook. The plan is `config.linearize`."""

    def __init__(self, quant_method: str = METHOD, **unused: Any) -> None:
        self.quant_method = quant_method

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}
