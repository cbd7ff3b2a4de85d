"""How vLLM finds out about converted checkpoints, and what it is told not to do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig
from vllm.transformers_utils.config import HFConfigParser, get_config_parser, register_config_parser
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ..errors import ConfigError
from .served import ALONE, MIXED, check, is_converted, original, tell

BACKEND = "LINEARIZE"
"""The kind of our layers among vLLM's stateful ones."""
_PREFIXES = (
    "prefix caching is not served for converted models: a state holds a whole prefix, and no part of it can "
    "be taken over"
)
_LOGGER = init_logger(f"vllm.{__name__}")


class Parser(HFConfigParser):
    """Reads `config.json` as vLLM does, and tells it what a converted checkpoint is."""

    def parse(self, model: str | Path, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        """As every config parser of vLLM."""
        found, config = super().parse(model, *args, **kwargs)
        if is_converted(found):
            # The ways in which transformers restores it, none of which is vLLM's.
            found = {n: value for n, value in found.items() if n not in ("quantization_config", "auto_map")}
            for name in ("quantization_config", "auto_map"):
                vars(config).pop(name, None)
            tell(config, f"the checkpoint {str(model)!r}")
        return found, config


class Checks(MambaModelConfig):
    """Refuses what would not be exact."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """As every such class of vLLM. Raises InvalidModelError."""
        check(original(model_config.hf_config), f"the checkpoint {model_config.model!r}")

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """As every such class of vLLM. Raises ConfigError."""
        if vllm_config.cache_config.enable_prefix_caching:
            if not vllm_config.model_config.is_hybrid:
                raise ConfigError(f"{_PREFIXES}; leave out --enable-prefix-caching")
            # On by default there, and nothing tells whether a user asked for it.
            vllm_config.cache_config.enable_prefix_caching = False
            _LOGGER.warning("%s; it is off", _PREFIXES)
        if vllm_config.speculative_config is not None:
            raise ConfigError(
                "speculative decoding is not served for converted models: vLLM cannot take drafts back from "
                "their states; leave out --speculative-config, or use generate(speculative=...)"
            )
        if vllm_config.lora_config is not None:
            raise ConfigError(
                "LoRA adapters are not served for converted models; merge them with linearize.merge(model), "
                "save the result and serve that"
            )
        if vllm_config.kv_transfer_config is not None:
            raise ConfigError(
                "states of converted layers are not sent to other engines; leave out --kv-transfer-config"
            )
        parallel = vllm_config.parallel_config
        if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
            raise ConfigError(
                "states of converted layers are not split along the context; leave out context parallelism, "
                "or use --tensor-parallel-size"
            )
        super().verify_and_update_config(vllm_config)


def register_plugin() -> None:
    """As `linearize.serving.register`."""
    if isinstance(get_config_parser("hf"), Parser):
        return
    register_config_parser("hf")(Parser)
    for name in (MIXED, ALONE):
        ModelRegistry.register_model(name, f"{__package__}.model:{name}")
        MODELS_CONFIG_MAP[name] = Checks
    MambaAttentionBackendEnum.register(BACKEND, f"{__package__}.metadata.SlotsBackend")
