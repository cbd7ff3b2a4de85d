"""Which rows of a batch belong to which slot: said once for all converted layers of a step."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata

from .ragged import Batch


class SlotsBackend(AttentionBackend):
    """What vLLM asks of a kind of layer with a state."""

    @staticmethod
    def get_name() -> str:
        return "LINEARIZE"

    @staticmethod
    def get_builder_cls() -> type[SlotsBuilder]:
        return SlotsBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """One block for each sequence, however long it is."""
        return True


class SlotsBuilder(AttentionMetadataBuilder[Batch]):
    """Makes the `Batch` of a step."""

    reorder_batch_threshold = 1  # rows of one token come first

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Batch:
        """As every builder of vLLM."""
        common, rows = common_attn_metadata, common_attn_metadata.num_reqs
        slots = common.block_table_tensor[:rows, 0].cpu()
        bounds = common.query_start_loc_cpu[: rows + 1]
        return Batch.of(slots, bounds, common.seq_lens[:rows].cpu())
